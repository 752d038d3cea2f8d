"""What `benchmarks/prioritized.py` and `real_prioritized.py` compare: marks, tables, twins, win rates."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
if not FOLDER.is_dir():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)
sys.path.insert(0, str(FOLDER))

from equal_compute import Plan, accuracies, differences  # noqa: E402
from prioritized_report import win_rate  # noqa: E402
from real_prioritized import drawn, drawn_twins  # noqa: E402


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


def run_of(method, seed, marks):
    """A run with one test; ``marks``: updates -> CPU seconds and accuracy."""
    names = ("updates", "cpu_seconds", "test")
    rows = [dict(zip(names, (updates, *values), strict=True)) for updates, values in marks.items()]
    return {"seed": seed, "method": method, "marks": rows}


def test_tables_compare_the_marks_of_equal_compute_and_of_equal_updates():
    plan = Plan(updates=40, budget=60, costs={"bt": 1.0, "dear": 1.5})
    assert plan.marks_of("bt") == {"half of the time": 30, "the whole time": 60, "equal updates": 40}
    assert plan.marks_of("dear") == {"half of the time": 20, "the whole time": 40, "equal updates": 40}
    runs = {
        "bt": [run_of("bt", seed, {30: (3, 0.5), 40: (4, 0.6), 60: (6, 0.7)}) for seed in (0, 1)],
        "dear": [run_of("dear", 0, {20: (3, 0.6), 40: (6, 0.9)}), run_of("dear", 1, {20: (3, 0.4), 40: (6, 0.7)})],
    }
    table = [line.split(" | ") for line in accuracies(runs, plan, ["test"]).splitlines()[2:]]
    assert [(line[0], *line[1:5], line[5][:5]) for line in table] == [
        ("| half of the time", "bt", "2", "30", "0.50", "0.500"),
        ("| half of the time", "dear", "2", "20", "0.50", "0.500"),
        ("| the whole time", "bt", "2", "60", "1.00", "0.700"),
        ("| the whole time", "dear", "2", "40", "1.00", "0.800"),
        ("| equal updates", "bt", "2", "40", "0.67", "0.600"),
        ("| equal updates", "dear", "2", "40", "1.00", "0.800"),
    ]
    # Two values a and b have Student's t of one degree of freedom: mean +- 12.706 |a - b| / 2.
    assert [line.split(" | ")[2] for line in differences(runs, plan, ["test"]).splitlines()[2:]] == [
        "+0.000 [-1.271, +1.271] |", "+0.100 [-1.171, +1.371] |", "+0.200 [-1.071, +1.471] |"
    ]  # fmt: skip


def test_twins_are_drawn_whole_so_that_a_blind_reward_is_right_in_half():
    rows = [
        {"id": f"some/{pair}/{side}", "prompt": side, "chosen": f"{side} {pair}", "rejected": f"{other} {pair}"}
        for pair in range(9)
        for side, other in ("ab", "ba")
    ]
    found = drawn_twins(rows[:-1], 8, np.random.default_rng(0))  # the last one has lost its twin
    assert len({pair["id"] for pair in found}) == 8
    assert "some/8/a" not in {pair["id"] for pair in found}
    assert sum(pair["chosen"] < pair["rejected"] for pair in found) == 4
    assert len({pair["id"] for pair in drawn(rows, 18, np.random.default_rng(0))}) == 18
