"""The win rate of `benchmarks/prioritized_report.py` against all subsets."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def report():
    sys.path.insert(0, str(FOLDER))
    try:
        import prioritized_report

        yield prioritized_report
    finally:
        sys.path.remove(str(FOLDER))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_win_rate_is_the_mean_over_all_subsets(report, n):
    draw = np.random.default_rng(n)
    gold, own, other = draw.integers(0, 4, (2, 8)).astype(float), draw.normal(size=(2, 8)), draw.normal(size=(2, 8))
    wins = []
    for prompt, (one, two) in itertools.product(range(2), [(range(4), range(4, 8)), (range(4, 8), range(4))]):
        for mine, theirs in itertools.product(itertools.combinations(one, n), itertools.combinations(two, n)):
            best = gold[prompt, max(mine, key=lambda place: own[prompt, place])]
            rival = gold[prompt, max(theirs, key=lambda place: other[prompt, place])]
            wins.append((best > rival) + 0.5 * (best == rival))
    assert report.win_rate(own, other, gold, n) == pytest.approx(np.mean(wins))
    assert report.win_rate(own, other, np.ones_like(gold), n) == pytest.approx(0.5)
    assert report.win_rate(gold, -gold, gold, 4) > 0.5
