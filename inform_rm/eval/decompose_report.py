"""Result, plots and page of `inform-rm decompose`."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inform_rm.eval.frame import ModelResult, unwritten
from inform_rm.util.colors import ORANGE, SKY, VERMILION
from inform_rm.util.page import Block, Heading, Image, Table, figure_png
from inform_rm.util.papers import GAP_DERIVED

_GAPS = ("reward_gap", "prompt_free_gap", "prompt_related_gap")
_INFORMATION = {
    "preference": "the preference, given responses and prompt", "responses": "of this the responses alone tell",
    "prompt": "and the prompt adds", "prompt_free": "prompt-free part, with the mean over prompts",
    "prompt_related": "prompt-related part, with the mean over prompts",
}  # fmt: skip
_MOST_BARS = 200
_INFORMATION_NOTE = (
    "Of a pair drawn at random and in random order; ln 2 = 0.693 nats are a certain preference. The last line is 0 by "
    "the choice of D2 (theorem 1 of arXiv:2504.06020, with the definitions that a public review gives). Few prompts "
    "make the second line too large and the third too small. Intervals: bootstrap over pairs."
)
_SPREAD_CAPTION = (
    "Reward gap of each pair under its own prompt (dot) and, as a bar, the middle 80 % of its gaps under other "
    "prompts; pairs in order of their gap. Bars that hug the dots: the prompt hardly matters."
)
PLANE_CAPTION = (
    "Prompt-free gap D2 and prompt-related gap D1 of each pair. Above the diagonal line the model ranks the pair "
    "right (D1 + D2 > 0); in the shaded parts the response alone decides (the prompt-free gap is the larger one)."
)


@dataclass(frozen=True, kw_only=True)
class DecompositionResult(ModelResult):
    """How much of a reward model's preference the response alone decides.

    Attributes:
        data: per source what was read and left out.
        distinct_prompts: from which the other prompts of a pair are drawn.
        num_pairs: that were decomposed.
        left_out: pairs by reason, non-finite rewards with the pairs' ids.
        cost: tokens that were computed, and that one pass a reward would take.
        accuracy: share of pairs with the larger reward for the chosen response, ties half.
        accuracy_interval: 95 %, Wilson, as those of the other shares.
        response_decides_interval: see above.
        sign_flips_interval: see above.
        mean_standard_error: of D2, from the choice of the prompts.
        mean_effective_sample_size: of the prompts' weights, as a number of prompts.
        response_decides: share of pairs with abs(D2) > abs(D1): no prompt-related part of this size could turn the
            preference.
        prompt_sensitivity: share of the gaps' variance that lies between prompts of one pair; 0 for a model blind to
            prompts.
        sign_flips: share of pairs whose preference is another one under at least one other prompt.
        not_converged: gaps whose root was not found.
        correlations: Spearman, of each gap with differences of features that the response alone has.
        quadrants: pairs and accuracy by the signs of both parts.
        information: mutual information in nats, each with a 95 % interval over pairs: ``preference``, of which
            ``responses`` are told by the responses alone and ``prompt`` is added by the prompt; ``prompt_free`` and
            ``prompt_related`` of the two parts (`inform_rm.decomposition.information`).
        subsets: shares by subset, where there are several.
        pairs: column by name, one row a pair: the content of ``pairs.parquet``.
    """

    data: list[dict[str, Any]]
    distinct_prompts: int
    left_out: dict[str, Any]
    cost: dict[str, int]
    num_pairs: int
    accuracy: float
    accuracy_interval: list[float]
    response_decides: float
    response_decides_interval: list[float]
    sign_flips: float
    sign_flips_interval: list[float]
    mean_standard_error: float
    mean_effective_sample_size: float
    not_converged: int
    correlations: dict[str, dict[str, float]]
    quadrants: list[dict[str, Any]]
    information: dict[str, dict[str, Any]]
    prompt_sensitivity: float | None = None
    subsets: dict[str, dict[str, Any]] | None = None
    pairs: dict[str, np.ndarray] = unwritten()

    title = property("Prompt-free and prompt-related reward of {0.model}".format)

    def table(self) -> Table:
        """The shares of all pairs and of each subset."""
        parts = {"all": self.to_dict(), **(self.subsets or {})}
        header = ("pairs", "n", "accuracy", "response decides", "95 % interval", "sign flips", "prompt sensitivity")
        columns = ("num_pairs", "accuracy", "response_decides", "response_decides_interval", "sign_flips",
                   "prompt_sensitivity")  # fmt: skip
        return Table(header, [(name, *map(part.get, columns)) for name, part in parts.items()])

    def figure(self) -> Figure:
        """The plane of D2 and D1, one point a pair."""
        return plane_figure(self.pairs)

    def notes(self) -> list[str]:
        """What the table's columns mean, what the figures cost, and which pairs were left out."""
        cost, left_out = self.cost, self.left_out
        texts = [
            "Response decides: share of pairs whose prompt-free gap is larger than their prompt-related one. Sign "
            "flips: share of pairs that the model ranks the other way under at least one other prompt. Prompt "
            "sensitivity: share of the gaps' variance between prompts of one pair; 0 if a model ignores prompts.",
            f"{self.settings['num_prompts']} prompts a pair out of {self.distinct_prompts}; mean standard error "
            f"of the prompt-free gap {self.mean_standard_error:.3f}, mean effective sample size "
            f"{self.mean_effective_sample_size:.1f}. {cost['tokens_computed']} tokens were computed; one pass a "
            f"reward would take {cost['tokens_of_a_plain_loop']}.",
        ]
        reasons = {
            "overlong": "too long",
            "no_other_prompt": "without another prompt",
            "nonfinite_rewards": "with NaN or infinity",
            "no_likelihood": "that the behaviour model takes under none of their prompts",
        }
        counted = [f"{left_out[name]} {text}" for name, text in reasons.items() if left_out.get(name)]
        if counted:
            named = f" ({', '.join(left_out['nonfinite_ids'])})" if left_out["nonfinite_ids"] else ""
            texts.append(f"Left out: {', '.join(counted)}{named}.")
        return [*texts, GAP_DERIVED]

    def _blocks(self) -> list[Block]:
        correlations = [
            (name, *(f"{values[gap]:.2f}" if gap in values else None for gap in _GAPS))
            for name, values in self.correlations.items()
        ]
        columns = (*_GAPS[1:], "num_pairs", "accuracy")
        quadrants = [[part[column] for column in columns] for part in self.quadrants]
        information = [(_INFORMATION[name], part["nats"], part["interval"]) for name, part in self.information.items()]
        return [
            self.table(),
            *self.notes(),
            Image(figure_png(spread_figure(self.pairs)), _SPREAD_CAPTION, "spread.png"),
            self._drawn(PLANE_CAPTION, "plane.png"),
            Heading("What the gaps go with"),
            "Spearman rank correlation with the difference (chosen - rejected) of what the response alone has.",
            Table(("difference in", "reward gap D", "prompt-free D2", "prompt-related D1"), correlations),
            Heading("Information"),
            _INFORMATION_NOTE,
            Table(("mutual information", "nats", "95 % interval"), information),
            Heading("Accuracy by quadrant"),
            Table(("prompt-free gap D2", "prompt-related gap D1", "n", "accuracy"), quadrants, align="llrr"),
        ]


