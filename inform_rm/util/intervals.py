"""Statistics of pairwise preference that training and evaluation both report; numpy only."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

_NORMAL_QUANTILE_975 = 1.959963984540054


def wilson_interval(num_correct: float, n: int) -> tuple[float, float]:
    """Wilson 95 % score interval of a proportion: the p with ``|p_hat - p| <= z sqrt(p (1 - p) / n)``, z = 1.96.

    Half counts (ties) are allowed. `ValueError` if there are no trials, or more successes than trials.

    Example:
        >>> low, high = wilson_interval(8, 10)
        >>> f"{low:.3f} {high:.3f}"
        '0.490 0.943'
    """
    if n < 1 or not 0 <= num_correct <= n:
        raise ValueError(f"num_correct={num_correct} of n={n}: expected 0 <= num_correct <= n and n >= 1.")
    share, square = num_correct / n, _NORMAL_QUANTILE_975**2
    center = (share + square / (2 * n)) / (1 + square / n)
    half = math.sqrt(share * (1 - share) * square / n + square**2 / (4 * n**2)) / (1 + square / n)
    # The interval holds the share itself; rounding may leave it out by 1e-16 where the share is 0 or 1.
    return max(0.0, min(center - half, share)), min(1.0, max(center + half, share))


def grouped_bootstrap(
    values: ArrayLike, groups: Sequence[str], *, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of ``(N,)`` values that are alike within groups, such as prompts.

    Whole groups are drawn again.

    Example:
        >>> grouped_bootstrap([1.0, 1.0, 1.0], ["a", "a", "b"])
        (1.0, 1.0)
    """
    _, group = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(group, weights=np.asarray(values, dtype=np.float64)), np.bincount(group)
    rng = np.random.default_rng(seed)
    even = np.full(len(sums), 1 / len(sums))
    means = np.empty(num_resamples)
    for resample in range(num_resamples):
        drawn = rng.multinomial(len(sums), even)
        means[resample] = (drawn @ sums) / (drawn @ counts)
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    return low, high


def expected_calibration_error(margins: ArrayLike, num_bins: int = 10) -> float:
    """Expected calibration error of ``sigmoid(margin)`` as the probability that the model's favourite is preferred.

    Each pair is folded to confidence ``sigmoid(|margin|)`` in [0.5, 1] and outcome 1, 0, or 0.5 for a tie; bins of
    equal width; ``sum_b n_b / n * |mean outcome_b - mean confidence_b|``. Margins are ``(N,)``.
    """
    confidence, outcome, bins = confidence_bins(margins, num_bins)
    gaps = np.bincount(bins, weights=outcome - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(bins))


def confidence_bins(margins: ArrayLike, num_bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence, outcome and number of the bin of each pair, ``(N,)``; see `expected_calibration_error`."""
    margins = np.asarray(margins, dtype=np.float64)
    confidence = 1.0 / (1.0 + np.exp(-np.abs(margins)))
    bins = np.minimum(((confidence - 0.5) * 2 * num_bins).astype(int), num_bins - 1)
    return confidence, 0.5 + 0.5 * np.sign(margins), bins
