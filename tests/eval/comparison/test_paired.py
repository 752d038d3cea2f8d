"""Paired statistics against brute force, a second implementation, and data made with known coefficients."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from inform_rm.errors import InputError
from inform_rm.eval.comparison.paired import (
    holm_adjusted,
    length_controlled_accuracy,
    length_scale,
    mcnemar_test,
    paired_bootstrap,
)

# --- bootstrap


def exact_bootstrap_quantiles(differences, levels):
    """Quantiles of the mean of n draws with replacement, from its exact distribution: the n-fold convolution."""
    doubled = np.rint(2 * np.asarray(differences)).astype(int)  # values are multiples of 1/2
    one = np.array([(doubled == value).mean() for value in range(-2, 3)])
    total = np.ones(1)
    for _ in doubled:
        total = np.convolve(total, one)
    sums = np.arange(-2 * len(doubled), 2 * len(doubled) + 1) / 2 / len(doubled)
    return [sums[np.searchsorted(np.cumsum(total), level)] for level in levels]


@pytest.mark.parametrize("number", [7, 40, 200])
def test_bootstrap_interval_is_that_of_the_exact_distribution(number):
    differences = np.random.default_rng(number).choice(
        [-1.0, -0.5, 0.0, 0.5, 1.0], number, p=[0.1, 0.1, 0.5, 0.1, 0.2]
    )
    found = paired_bootstrap(differences, num_resamples=100_000)
    assert found.estimate == pytest.approx(differences.mean(), abs=1e-12)
    # Of 100,000 resamples the share below a quantile has a standard deviation of 0.0005: 6 of them on either side.
    for value, level in ((found.low, 0.025), (found.high, 0.975)):
        low, high = exact_bootstrap_quantiles(differences, [level - 0.003, level + 0.003])
        assert low <= value <= high


def test_bootstrap_equals_a_plain_loop_over_its_draws_and_scipy_in_distribution():
    differences = np.random.default_rng(0).normal(0.1, 1.0, 50)  # no value twice
    found = paired_bootstrap(differences, num_resamples=400, seed=3)
    generator = np.random.default_rng(3)
    ordered = np.sort(differences)
    means = [float(generator.multinomial(50, [1 / 50] * 50) @ ordered) / 50 for _ in range(400)]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1e-12)
    other = scipy.stats.bootstrap((differences,), np.mean, n_resamples=20_000, method="percentile", random_state=1)
    mine = paired_bootstrap(differences, num_resamples=20_000)
    np.testing.assert_allclose((mine.low, mine.high), other.confidence_interval, atol=0.02)


def test_bootstrap_is_seeded_and_independent_of_row_order():
    differences = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], 300)
    found = paired_bootstrap(differences, seed=5)
    assert found == paired_bootstrap(differences[::-1], seed=5) != paired_bootstrap(differences, seed=6)


def test_bootstrap_covers_the_true_difference_about_as_often_as_it_says():
    """Two models that are right with 0.7 and 0.6, 200 rows, 300 experiments: the interval holds 0.1 in most."""
    generator = np.random.default_rng(0)
    held = 0
    for experiment in range(300):
        differences = (generator.random(200) < 0.7) * 1.0 - (generator.random(200) < 0.6)
        found = paired_bootstrap(differences, num_resamples=500, seed=experiment)
        held += found.low <= 0.1 <= found.high
    assert 0.91 <= held / 300 <= 0.98  # 0.95 and 3 standard deviations (0.0126) below it, or the next above


def test_bootstrap_of_equal_models_has_no_width():
    found = paired_bootstrap(np.zeros(10))
    assert found == (0.0, 0.0, 0.0)


# --- McNemar


def brute_force_p_value(first_only, second_only):
    """Share of all sequences of fair coins whose number of heads is as improbable as the one seen, or more."""
    total = first_only + second_only
    seen = math.comb(total, first_only)
    return sum(math.comb(total, heads) <= seen and math.comb(total, heads) for heads in range(total + 1)) / 2**total


def test_mcnemar_of_a_hand_computed_binomial():
    """6 rows against 1: 2 (C(7, 0) + C(7, 1)) / 2^7 = 16 / 128 = 0.125."""
    test = mcnemar_test([1] * 6 + [0] + [1] * 5 + [0] * 3, [0] * 6 + [1] + [1] * 5 + [0] * 3)
    assert (test.first_only, test.second_only, test.left_out) == (6, 1, 0)
    assert test.p_value == pytest.approx(0.125, abs=1e-12)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, 1 / 3]), st.sampled_from([0.0, 0.5, 1.0])), min_size=1))
def test_mcnemar_equals_brute_force_and_is_symmetric(rows):
    first, second = zip(*rows, strict=True)
    test = mcnemar_test(first, second)
    used = [(one, two) for one, two in rows if one in (0, 1) and two in (0, 1)]
    assert test.left_out == len(rows) - len(used)
    assert (test.first_only, test.second_only) == (used.count((1.0, 0.0)), used.count((0.0, 1.0)))
    assert test.p_value == pytest.approx(brute_force_p_value(test.first_only, test.second_only), abs=1e-12)
    turned = mcnemar_test(second, first)
    assert (turned.first_only, turned.p_value) == (test.second_only, pytest.approx(test.p_value, abs=1e-12))


# --- Holm


@settings(max_examples=40)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_holm_is_the_closed_test_of_bonferroni(p_values):
    """A hypothesis is rejected if every set of hypotheses that holds it is: |set| * min p, the largest over sets."""
    places = range(len(p_values))
    expected = [
        max(
            min(1.0, len(chosen) * min(p_values[other] for other in chosen))
            for size in range(1, len(p_values) + 1)
            for chosen in itertools.combinations(places, size)
            if place in chosen
        )
        for place in places
    ]
    assert holm_adjusted(p_values) == pytest.approx(expected, abs=1e-12)


def test_holm_of_one_and_of_no_test():
    assert holm_adjusted([0.03]) == [0.03] and holm_adjusted([]) == []


# --- length control


def made_pairs(quality, length, number, seed=0):
    generator = np.random.default_rng(seed)
    differences = np.rint(generator.normal(60, 150, number))
    chance = 1 / (1 + np.exp(-(quality + length * np.tanh(differences / length_scale(differences)))))
    return (generator.random(number) < chance) * 1.0, differences


@pytest.mark.parametrize(("quality", "length"), [(0.8, 1.5), (1.5, -1.0), (0.0, 2.0)])
def test_known_coefficients_are_found_again(quality, length):
    """20,000 pairs: standard errors are about 0.02 for quality and 0.03 for length."""
    found = length_controlled_accuracy(*made_pairs(quality, length, 20_000))
    assert found.length_coefficient == pytest.approx(length, abs=0.12)
    assert found.accuracy.estimate == pytest.approx(1 / (1 + math.exp(-quality)), abs=0.02)
    assert found.accuracy.low < 1 / (1 + math.exp(-quality)) < found.accuracy.high


def test_fit_is_the_symmetrised_regression_of_scikit_learn():
    """Every pair in both orders, with no intercept: A is the chosen or the rejected response."""
    credits, differences = made_pairs(0.6, 1.2, 600)
    predictor = np.tanh(differences / length_scale(differences))
    # scikit-learn penalises with one ridge 1/C; columns in units of the prior deviations 100 and 5 make it ours. Both
    # orders double the likelihood, so C doubles the ridge.
    features = np.stack([np.concatenate([np.ones(600), -np.ones(600)]) * 100,
                         np.concatenate([predictor, -predictor]) * 5], axis=1)  # fmt: skip
    preferred = np.concatenate([credits, 1 - credits])
    fitted = LogisticRegression(fit_intercept=False, C=0.5, tol=1e-10, max_iter=10_000, solver="newton-cholesky")
    quality, length = fitted.fit(features, preferred).coef_[0] * (100, 5)
    found = length_controlled_accuracy(credits, differences)
    assert found.accuracy.estimate == pytest.approx(1 / (1 + math.exp(-quality)), abs=1e-6)
    assert found.length_coefficient == pytest.approx(length, abs=1e-5)


def test_interval_is_where_the_best_fit_is_just_not_rejected():
    """The limits' fits, found on a fine grid of the length coefficient, are 3.841 / 2 below the best in likelihood."""
    credits, differences = made_pairs(0.6, 1.2, 200)
    predictor = np.tanh(differences / length_scale(differences))

    def best_loss(quality):
        slopes = np.linspace(-1, 4, 5001)
        log_odds = quality + slopes[:, None] * predictor
        loss = (np.logaddexp(0, log_odds) - credits * log_odds).sum(axis=1)
        return (loss + 0.5 * (1e-4 * quality**2 + 0.04 * slopes**2)).min()

    interval = length_controlled_accuracy(credits, differences).accuracy
    estimate, low, high = (math.log(p / (1 - p)) for p in (interval.estimate, interval.low, interval.high))
    for limit in (low, high):
        assert 2 * (best_loss(limit) - best_loss(estimate)) == pytest.approx(3.8415, abs=1e-3)


