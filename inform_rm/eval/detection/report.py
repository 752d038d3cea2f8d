"""Result, plots and page of `inform-rm detect`."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from inform_rm.errors import shortened
from inform_rm.eval.detection.statistic import STATISTICS
from inform_rm.eval.frame import ModelResult, unwritten
from inform_rm.util.colors import BLUE, SKY, VERMILION
from inform_rm.util.page import Block, Heading, Image, PointMap, Table, figure_png, format_interval
from inform_rm.util.papers import MOP_DIFFERS

REFERENCE = "(reference)"

_COLORS = {"reference": SKY, "candidate": BLUE, "outlier": VERMILION}
_SHOWN_CHARACTERS = 400
_OUTLIER_HEADER = ("candidate", "prompt", "response", "reward", "squared distance", "tail probability")
_LABEL_HEADER = (
    "candidate", "outliers by", "labelled", "exploit", "outliers", "both", "precision", "95 % interval", "recall",
    "95 % interval",
)  # fmt: skip
_LABEL_NOTE = (
    "Labels say which responses exploit a reward. Precision: of the outliers, the share that is labelled so; recall: "
    "of those that are labelled so, the share that are outliers; with Wilson intervals, and empty where there is "
    "nothing to take a share of. An outlier of CSI is a response whose cluster lies farther from the reference than "
    "all but alpha of the responses in halves of the reference do."
)
MAP_CAPTION = (
    "t-SNE map of the latents: reference responses, candidate responses, and those candidates whose distance from "
    "the reference is beyond chance (tail probability below alpha). Distances between far points of such a map mean "
    "little."
)
LABELLED_CAPTION = " A black edge: labelled; a triangle: as exploiting a reward."
STEPS_CAPTION = (
    "Candidates in the order in which they were given; intervals are 95 % bootstrap intervals. The grey band is what "
    "halves of the reference give against each other (95 %). A dashed line marks where CSI's stopping rule fires."
)


@dataclass(frozen=True, kw_only=True)
class DetectionResult(ModelResult):
    """What `detect` found.

    Attributes:
        kind: of the latents, see `inform_rm.eval.detection.latents.Latents`.
        dimensions: of the latents.
        eps: radius of DBSCAN.
        reference: counts, mean reward and what its texts are like.
        candidates: the same of each candidate, in order, with its ``name``; for every statistic (``csi_normalized``,
            ``mop``, ``knn_outliers``) its value, ``NAME_interval`` and ``NAME_null_rank``; ``most_outlying``; and
            ``stop``, whether CSI's stopping rule fires; ``reward_fell``, whether the mean reward has lost more than
            ``max_reward_fall`` of its largest gain over the reference; where there are labels, what
            `inform_rm.eval.detection.labels.agreement` finds, as ``labels``.
        null: ``mean`` and ``interval`` of every statistic for halves of the reference against each other, ``splits``.
        digests: of the sources.
        responses: columns ``set``, ``row``, ``response``, ``reward`` those of the statistics: an entry a response.
        values: ``(N, K)`` latents of these responses.
    """

    kind: str
    dimensions: int
    eps: float
    reference: dict[str, Any]
    candidates: list[dict[str, Any]]
    null: dict[str, Any]
    digests: dict[str, str]
    responses: dict[str, list[Any]] = unwritten()
    values: np.ndarray = unwritten()

    title = property("Overoptimization check of {0.model}".format)

    def table(self) -> Table:
        """The reference, then every candidate with the statistics, reward and what its texts are like."""
        titles = [title for statistic in STATISTICS for title in (statistic.title, "95 % interval")]
        names = [name for statistic in STATISTICS for name in (statistic.name, f"{statistic.name}_interval")]
        header = ("candidate", "n", *titles, "mean reward", "words", "repeated trigrams", "stopping rules")
        rows = []
        for part in [{"name": REFERENCE, **self.reference}, *self.candidates]:
            low, high = part["mean_words_interval"]
            rules = {"stop": "CSI jumped", "reward_fell": "reward fell"}
            fired = ", ".join(words for key, words in rules.items() if part.get(key))
            row = [part["name"], part["num_responses"], *map(part.get, names), f"{part['mean_reward']:.2f}"]
            rows.append([*row, f"{part['mean_words']:.1f} [{low:.1f}, {high:.1f}]", part["repeated_trigrams"], fired])
        return Table(header, rows)

    def figure(self) -> Figure:
        """The map of the latents; `steps_figure` draws the course over several candidates."""
        return map_figure(self.points)

    @cached_property
    def places(self) -> dict[str, list[Any]]:
        """Columns ``kind``, and ``x`` and ``y`` on a t-SNE map for a random part of each set, else ``None``."""
        sets = np.array(self.responses["set"])
        rng = np.random.default_rng(self.seed)
        parts = [np.flatnonzero(sets == name) for name in dict.fromkeys(self.responses["set"])]
        most = self.settings["map_points"]
        rows = np.concatenate([np.sort(rng.choice(part, min(len(part), most), replace=False)) for part in parts])
        values = self.values[rows]
        # Equal scales, so that no dimension rules the map by its unit.
        values = (values - values.mean(axis=0)) / np.maximum(values.std(axis=0), 1e-12)
        perplexity = min(30.0, (len(rows) - 1) / 3)
        placed = TSNE(perplexity=perplexity, init="pca", random_state=self.seed).fit_transform(values)
        kinds = np.where(np.array(self.responses["tail_probability"]) < self.settings["alpha"], "outlier", "candidate")
        columns: dict[str, list[Any]] = {"kind": np.where(sets == REFERENCE, "reference", kinds).tolist()}
        for axis, coordinates in zip("xy", placed.round(3).T.tolist(), strict=True):
            place_of = dict(zip(rows.tolist(), coordinates, strict=True))
            columns[axis] = [place_of.get(row) for row in range(len(sets))]
        return columns

    @property
    def points(self) -> dict[str, list[Any]]:
        """What the map shows of the placed rows; outliers last, so that they are drawn over the others."""
        columns = {**self.responses, **self.places}
        rows = [row for row, x in enumerate(columns["x"]) if x is not None]
        rows.sort(key=lambda row: columns["kind"][row] == "outlier")
        names = ("x", "y", "kind", "set", "reward", "response", *(("hacked",) if "hacked" in columns else ()))
        points = {name: [columns[name][row] for row in rows] for name in names}
        return points | {"response": [shortened(text, _SHOWN_CHARACTERS) for text in points["response"]]}

    def steps_figure(self) -> Figure:
        """Every statistic, mean reward and length over the candidates (arXiv:2402.09345, Fig. 8 and 14)."""
        candidates = self.candidates
        places = list(range(len(candidates)))
        panels = {statistic.title: statistic.name for statistic in STATISTICS}
        panels |= {"mean reward": "mean_reward", "mean words": "mean_words"}
        num_rows = (len(panels) + 1) // 2
        figure = Figure(figsize=(9.5, 3.2 * num_rows), layout="constrained")
        for place, (title, name) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(num_rows, 2, place)
            values = np.array([part[name] for part in candidates])
            axes.plot(places, values, "o-", color=_COLORS["outlier"])
            if f"{name}_interval" in candidates[0]:
                low, high = np.array([part[f"{name}_interval"] for part in candidates]).T
                axes.fill_between(places, low, high, color=_COLORS["outlier"], alpha=0.2, linewidth=0)
            if name in self.null:
                axes.axhspan(*self.null[name]["interval"], color="grey", alpha=0.25, linewidth=0)
            if name in self.reference:
                axes.axhline(self.reference[name], color="grey", linewidth=0.9)
            for step, part in zip(places, candidates, strict=True):
                if part.get("stop"):
                    axes.axvline(step, color="grey", linestyle="--", linewidth=0.9)
            axes.set_title(title)
            axes.set_xticks(places, [part["name"] for part in candidates], rotation=30, ha="right", fontsize=8)
        return figure

    def notes(self) -> list[str]:
        """Whose latents these are, what was measured and comes by chance, and how far to trust it."""
        null = self.null
        by_chance = [f"{each.title} {format_interval(null[each.name]['interval'])}" for each in STATISTICS]
        texts = [
            f"Latents: {'InfoRM latent means' if self.kind == 'latent' else 'hidden states'} of {self.model}, "
            f"{self.dimensions} dimensions, DBSCAN eps {self.eps:.3g}.",
            "; ".join(f"{each.title}: {each.meaning}" for each in STATISTICS) + ".",
            f"False alarms: halves of the reference against each other, {null['splits']} times, give "
            f"{', '.join(by_chance)} (95 % of the splits).",
        ]
        parts = {"reference": self.reference, **{part["name"]: part for part in self.candidates}}
        left_out = [f"{part['bad_rows']} of {name}" for name, part in parts.items() if part.get("bad_rows")]
        if left_out:
            texts.append(f"Bad rows left out: {', '.join(left_out)}.")
        if self.kind != "latent":
            texts.append(
                "This model has no latent space of its own. For hidden states of ordinary reward models the authors "
                "find that overoptimized responses do not stand out (arXiv:2402.09345, appendix F): read CSI with "
                "care."
            )
        return [*texts, MOP_DIFFERS]

    def _blocks(self) -> list[Block]:
        outliers = [
            (part["name"], shortened(row["prompt"], _SHOWN_CHARACTERS), shortened(row["response"], _SHOWN_CHARACTERS),
             f"{row['reward']:.2f}", f"{row['squared_mahalanobis']:.1f}", f"{row['tail_probability']:.1e}")
            for part in self.candidates for row in part["most_outlying"]
        ]  # fmt: skip
        blocks: list[Block] = [self.table(), *self.notes()]
        if any("labels" in part for part in self.candidates):
            blocks += [Heading("Outliers and labels"), self._label_table(), _LABEL_NOTE]
        caption = MAP_CAPTION + (LABELLED_CAPTION if "hacked" in self.responses else "")
        if len(self.candidates) > 1:
            blocks.append(Image(figure_png(self.steps_figure()), STEPS_CAPTION, "steps.png"))
        # The map shows a response when a point is pointed at; its image is for pages without scripts.
        return [
            *blocks, Heading("Map"), PointMap(self.points, _COLORS), self._drawn(caption, "map.png"),
            Heading("The most outlying responses"), Table(_OUTLIER_HEADER, outliers, align="lllrrr"),
        ]  # fmt: skip

    def _label_table(self) -> Table:
        """How far the outliers of each statistic are the responses that are labelled as exploiting a reward."""
        rows = []
        for part in self.candidates:
            for statistic in STATISTICS if "labels" in part else ():
                found, labelled = part["labels"]["statistics"][statistic.name], part["labels"]["labelled"]
                shares = [found.get(f"{name}{end}") for name in ("precision", "recall") for end in ("", "_interval")]
                counts = [found[name] for name in ("hacked", "outliers", "both")]
                rows.append([part["name"], statistic.title, labelled, *counts, *shares])
        return Table(_LABEL_HEADER, rows, align="ll" + "r" * 8)


def map_figure(points: dict[str, list[Any]]) -> Figure:
    """The map of arXiv:2402.09345, Fig. 7, from ``x``, ``y``, ``kind`` and, if known, ``hacked`` of each point.

    Labels are shapes and edges, so that the colour-blind and a grey print tell them apart.
    """
    figure = Figure(figsize=(6.8, 5.6), layout="constrained")
    axes = figure.subplots()
    x, y, kinds = (np.array(points[name]) for name in ("x", "y", "kind"))
    labels = np.array(points.get("hacked", [None] * len(x)), dtype=object)
    shapes: Any = (  # label, marker, its settings, and what the legend says of it
        (None, "o", {"s": 10}, ""), (False, "o", {"s": 26, "edgecolors": "black", "linewidths": 0.7}, "labelled fine"),
        (True, "^", {"s": 40, "edgecolors": "black", "linewidths": 0.7}, "labelled as exploiting a reward"),
    )  # fmt: skip
    for kind, color in _COLORS.items():
        mask = kinds == kind
        if not mask.any():
            continue
        axes.scatter([], [], s=10, c=color, label=f"{kind} ({mask.sum()})")
        for label, marker, look, _ in shapes:
            part = mask & np.array([each is label for each in labels])
            axes.scatter(x[part], y[part], c=color, marker=marker, **look)
    for label, marker, look, text in shapes:
        number = sum(each is label for each in labels)
        if text and number:
            axes.scatter([], [], c="white", marker=marker, label=f"{text} ({number})", **look)
    axes.set(xticks=[], yticks=[])
    axes.legend()
    return figure
