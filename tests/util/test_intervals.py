"""Wilson interval, bootstrap and calibration error against their defining equations."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inform_rm.util.intervals import expected_calibration_error, grouped_bootstrap, wilson_interval


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, 2 * n), st.just(n))))
def test_wilson_limits_solve_the_score_equation(case):
    doubled, n = case
    share = doubled / 2 / n
    low, high = wilson_interval(doubled / 2, n)
    assert 0 <= low <= share <= high <= 1
    for limit in (low, high):
        if 1e-9 < limit < 1 - 1e-9:
            assert abs(share - limit) == pytest.approx(
                1.959963984540054 * math.sqrt(limit * (1 - limit) / n), abs=1e-9
            )


@pytest.mark.parametrize("case", [(1, 0), (-1, 3), (4, 3)])
def test_wilson_refuses_impossible_counts(case):
    with pytest.raises(ValueError, match="expected 0 <= num_correct <= n"):
        wilson_interval(*case)


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=60))
@settings(max_examples=40)
def test_calibration_error_matches_a_loop(margins):
    total = 0.0
    for index in range(10):
        low, high = 0.5 + 0.05 * index, 0.5 + 0.05 * (index + 1)
        members = []
        for margin in margins:
            confidence = 1 / (1 + math.exp(-abs(margin)))
            if low <= confidence < high or (index == 9 and confidence >= high):
                members.append((confidence, 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0))
        if members:
            confidences, outcomes = np.array(members).T
            total += len(members) / len(margins) * abs(outcomes.mean() - confidences.mean())
    # A confidence within rounding of a bin's edge may fall on either side: each moves at most 1 / N.
    edges = sum(
        min(abs(1 / (1 + math.exp(-abs(m))) - (0.5 + 0.05 * k)) for k in range(1, 10)) < 1e-12 for m in margins
    )
    assert expected_calibration_error(margins) == pytest.approx(total, abs=1e-9 + edges)


def test_calibration_error_of_a_calibrated_model_is_zero():
    # sigmoid(log 3) = 0.75: right in 3 of 4 pairs.
    assert expected_calibration_error([math.log(3)] * 3 + [-math.log(3)]) == pytest.approx(0.0, abs=1e-12)


def test_a_bootstrap_over_groups_is_that_of_all_their_draws():
    values, groups = [1.0, 1.0, 0.0, 0.0, 1.0, 0.5, 1.0], ["a", "a", "b", "c", "c", "d", "e"]
    sums = {group: [value for value, own in zip(values, groups, strict=True) if own == group] for group in "abcde"}
    draws = itertools.product("abcde", repeat=5)
    means = [np.mean([value for group in draw for value in sums[group]]) for draw in draws]
    expected = np.quantile(means, [0.025, 0.975], method="inverted_cdf").tolist()
    assert grouped_bootstrap(values, groups, num_resamples=5000) == pytest.approx(expected, abs=0.02)
    assert grouped_bootstrap(values, groups, seed=1) == grouped_bootstrap(values, groups, seed=1)
