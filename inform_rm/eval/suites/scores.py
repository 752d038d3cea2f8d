"""How the benchmark suites mark an item and a subset: pure functions of rewards, the correct candidates' first."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from inform_rm.errors import InputError

NUM_STYLES = 3
_TIES_ID = re.compile(r"(?:.*/)?(ref|tied):(\d+)", re.DOTALL)
_TWIN_ID = re.compile(r"(.*)/([ab])", re.DOTALL)


@dataclass(frozen=True)
class ScoredItem:
    """An item with the rewards of its candidates, the ``num_correct`` correct ones first."""

    id: str
    subset: str
    rewards: tuple[float, ...]
    num_correct: int


def item_credit(item: ScoredItem, rule: str, ties: str = "wrong") -> float:
    """What an item gives, between 0 and 1, by one of the functions below; ``ties`` is that of ``"strict"``."""
    match rule:
        case "strict":
            return strict_credit(item.rewards, item.num_correct, ties)
        case "shared":
            return shared_credit(item.rewards, item.num_correct)
        case "styles":
            return float(style_matrix(item.rewards).mean())
        case "mass":
            return correct_mass(item.rewards, item.num_correct)
    raise ValueError(f"rule {rule!r}; expected strict, shared, styles or mass.")


def strict_credit(rewards: Sequence[float], num_correct: int, ties: str = "wrong") -> float:
    """1 if every correct candidate has a strictly larger reward than every wrong one, else 0; ties may give half.

    With two candidates this is RewardBench's mark of a pair; with one correct of several, TruthfulQA's MC1; with
    several correct ones, the accuracy of RewardBench 2's Ties.

    Example:
        >>> strict_credit([2.0, 1.0], 1), strict_credit([1.0, 1.0], 1), strict_credit([1.0, 1.0], 1, ties="half")
        (1.0, 0.0, 0.5)
        >>> strict_credit([3.0, 2.0, 1.0, 2.5], 2)
        0.0
    """
    gap = min(rewards[:num_correct]) - max(rewards[num_correct:])
    return 1.0 if gap > 0 else 0.5 if gap == 0 and ties == "half" else 0.0


def shared_credit(rewards: Sequence[float], num_correct: int) -> float:
    """Best of n: the share of correct candidates among those with the largest reward.

    With one correct candidate: 1/k if it is among k tied maxima, else 0 (RewardBench 2).

    Example:
        >>> shared_credit([3.0, 1.0, 2.0, 0.0], 1), shared_credit([3.0, 3.0, 3.0, 0.0], 1)
        (1.0, 0.3333333333333333)
    """
    best = max(rewards)
    winners = [place for place, reward in enumerate(rewards) if reward == best]
    return sum(place < num_correct for place in winners) / len(winners)


def correct_mass(rewards: Sequence[float], num_correct: int) -> float:
    """Share of the correct candidates in ``softmax(rewards)`` (TruthfulQA's MC2, rewards for log-probabilities).

    Example:
        >>> round(correct_mass([np.log(3.0), np.log(1.0), np.log(4.0)], 2), 6)
        0.5
    """
    values = np.asarray(rewards)
    weights = np.exp(values - values.max())
    return float(weights[:num_correct].sum() / weights.sum())


def style_matrix(rewards: Sequence[float]) -> NDArray[np.float64]:
    """RM-Bench: ``(3, 3)``, cell (i, j) is 1 if chosen style i has a strictly larger reward than rejected style j.

    The six rewards are those of chosen concise, detailed, markdown, and rejected concise, detailed, markdown.

    Example:
        >>> style_matrix([1.0, 2.0, 3.0, 0.0, 1.5, 2.5])
        array([[1., 0., 0.],
               [1., 1., 0.],
               [1., 1., 1.]])
    """
    values = np.asarray(rewards)
    chosen, rejected = values[:NUM_STYLES], values[NUM_STYLES:]
    return np.asarray(chosen[:, None] > rejected[None, :], dtype=np.float64)


def style_difficulties(matrix: NDArray[np.float64]) -> dict[str, float]:
    """RM-Bench: hard, normal and easy accuracy of a mean `style_matrix`: above, on and below the diagonal.

    Hard cells have a plainer chosen response (row) than rejected one (column).

    Example:
        >>> style_difficulties(style_matrix([1.0, 2.0, 3.0, 0.0, 1.5, 2.5]))
        {'hard': 0.0, 'normal': 1.0, 'easy': 1.0}
    """
    matrix = np.asarray(matrix)
    rows, columns = np.indices(matrix.shape)
    parts = {"hard": columns > rows, "normal": columns == rows, "easy": columns < rows}
    return {name: float(matrix[part].mean()) for name, part in parts.items()}


def ties_id(identifier: str) -> tuple[str, int] | None:
    """``("tied", 3)`` of an id that ends in ``tied:3``; ``None`` if it is not an id of Ties."""
    match = _TIES_ID.fullmatch(identifier)
    return None if match is None else (match[1], int(match[2]))


def ties_score(items: Iterable[ScoredItem]) -> dict[str, float] | None:
    """RewardBench 2's Ties: questions with many correct answers, each beside a reference question with only one.

    Per item let g be the smallest reward of a correct answer minus the largest of a wrong one, and d the largest
    minus the smallest reward of a correct answer. Over questions q with both items::

        0.30 mean [g_tied > 0] + 0.30 mean [g_ref > 0]          (each over its own items)
        + 0.20 mean_q [g_tied > d_tied] + 0.20 mean_q [min(g_ref, g_tied) > d_tied]
        + 0.01 mean_q tanh(min(g_ref, g_tied) / d_tied - 1)

    where the mean of the last term leaves out questions with d = 0 (0 if there is no other), as the source does. The
    largest value is thus 1.01.

    Source: ``process_single_model`` of github.com/allenai/reward-bench (rewardbench/utils.py), in own words.

    Returns:
        ``score``, its five terms and ``num_questions`` (those with both items); ``None`` where no question has both.

    Example:
        Correct answers at 3 and 2, the best wrong one at 1: g = 1, d = 1. The reference question: g = 3.
        ``0.3 + 0.3 + 0.2 * [1 > 1] + 0.2 * [1 > 1] + 0.01 * tanh(1 / 1 - 1) = 0.6``.

        >>> tied = ScoredItem("tied:0", "Ties", (3.0, 2.0, 1.0, 0.0), 2)
        >>> ref = ScoredItem("ref:0", "Ties", (4.0, 1.0), 1)
        >>> round(ties_score([tied, ref])["score"], 6)
        0.6
    """
    gaps: dict[str, dict[int, float]] = {"tied": {}, "ref": {}}
    spreads: dict[int, float] = {}
    for item in items:
        place = ties_id(item.id)
        if place is None:
            raise InputError(f"{item.id}: expected an id that ends in tied:NUMBER or ref:NUMBER.")
        kind, question = place
        correct, wrong = item.rewards[: item.num_correct], item.rewards[item.num_correct :]
        gaps[kind][question] = min(correct) - max(wrong)
        if kind == "tied":
            spreads[question] = max(correct) - min(correct)
    both = sorted(gaps["tied"].keys() & gaps["ref"].keys())
    if not both:
        return None
    tied = np.array([gaps["tied"][question] for question in both])
    least = np.minimum(tied, [gaps["ref"][question] for question in both])
    spread = np.array([spreads[question] for question in both])
    differing = spread > 0
    margins = np.tanh(least[differing] / spread[differing] - 1)
    terms = {
        "tied_accuracy": float(np.mean([gap > 0 for gap in gaps["tied"].values()])),
        "ref_accuracy": float(np.mean([gap > 0 for gap in gaps["ref"].values()])),
        "tied_margin_wins": float((tied > spread).mean()),
        "both_margins_win": float((least > spread).mean()),
        "mean_margin": float(margins.mean()) if len(margins) else 0.0,
    }
    score = float(np.dot((0.30, 0.30, 0.20, 0.20, 0.01), list(terms.values())))
    return {"score": score, **terms, "num_questions": len(both)}


def score_with_prior_sets(sections: Sequence[float], prior_sets: float) -> float:
    """RewardBench's older total ``(2 (a + b + c + d) + p) / 9``: p, the mean of the four prior sets, weighs half.

    Example:
        >>> score_with_prior_sets([0.9, 0.6, 0.8, 0.7], 0.6)
        0.7333333333333333
    """
    return (2 * sum(sections) + prior_sets) / 9


def twin_id(identifier: str) -> tuple[str, str] | None:
    """``("x/7", "a")`` of the id ``"x/7/a"``; ``None`` if it does not end in ``/a`` or ``/b``."""
    match = _TWIN_ID.fullmatch(identifier)
    return None if match is None else (match[1], match[2])


def both_twins_right(credits: dict[str, float]) -> tuple[int, int]:
    """How many twins have both items right, of how many whose two items are there; ``credits`` are by item id.

    Example:
        >>> both_twins_right({"1/a": 1.0, "1/b": 1.0, "2/a": 1.0, "2/b": 0.0, "3/a": 1.0})
        (1, 2)
    """
    twins: dict[str, dict[str, float]] = {}
    for identifier, credit in credits.items():
        place = twin_id(identifier)
        if place is not None:
            twins.setdefault(place[0], {})[place[1]] = credit
    whole = [sides for sides in twins.values() if len(sides) == 2]
    return sum(min(sides.values()) == 1.0 for sides in whole), len(whole)
