"""The win rate of `benchmarks/prioritized_report.py` against all subsets; pairs and wins of `prioritized_dpo.py`."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
if not FOLDER.is_dir():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)
sys.path.insert(0, str(FOLDER))

import prioritized_dpo  # noqa: E402
from prioritized_report import win_rate  # noqa: E402


def best(rewards, gold, places):
    """Gold of what one reward chooses among some places."""
    return gold[max(places, key=lambda place: rewards[place])]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_win_rate_is_the_mean_over_all_subsets(n):
    draw = np.random.default_rng(n)
    gold, own, other = draw.integers(0, 4, (2, 8)).astype(float), draw.normal(size=(2, 8)), draw.normal(size=(2, 8))
    wins = []
    halves = (range(4), range(4, 8))
    for prompt, (mine, theirs) in itertools.product(range(2), (halves, halves[::-1])):
        for one, two in itertools.product(itertools.combinations(mine, n), itertools.combinations(theirs, n)):
            ours, rival = best(own[prompt], gold[prompt], one), best(other[prompt], gold[prompt], two)
            wins.append((ours > rival) + 0.5 * (ours == rival))
    assert win_rate(own, other, gold, n) == pytest.approx(np.mean(wins))
    assert win_rate(own, other, np.ones_like(gold), n) == pytest.approx(0.5)
    assert win_rate(gold, -gold, gold, 4) > 0.5


def test_relabelled_pairs_hold_two_responses_of_one_prompt_the_better_first(monkeypatch):
    monkeypatch.setattr(
        prioritized_dpo, "policy_responses", lambda _: (["p", "q"], [list("abcd"), list("efgh")], None)
    )
    pairs = prioritized_dpo.relabelled(0, np.array([[1, 2, 3, 3], [5, 4, -1, 0]]))
    texts = [tuple(pair[key][0]["content"] for key in ("prompt", "chosen", "rejected")) for pair in pairs]
    assert texts == [("p", "b", "a"), ("q", "e", "f"), ("q", "h", "g")]  # c and d are as good: no pair
    assert pairs[0]["prompt"][0]["role"] == "user" and pairs[0]["chosen"][0]["role"] == "assistant"


def test_the_win_rate_of_two_policies_counts_all_pairs_of_responses_to_a_prompt():
    own, other = np.array([[1.0, 2.0], [0.0, 0.0]]), np.array([[1.0, 0.0], [3.0, 0.0]])
    # First prompt: 1 ties 1 and beats 0, 2 beats both: 3.5 of 4. Second: 0 loses to 3 and ties 0, twice: 1 of 4.
    assert prioritized_dpo.win_rate(own, other) == (3.5 + 1) / 8