def test_a_model_that_follows_length_alone_gets_one_half():
    """Chosen responses are longer in most pairs, so that its plain accuracy is high."""
    differences = scipy.stats.norm.ppf((np.arange(1000) + 0.5) / 1000, loc=150, scale=150)
    follows = (differences > 0) * 1.0
    assert follows.mean() > 0.84
    found = length_controlled_accuracy(follows, differences)
    assert found.accuracy.estimate == pytest.approx(0.5, abs=0.1)
    assert found.accuracy.low < 0.5 < found.accuracy.high
    assert found.length_coefficient > 5
    against = length_controlled_accuracy(1 - follows, differences)
    assert against.accuracy.estimate == pytest.approx(1 - found.accuracy.estimate, abs=1e-6)
    assert against.length_coefficient == pytest.approx(-found.length_coefficient, abs=1e-4)


def test_a_model_independent_of_length_gets_its_accuracy():
    """The same share is right at every length: 3 of 4."""
    differences = np.repeat([-300, -40, 0, 25, 120, 500], 40)
    credits = np.tile([1.0, 1.0, 1.0, 0.0], 60)
    found = length_controlled_accuracy(credits, differences)
    assert found.accuracy.estimate == pytest.approx(0.75, abs=1e-5)
    assert found.length_coefficient == pytest.approx(0.0, abs=1e-4)
    ties = length_controlled_accuracy(np.full(240, 0.5), differences)
    assert ties.accuracy.estimate == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize("number", [10, 300])