def spread_figure(table: dict[str, np.ndarray]) -> Figure:
    """Gap under the own prompt and spread under others, evenly chosen pairs (arXiv:2504.06020, Fig. 1 left)."""
    order = np.argsort(table["reward_gap"], kind="stable")
    order = order[np.unique(np.linspace(0, len(order) - 1, min(_MOST_BARS, len(order))).round().astype(int))]
    places = np.arange(len(order))
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    low, high = table["other_gaps_10_percent"][order], table["other_gaps_90_percent"][order]
    axes.vlines(places, low, high, color=SKY, linewidth=max(1.0, 300 / len(order)), label="other prompts, 80 %")
    axes.plot(places, table["reward_gap"][order], ".", color=VERMILION, label="own prompt")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel=f"{len(order)} pairs, in order of their gap", ylabel="reward gap, chosen - rejected")
    axes.legend(loc="upper left")
    return figure


def plane_figure(table: dict[str, np.ndarray]) -> Figure:
    """D2 against D1, one point a pair (arXiv:2504.06020, Fig. 3 and 4), coloured by the difference in length."""
    free, related = table["prompt_free_gap"], table["prompt_related_gap"]
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    axes = figure.subplots()
    draw_plane(axes, 1.05 * max(np.abs(free).max(), np.abs(related).max(), 1e-6))
    size = float(np.clip(3000 / len(free), 4, 25))
    # A limit, because a few very long responses would leave one colour to all others.
    difference = table["characters difference"]
    limit = max(1.0, float(np.quantile(np.abs(difference), 0.95)))
    points = axes.scatter(free, related, s=size, c=difference, cmap="coolwarm", vmin=-limit, vmax=limit)
    figure.colorbar(points, label="characters, chosen - rejected", extend="both")
    return figure


def draw_plane(axes: Axes, reach: float) -> None:
    """Axes, the line of equal rewards and the shaded parts in which abs(D2) > abs(D1), from -reach to reach."""
    line = np.array([-reach, 0.0, reach])
    axes.fill_between(line, -np.abs(line), np.abs(line), color=ORANGE, alpha=0.15, linewidth=0, zorder=0)
    axes.plot(line, -line, color="grey", linestyle="--", linewidth=0.9)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    axes.set(xlabel="prompt-free gap D2", ylabel="prompt-related gap D1")
