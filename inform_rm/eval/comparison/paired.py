"""Statistics of two models on the same rows, and of one model apart from the lengths of what it compares."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq, minimize, minimize_scalar
from scipy.special import expit
from scipy.stats import binomtest, chi2

from inform_rm.errors import check_whole_number

_RIDGES = np.array([1e-4, 0.04])  # on quality and length: inverse variances, see length_controlled_accuracy
_LARGEST_LOG_ODDS = 60.0  # a limit beyond is 0 or 1 to the last bit


class Interval(NamedTuple):
    """A statistic with its 95 % interval."""

    estimate: float
    low: float
    high: float


def paired_bootstrap(differences: ArrayLike, *, num_resamples: int = 10_000, seed: int = 0) -> Interval:
    """Mean difference of two models over rows, with a 95 % percentile bootstrap interval over rows (Efron 1979).

    A resample draws N rows with replacement. Its mean depends on how often each *value* is drawn, and these counts are
    multinomial: they are drawn in place of the rows, at the cost of the few values that differences of credits have.
    Rows count as independent; where several share a prompt the interval is too narrow.

    ``differences`` ``(N,)`` are the credit of one model minus that of the other, row by row.

    Example:
        >>> found = paired_bootstrap([1.0, 0.0, 0.0, -1.0, 1.0, 1.0, 0.0, 1.0])
        >>> (found.estimate, found.low, found.high)
        (0.375, -0.125, 0.875)
    """
    values, counts = np.unique(np.asarray(differences, dtype=np.float64), return_counts=True)
    check_whole_number("num_resamples", num_resamples)
    number = int(counts.sum())
    draws = np.random.default_rng(seed).multinomial(number, counts / number, size=num_resamples)
    means = draws @ values / number
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    return Interval(float(values @ counts) / number, low, high)


class McNemarTest(NamedTuple):
    """Rows that only the first or the second model has right, those that could not be used, and the p-value."""

    first_only: int
    second_only: int
    left_out: int
    p_value: float


def mcnemar_test(first: ArrayLike, second: ArrayLike) -> McNemarTest:
    """Exact McNemar test: are two models equally often right on the same rows (McNemar 1947)?

    Of the rows that exactly one of them has right, the number that the first has right is binomial with probability
    1/2 if they are equally good. Rows where either has a credit other than 0 and 1 are counted and left out; without
    rows that differ the p-value is 1.

    Credits ``(N,)`` go from 0 (wrong) to 1 (right).

    Example:
        >>> mcnemar_test([1, 1, 1, 1, 1, 0.5], [0, 0, 0, 0, 0, 1]).p_value
        0.0625
    """
    one, other = np.asarray(first), np.asarray(second)
    used = np.isin(one, (0.0, 1.0)) & np.isin(other, (0.0, 1.0))
    first_only = int((used & (one > other)).sum())
    second_only = int((used & (other > one)).sum())
    differing = first_only + second_only
    p_value = float(binomtest(first_only, differing).pvalue) if differing else 1.0
    return McNemarTest(first_only, second_only, int((~used).sum()), p_value)


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number: rejecting those up to 0.05 errs once at all in at most 5 % (Holm 1979).

    The i-th smallest of m becomes the largest of ``(m - j + 1) p_(j)`` over j up to i, at most 1.

    Example:
        >>> holm_adjusted([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    values = np.asarray(p_values)
    order = np.argsort(values)
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(np.arange(len(values), 0, -1) * values[order]))
    return adjusted.tolist()


class LengthControlled(NamedTuple):
    """Accuracy on pairs of equal length; and the log odds that a chosen response gains by being much longer."""

    accuracy: Interval
    length_coefficient: float


def length_scale(length_differences: ArrayLike) -> float:
    """Root mean square of length differences, the unit of `length_controlled_accuracy`; 1 where all are 0."""
    return float(np.sqrt(np.mean(np.square(length_differences)))) or 1.0


def length_controlled_accuracy(
    credits: ArrayLike, length_differences: ArrayLike, *, scale: float | None = None
) -> LengthControlled:
    """Accuracy that a model would have if the two responses of every pair were equally long.

    A logistic regression of what the model prefers. With A and B the responses of a pair in either order,

        ``P(A preferred to B) = sigmoid(quality * g + length * tanh((length_A - length_B) / scale))``

    with g = 1 if A is the chosen response and -1 if B is. It has no intercept, so that the order does not matter; and
    as turning a pair round changes every sign, it is the regression of "prefers the chosen response" on the length
    difference, chosen minus rejected, whose intercept is ``quality``. The length-controlled accuracy is
    ``sigmoid(quality)``. The idea and the tanh are those of length-controlled AlpacaEval (arXiv:2404.04475), which
    controls the win rate of a policy; it scales by the standard deviation, this by the root mean square, because 0 is
    the point that counts. A tie is half a preference for either.

    The interval is of profile likelihood: every ``quality`` whose best fit is not rejected at 5 %. Where all pairs
    have the longer response on the same side, equal length lies outside the data, and the interval shows it. Where a
    rule fits every pair (all right, or the longer always wins) the best fit would be infinite. So both coefficients
    have a ridge, as of normal priors with standard deviations 100 for ``quality`` and 5 for ``length``: all right then
    comes out below 1 by less than 1e-3, and a length coefficient of ordinary size is shrunk by a few per cent at 20
    pairs, less at more.

    Args:
        credits: ``(N,)`` 1 where the model prefers the chosen response, 0 where the rejected one, 0.5 for a tie.
        length_differences: ``(N,)`` length of the chosen minus that of the rejected response, in any unit.
        scale: of the length differences; ``None`` takes their `length_scale`. Pass one scale for groups of pairs
            whose coefficients are to be compared.

    Example:
        >>> found = length_controlled_accuracy([1, 1, 1, 0, 1, 0, 0, 0], [9, 9, 9, 9, -9, -9, -9, -9])
        >>> f"{found.accuracy.estimate:.3f} {found.length_coefficient:.2f}"
        '0.500 1.38'
    """
    preferred, differences = (np.asarray(each, dtype=np.float64) for each in (credits, length_differences))
    predictor = np.tanh(differences / (length_scale(differences) if scale is None else scale))

    def loss(quality: float, length: float) -> float:
        log_odds = quality + length * predictor
        fit = np.logaddexp(0.0, log_odds) - preferred * log_odds
        return float(fit.sum()) + 0.5 * float(_RIDGES @ (quality**2, length**2))

    def gradient(point: NDArray[np.float64]) -> NDArray[np.float64]:
        residuals = expit(point[0] + point[1] * predictor) - preferred
        return np.array([residuals.sum(), residuals @ predictor]) + _RIDGES * point

    best = minimize(lambda point: loss(*point), np.zeros(2), jac=gradient)
    quality, length = best.x.tolist()

    def excess(at: float) -> float:
        """Likelihood-ratio statistic of one value of quality, above its 95 % quantile."""
        fitted = minimize_scalar(lambda slope: loss(at, slope))
        return 2 * (float(fitted.fun) - float(best.fun)) - float(chi2.ppf(0.95, df=1))

    low, high = (_limit(excess, quality, direction) for direction in (-1.0, 1.0))
    accuracy = Interval(float(expit(quality)), float(expit(low)), float(expit(high)))
    return LengthControlled(accuracy, length)


def _limit(excess: Callable[[float], float], start: float, direction: float) -> float:
    """Where a function that is negative at `start` and rises away from it meets 0; infinite where it does not."""
    inner, step = start, 0.25
    while True:
        outer = start + direction * step
        if excess(outer) > 0:
            return float(brentq(excess, inner, outer))
        if abs(outer) > _LARGEST_LOG_ODDS:
            return direction * np.inf
        inner, step = outer, 2 * step
