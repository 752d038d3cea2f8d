"""The win rate of `benchmarks/prioritized_report.py` against all subsets."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
if not FOLDER.is_dir():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)
sys.path.insert(0, str(FOLDER))

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
