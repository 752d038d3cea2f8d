"""Statistics of rankings and of scores, with intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from inform_rm.eval.accuracy import pairwise_accuracy
from inform_rm.util.rankings import agreement, untied_places

_RESAMPLES = 2000
_AT_ONCE = 4_000_000  # numbers drawn


def ranking_statistics(
    rewards: Sequence[ArrayLike], labels: Sequence[ArrayLike], subsets: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """The figures of `inform_rm.eval.results.RankingResult`.

    ``rewards`` and ``labels`` hold those of each prompt's responses, labels the higher the better, at least two of
    them different; ``subsets`` names each prompt's; ``seed`` is that of the bootstrap.
    """
    names = np.asarray(list(map(str, subsets)), dtype=object)
    result = _of_prompts(rewards, labels, seed)
    parts = {name: np.flatnonzero(names == name).tolist() for name in sorted(set(names))}
    result["subsets"] = {
        name: _of_prompts([rewards[at] for at in places], [labels[at] for at in places], seed)
        for name, places in parts.items()
    }
    for part in result["subsets"].values():
        del part["calibration"]
    return result


def _of_prompts(rewards: Sequence[ArrayLike], labels: Sequence[ArrayLike], seed: int) -> dict[str, Any]:
    sides = []
    for values, targets in zip(rewards, labels, strict=True):
        better, worse = untied_places(targets)
        sides.append(np.asarray(values, dtype=np.float64)[[better, worse]])
    result = pairwise_accuracy(*np.concatenate(sides, axis=1))
    found = [agreement(*both) for both in zip(rewards, labels, strict=True)]
    pairs, right, ties = (np.array([getattr(each, name) for each in found], dtype=np.float64)
                          for name in ("num_pairs", "num_right", "num_ties"))  # fmt: skip
    tau, top = (np.array([getattr(each, name) for each in found]) for name in ("tau", "top"))
    ones = np.ones(len(found))
    return {
        **result,
        "accuracy_interval": bootstrap_ratio(right, pairs, seed),
        "accuracy_ties_wrong_interval": bootstrap_ratio(right - ties / 2, pairs, seed),
        "num_prompts": len(found),
        "num_responses": sum(len(np.asarray(each)) for each in labels),
        "kendall_tau": float(tau.mean()),
        "kendall_tau_interval": bootstrap_ratio(tau, ones, seed),
        "top_1_accuracy": float(top.mean()),
        "top_1_accuracy_interval": bootstrap_ratio(top, ones, seed),
    }


def bootstrap_ratio(numerators: NDArray[Any], denominators: NDArray[Any], seed: int) -> list[float]:
    """95 % percentile bootstrap interval of ``sum(numerators) / sum(denominators)`` over N rows (Efron 1979)."""
    generator, number = np.random.default_rng(seed), len(numerators)
    step, ratios = max(1, _AT_ONCE // number), []
    for start in range(0, _RESAMPLES, step):
        drawn = generator.integers(number, size=(min(step, _RESAMPLES - start), number))
        ratios.append(numerators[drawn].sum(axis=1) / denominators[drawn].sum(axis=1))
    return list(map(float, np.quantile(np.concatenate(ratios), (0.025, 0.975))))


def score_statistics(rewards: NDArray[Any], scores: NDArray[Any], subsets: Sequence[str]) -> dict[str, Any]:
    """The figures of `inform_rm.eval.results.ScoreResult`, of N responses."""
    names = np.asarray(list(map(str, subsets)), dtype=object)
    rewards, scores = np.asarray(rewards, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    parts = {name: _of_scores(rewards[names == name], scores[names == name]) for name in sorted(set(names))}
    return {**_of_scores(rewards, scores), "subsets": parts}


def _of_scores(rewards: NDArray[np.float64], scores: NDArray[np.float64]) -> dict[str, Any]:
    errors = rewards - scores
    found: dict[str, Any] = {
        "num_scored": len(errors),
        "rmse": float(np.sqrt(np.square(errors).mean())),
        "mean_error": float(errors.mean()),
    }
    if len(errors) > 2 and np.ptp(rewards) and np.ptp(scores):
        pearson = stats.pearsonr(rewards, scores)
        found["pearson"] = float(pearson.statistic)
        if len(errors) > 3:
            found["pearson_interval"] = list(map(float, pearson.confidence_interval(0.95)))
        found["spearman"] = float(stats.spearmanr(rewards, scores).statistic)
    return found
