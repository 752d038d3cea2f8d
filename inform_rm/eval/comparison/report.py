"""Result, plot and page of `inform-rm compare`."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inform_rm.errors import shortened
from inform_rm.eval.frame import Result, unwritten
from inform_rm.util.colors import GREY, SERIES
from inform_rm.util.page import Block, Heading, Image, Page, Table, figure_png, with_interval, words_table

_SHOWN_FLIPS = 20
_ROW_INCHES, _LARGEST_INCHES = 0.2, 120.0
_CAPTION = (
    "Left: accuracy, with 95 % Wilson intervals. Right: difference to the baseline {}, with 95 % paired bootstrap "
    "intervals; an interval that leaves out 0 is a difference beyond the choice of rows."
)
_CAPTION_OF_ONE = "Accuracy, with 95 % Wilson intervals."
_LENGTH_NOTE = (
    "At equal length: the accuracy that a logistic regression on the difference of lengths (characters) predicts for "
    "responses of equal length, with 95 % profile likelihood interval; ties as in the accuracy. Length coefficient: "
    "log odds that a chosen response gains by being much longer than the rejected one."
)
_FLIPS_NOTE = (
    "Margin: reward of the chosen minus that of the rejected response. Its change is in units of each model's root "
    "mean square margin, because reward models have no common unit. All flipped rows are in flips.jsonl."
)


@dataclass(frozen=True, kw_only=True)
class ComparisonResult(Result):
    """Several reward models on the same rows.

    Attributes:
        baseline: name of the first model.
        suite: its name; ``None`` for pairs.
        models: by name their folders, fingerprints, settings and published scores.
        groups: each ``level``, ``name``, ``num_rows`` and per model ``accuracy`` with interval, where lengths are
            known ``length_controlled_accuracy``, and against the baseline ``difference`` and, unless every row has
            part of a credit, ``mcnemar``.
        flips: by model how many rows were ``gained`` and ``lost``.
        limits: least values.
        below: what is less: ``model``, ``name``, ``value`` and ``limit``.
        data: of the baseline.
        flipped_rows: the lines of ``flips.jsonl``: rows that one of model and baseline has right, the other wrong.
    """

    baseline: str
    suite: str | None
    models: dict[str, dict[str, Any]]
    groups: list[dict[str, Any]]
    flips: dict[str, dict[str, int]]
    limits: dict[str, float]
    below: list[dict[str, Any]]
    data: list[dict[str, Any]]
    flipped_rows: list[dict[str, Any]] = unwritten()

    @property
    def title(self) -> str:
        """Which models, on what."""
        what = "preference pairs" if self.suite is None else self.suite
        return f"{' and '.join(self.models)} on {what}" if len(self.models) < 4 else f"Reward models on {what}"

    def table(self) -> Table:
        """Every group of rows, one line a model; columns in which nothing was measured are left out."""
        header = ("rows", "n", "model", "accuracy", "difference", "gained, lost", "McNemar p (Holm)")
        table = []
        for group in self.groups:
            of_group = (_label(group), str(group["num_rows"]))
            for name, entry in group["models"].items():
                difference = _with_interval(entry, "difference", sign="+") if "difference" in entry else ""
                line = [*of_group, name, _with_interval(entry, "accuracy"), difference]
                of_group = ("", "")
                test = entry.get("mcnemar")
                line.append(f"{test['gained']}, {test['lost']}" if test else "")
                line.append(f"{_p_value(test['p_value'])} ({_p_value(test['p_value_holm'])})" if test else "")
                table.append(line)
        columns = [column for column in zip(header, "lrlrrrr", *table, strict=True) if any(column[2:])]
        header, align, *rows = zip(*columns, strict=True)
        return Table(header, rows, align="".join(align))

    def figure(self) -> Figure:
        """Forest plot: groups of rows downwards, one mark a model, accuracy on the left, difference on the right."""
        names = list(self.models)
        others = names[1:]
        height = min(_LARGEST_INCHES, 1.3 + len(self.groups) * (0.16 + _ROW_INCHES * max(1, len(others))))
        figure = Figure(figsize=(9.0 if others else 6.0, height), layout="constrained")
        panels = figure.subplots(1, 2 if others else 1, sharey=True, squeeze=False)[0]
        offsets = np.linspace(-0.3, 0.3, len(names)) if others else [0.0]
        for number, (name, offset) in enumerate(zip(names, offsets, strict=True)):
            entries = [group["models"][name] for group in self.groups]
            for axes, statistic in zip(panels, ("accuracy", "difference")[: 2 if number else 1], strict=False):
                _marks(axes, offset, entries, statistic, SERIES[number % len(SERIES)], name)
        labels = [shortened(_label(group), 40) for group in self.groups]
        panels[0].set(xlabel="accuracy", yticks=range(len(labels)), yticklabels=labels)
        panels[0].set_ylim(len(labels) - 0.5, -0.5)
        if self.suite is None:  # items of a suite may have more than two candidates
            panels[0].axvline(0.5, color="grey", linewidth=0.8, linestyle="--")
        if others:
            panels[1].set(xlabel=f"difference to {shortened(names[0], 40)}")
            panels[1].axvline(0.0, color="grey", linewidth=0.8)
            figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
        for axes in panels:
            axes.tick_params(labelsize=8)
            for place in np.arange(1, len(labels)) - 0.5:
                axes.axhline(place, color=GREY, alpha=0.2, linewidth=0.7)
        return figure

    def page(self) -> Page:
        """All of it."""
        blocks: list[Block] = [] if self.suite is None else [self._published_table()]
        by_length = self._length_table()
        blocks += [self.table(), *self._notes(bool(by_length.rows))]
        if self.limits:
            blocks += [Heading("Limits"), self._limits_table()]
        caption = _CAPTION.format(self.baseline) if len(self.models) > 1 else _CAPTION_OF_ONE
        blocks.append(Image(figure_png(self.figure()), caption, "forest.png", is_wide=True))
        if by_length.rows:
            blocks += [Heading("At equal length"), by_length, _LENGTH_NOTE]
        shown = self._flip_tables()
        blocks += [*shown, _FLIPS_NOTE] if shown else []
        settings = [(f"data {item['source']}", item["fingerprint"][:12]) for item in self.data if "source" in item]
        settings += [("resamples", self.settings["num_resamples"]), ("seed", self.seed), *self.versions.items()]
        blocks += [Heading("Data and settings"), self._model_table(), words_table(("setting", "value"), settings)]
        return Page(self.title, blocks)

    def _length_table(self) -> Table:
        """Accuracy as it is and at equal length, for the groups whose rows are pairs of known lengths."""
        table = [
            ["" if number else _label(group), name, f"{entry['accuracy']:.3f}",
             _with_interval(entry, "length_controlled_accuracy"), f"{entry['length_coefficient']:+.2f}"]
            for group in self.groups
            for number, (name, entry) in enumerate(group["models"].items())
            if "length_controlled_accuracy" in entry
        ]  # fmt: skip
        return Table(["rows", "model", "accuracy", "at equal length", "length coefficient"], table, align="llrrr")

    def _published_table(self) -> Table:
        """A suite's published scores: the suite and its sections, one column a model."""
        models = self.models.values()
        rows = [[self.suite, *(_score(part.get("score")) for part in models)]]
        sections = dict.fromkeys(name for part in models for name in part["sections"])
        rows += [[name, *(_score(part["sections"].get(name)) for part in models)] for name in sections]
        return Table(["published score", *self.models], rows)

    def _notes(self, has_lengths: bool) -> list[str]:
        notes = []
        if len(self.models) > 1:
            notes.append(
                f"Differences are to {self.baseline}, the baseline, on the same rows: 95 % paired bootstrap "
                f"intervals ({self.settings['num_resamples']} resamples of rows). Gained: rows that the model has "
                "right and the baseline wrong; lost: the other way round. McNemar p is the exact two-sided p-value of "
                "their imbalance; Holm's, in brackets, accounts for the number of tests among all rows, among "
                "sections, and among subsets."
            )
            of_all = self.groups[0]["models"]
            ties = {name: entry["mcnemar"]["left_out"] for name, entry in of_all.items() if "mcnemar" in entry}
            if any(ties.values()):
                counts = ", ".join(f"{name} {count}" for name, count in ties.items())
                notes.append(
                    f"Rows with a tie or part of a credit count in the differences, not in McNemar's: {counts}."
                )
        notes.append(
            "Intervals of accuracies are 95 % Wilson intervals."
            + (" A tie counts half." if self.suite is None else " Credits of items are those of the suite; the mean "
               "credit of rows is not the published score, which weighs them in its own way.")
        )  # fmt: skip
        if not has_lengths:
            notes.append("Accuracy at equal length was not measured: no group of rows consists of pairs.")
        return notes

    def _limits_table(self) -> Table:
        below = {(part["model"], part["name"]): part["value"] for part in self.below}
        rows = [
            [name, f"{limit:g}", model, f"below: {below[model, name]:.4f}" if (model, name) in below else "held"]
            for name, limit in self.limits.items()
            for model in self.models
        ]
        return Table(["limit on", "at least", "model", "found"], rows, align="lrll")

    def _flip_tables(self) -> list[Block]:
        header = ["id", "subset", "change", "margin of the baseline", "margin", "change, scaled"]
        blocks: list[Block] = []
        for name, counts in self.flips.items():
            own = [flip for flip in self.flipped_rows if flip["model"] == name and "margin_change" in flip]
            own.sort(key=lambda flip: -abs(flip["margin_change"]))
            rows = [
                [flip["id"], flip["subset"], flip["change"], f"{flip['baseline_margin']:.3f}", f"{flip['margin']:.3f}",
                 f"{flip['margin_change']:+.2f}"]
                for flip in own[:_SHOWN_FLIPS]
            ]  # fmt: skip
            if rows:
                total = counts["gained"] + counts["lost"]
                what = f"{min(total, _SHOWN_FLIPS)} of {total} flipped rows, the largest changes of margin first"
                blocks += [Heading(f"{name}: {what}"), Table(header, rows, align="lllrrr")]
        return blocks

    def _model_table(self) -> Table:
        rows = []
        for name, part in self.models.items():
            settings = {key: value for key, value in part.get("settings", {}).items() if key != "data"}
            shown = ", ".join(f"{key} {value}" for key, value in settings.items())
            rows.append([name, str(part.get("model", "")), str(part.get("model_fingerprint", ""))[:12], shown])
        return words_table(["name", "model", "fingerprint", "settings of the evaluation"], rows)


def _marks(axes: Axes, offset: float, entries: list[dict[str, Any]], statistic: str, color: str, label: str) -> None:
    values = np.array([entry[statistic] for entry in entries])
    low, high = np.array([entry[f"{statistic}_interval"] for entry in entries]).T
    # A percentile interval may lie beside its estimate by rounding, which matplotlib refuses to draw.
    errors = np.maximum([values - low, high - values], 0.0)
    places = np.arange(len(entries)) + offset
    axes.errorbar(values, places, xerr=errors, fmt="o", ms=4, capsize=2, color=color, label=shortened(label, 40))


def _label(group: dict[str, Any]) -> str:
    return str(group["name"]) if group["level"] != "section" else f"section {group['name']}"


def _with_interval(entry: dict[str, Any], name: str, sign: str = "") -> str:
    return with_interval(entry[name], entry[f"{name}_interval"], sign)


def _p_value(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def _score(value: Any) -> str:
    return "incomplete" if value is None else f"{value:.4f}"
