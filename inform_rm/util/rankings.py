"""How well rewards order the responses of a prompt: what training and evaluation both report; numpy only."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Agreement(NamedTuple):
    """The order of one prompt's rewards held against that of its labels.

    Attributes:
        num_pairs: pairs with different labels.
        num_right: those of them whose better response has the larger reward; equal rewards count half.
        num_ties: those of them with equal rewards.
        margin: sum over them of the better response's reward minus the other's.
        tau: Kendall's tau-b (Kendall 1945); 0 where all rewards are equal.
        top: share of the responses with the largest reward that are among the best; 1 or 0 unless rewards are equal.
    """

    num_pairs: int
    num_right: float
    num_ties: int
    margin: float
    tau: float
    top: float


def agreement(rewards: ArrayLike, labels: ArrayLike) -> Agreement:
    """See `Agreement`; of ``(K,)`` labels the higher is better, and at least two differ.

    Example:
        >>> agreement([0.1, 0.3, 0.2], [3, 2, 1])[:3]
        (3, 1.0, 0)
    """
    rewards, labels = np.asarray(rewards, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    gaps = untied_gaps(rewards, labels)
    num_different = np.count_nonzero(np.subtract.outer(rewards, rewards)) / 2
    return Agreement(
        num_pairs=len(gaps),
        num_right=float((0.5 + 0.5 * np.sign(gaps)).sum()),
        num_ties=int((gaps == 0).sum()),
        margin=float(gaps.sum()),
        tau=float(np.sign(gaps).sum()) / math.sqrt(len(gaps) * num_different) if num_different else 0.0,
        top=float((labels[rewards == rewards.max()] == labels.max()).mean()),
    )


def untied_gaps(rewards: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Reward of the better minus reward of the other response, of each pair with different labels."""
    better, worse = untied_places(labels)
    rewards = np.asarray(rewards, dtype=np.float64)
    return rewards[better] - rewards[worse]


def untied_places(labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Places of the better and of the worse response of each pair with different labels."""
    better, worse = np.nonzero(np.greater.outer(np.asarray(labels), np.asarray(labels)))
    return better, worse