def test_all_right_and_all_wrong_have_finite_fits_and_the_likelihoods_limit(number):
    """All right: sigmoid(q)^n falls by a factor exp(-3.841 / 2) at the lower limit. A prior on q adds under 0.01."""
    differences = np.random.default_rng(0).normal(0, 50, number)
    limit = math.exp(-3.8415 / 2 / number)
    right = length_controlled_accuracy(np.ones(number), differences)
    assert right.accuracy.estimate > 0.999 and right.accuracy.high == pytest.approx(1.0)
    assert right.accuracy.low == pytest.approx(limit, abs=0.02)
    wrong = length_controlled_accuracy(np.zeros(number), differences)
    assert wrong.accuracy.estimate < 0.001 and wrong.accuracy.high == pytest.approx(1 - right.accuracy.low, abs=1e-4)
    assert abs(right.length_coefficient) < 0.5


def test_where_the_chosen_response_is_always_longer_by_the_same_the_interval_is_open():
    found = length_controlled_accuracy([1, 0, 1, 1] * 25, [80] * 100)
    assert found.accuracy.low < 0.01 and found.accuracy.high > 0.99
    assert length_scale([0, 0]) == 1
    equal = length_controlled_accuracy([1, 0, 1, 1] * 25, [0] * 100)
    assert equal.accuracy.estimate == pytest.approx(0.75, abs=1e-5)
    assert 0.6 < equal.accuracy.low and equal.accuracy.high < 0.85


def test_unit_of_length_does_not_matter_and_a_common_scale_makes_coefficients_comparable():
    credits, differences = made_pairs(0.5, 1.0, 400)
    once, thrice = (length_controlled_accuracy(credits, factor * differences) for factor in (1, 3))
    assert once.accuracy.estimate == pytest.approx(thrice.accuracy.estimate, abs=1e-9)
    explicit = length_controlled_accuracy(credits, differences, scale=length_scale(differences))
    assert explicit == once
    assert length_controlled_accuracy(credits, differences, scale=1e6).length_coefficient != once.length_coefficient


@pytest.mark.parametrize("number", [0, -1, 1.5, True])
def test_number_of_resamples_is_checked(number):
    with pytest.raises(InputError, match=r"^num_resamples"):
        paired_bootstrap([1.0], num_resamples=number)
