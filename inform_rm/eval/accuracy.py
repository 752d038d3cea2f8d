"""How often a reward model prefers the chosen response: counts, intervals, length bias and calibration."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from inform_rm.util.intervals import confidence_bins, expected_calibration_error, wilson_interval


def pairwise_accuracy(
    chosen_rewards: ArrayLike,
    rejected_rewards: ArrayLike,
    subsets: Sequence[str] | None = None,
    chosen_lengths: ArrayLike | None = None,
    rejected_lengths: ArrayLike | None = None,
) -> dict[str, Any]:
    """Statistics of N preference pairs, as a dictionary that JSON can hold.

    A tie is a pair whose two rewards are exactly equal. ``accuracy`` counts it as half right, as a coin would;
    ``accuracy_ties_wrong`` as wrong, as RewardBench does. Intervals are 95 % Wilson intervals; those of ``accuracy``
    take half counts and are then slightly wide.

    The figures are those of `inform_rm.eval.results.EvaluationResult`, by subset and length where these are given,
    lengths of both sides in one unit. ``by_length`` has the parts that have pairs (``chosen_longer``,
    ``chosen_shorter``, ``same_length``); the rule "the longer response wins" is half right at the same length.

    Example:
        >>> result = pairwise_accuracy([1.0, 2.0, 0.0], [0.0, 2.0, 1.0])
        >>> result["accuracy"], round(result["accuracy_ties_wrong"], 3), result["num_ties"]
        (0.5, 0.333, 1)
    """
    margins = np.asarray(chosen_rewards, dtype=np.float64) - np.asarray(rejected_rewards, dtype=np.float64)
    result = _counts(margins)
    result["calibration"] = {
        "expected_calibration_error": expected_calibration_error(margins),
        "bins": reliability_bins(margins),
    }
    if chosen_lengths is not None and rejected_lengths is not None:
        difference = np.sign(np.subtract(chosen_lengths, rejected_lengths, dtype=np.float64))
        parts = {"chosen_longer": difference > 0, "chosen_shorter": difference < 0, "same_length": difference == 0}
        result["by_length"] = {name: _counts(margins[part]) for name, part in parts.items() if part.any()}
        result["longer_wins_accuracy"] = float(np.mean(0.5 + 0.5 * difference))
    if subsets is not None:
        names = np.asarray([str(name) for name in subsets], dtype=object)
        result["subsets"] = {name: _counts(margins[names == name]) for name in sorted(set(names))}
    return result


def reliability_bins(margins: ArrayLike, num_bins: int = 10) -> list[dict[str, float]]:
    """Accuracy against predicted probability: the parts of `expected_calibration_error`, bin by bin.

    Bradley-Terry reads a margin as the probability ``sigmoid(margin)`` that the chosen response is preferred. Each
    pair is folded to ``confidence = sigmoid(|margin|)`` in [0.5, 1]; it is right if the margin is positive, half right
    at 0. Bins have equal width; empty ones are left out.

    Returns:
        For each bin ``low`` and ``high`` (of confidence), ``num_pairs``, ``mean_confidence``, ``accuracy`` and its
        ``accuracy_interval``.
    """
    confidence, outcome, bins = confidence_bins(margins, num_bins)
    return [
        {
            "low": 0.5 + 0.5 * index / num_bins,
            "high": 0.5 + 0.5 * (index + 1) / num_bins,
            "mean_confidence": float(confidence[bins == index].mean()),
            **share_right(outcome[bins == index]),
        }
        for index in np.unique(bins).tolist()
    ]


def share_right(outcomes: NDArray[np.float64]) -> dict[str, Any]:
    """``num_pairs``, ``accuracy`` and its Wilson interval of outcomes ``(N,)``: 1, 0, or 0.5 for a tie."""
    interval = wilson_interval(float(outcomes.sum()), len(outcomes))
    return {"num_pairs": len(outcomes), "accuracy": float(outcomes.mean()), "accuracy_interval": list(interval)}


def _counts(margins: NDArray[np.float64]) -> dict[str, Any]:
    num_pairs, num_right = len(margins), int((margins > 0).sum())
    return {
        **share_right(0.5 + 0.5 * np.sign(margins)),
        "accuracy_ties_wrong": num_right / num_pairs,
        "accuracy_ties_wrong_interval": list(wilson_interval(num_right, num_pairs)),
        "num_ties": int((margins == 0).sum()),
        "mean_margin": float(margins.mean()),
    }
