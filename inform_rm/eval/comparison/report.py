"""Plot and pages of `inform-rm compare`."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inform_rm.util.colors import GREY, SERIES
from inform_rm.util.page import Block, Heading, Image, Page, Table, with_interval, words_table

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


def forest_figure(result: dict[str, Any]) -> Figure:
    """Forest plot: groups of rows downwards, one mark a model, accuracy on the left, difference on the right."""
    groups, names = result["groups"], list(result["models"])
    others = names[1:]
    height = min(_LARGEST_INCHES, 1.3 + len(groups) * (0.16 + _ROW_INCHES * max(1, len(names) - 1)))
    figure = Figure(figsize=(9.0 if others else 6.0, height), layout="constrained")
    panels = figure.subplots(1, 2 if others else 1, sharey=True, squeeze=False)[0]
    offsets = dict(zip(names, np.linspace(-0.3, 0.3, len(names)) if others else [0.0], strict=True))
    for number, name in enumerate(names):
        entries = [group["models"][name] for group in groups]
        places = np.arange(len(groups)) + offsets[name]
        _marks(panels[0], places, entries, "accuracy", SERIES[number % len(SERIES)], name)
        if others and name != names[0]:
            _marks(panels[1], places, entries, "difference", SERIES[number % len(SERIES)], name)
    panels[0].set(xlabel="accuracy", yticks=range(len(groups)), yticklabels=[_short(_label(part)) for part in groups])
    panels[0].set_ylim(len(groups) - 0.5, -0.5)
    if result["suite"] is None:  # items of a suite may have more than two candidates
        panels[0].axvline(0.5, color="grey", linewidth=0.8, linestyle="--")
    if others:
        panels[1].set(xlabel=f"difference to {_short(names[0])}")
        panels[1].axvline(0.0, color="grey", linewidth=0.8)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    for axes in panels:
        axes.tick_params(labelsize=8)
        for place in np.arange(1, len(groups)) - 0.5:
            axes.axhline(place, color=GREY, alpha=0.2, linewidth=0.7)
    return figure


def _marks(axes: Axes, places: Any, entries: list[dict[str, Any]], statistic: str, color: str, label: str) -> None:
    values = np.array([entry[statistic] for entry in entries])
    low, high = np.array([entry[f"{statistic}_interval"] for entry in entries]).T
    # A percentile interval may lie beside its estimate by rounding, which matplotlib refuses to draw.
    errors = np.maximum([values - low, high - values], 0.0)
    axes.errorbar(values, places, xerr=errors, fmt="o", ms=4, capsize=2, color=color, label=_short(label))


def comparison_table(result: dict[str, Any]) -> Table:
    """Every group of rows, one line a model; columns in which nothing was measured are left out."""
    header = ("rows", "n", "model", "accuracy", "difference", "gained, lost", "McNemar p (Holm)")
    table = []
    for group in result["groups"]:
        of_group = (_label(group), str(group["num_rows"]))
        for name, entry in group["models"].items():
            line = [*of_group, name, _with_interval(entry, "accuracy"), _with_interval(entry, "difference", sign="+")]
            of_group = ("", "")
            test = entry.get("mcnemar")
            line.append(f"{test['gained']}, {test['lost']}" if test else "")
            line.append(f"{_p_value(test['p_value'])} ({_p_value(test['p_value_holm'])})" if test else "")
            table.append(line)
    columns = [column for column in zip(header, "lrlrrrr", *table, strict=True) if any(column[2:])]
    header, align, *rows = zip(*columns, strict=True)
    return Table(header, rows, align="".join(align))


def length_table(result: dict[str, Any]) -> Table:
    """Accuracy as it is and at equal length, for the groups whose rows are pairs of known lengths."""
    table = [
        ["" if number else _label(group), name, f"{entry['accuracy']:.3f}",
         _with_interval(entry, "length_controlled_accuracy"), f"{entry['length_coefficient']:+.2f}"]
        for group in result["groups"]
        for number, (name, entry) in enumerate(group["models"].items())
        if "length_controlled_accuracy" in entry
    ]  # fmt: skip
    return Table(["rows", "model", "accuracy", "at equal length", "length coefficient"], table, align="llrrr")


def published_table(result: dict[str, Any]) -> Table:
    """A suite's published scores: the suite and its sections, one column a model."""
    models = result["models"]
    rows = [[result["suite"], *(_score(part.get("score")) for part in models.values())]]
    sections = dict.fromkeys(name for part in models.values() for name in part["sections"])
    rows += [[name, *(_score(part["sections"].get(name)) for part in models.values())] for name in sections]
    return Table(["published score", *models], rows)


def result_page(result: dict[str, Any], flips: list[dict[str, Any]], forest_png: bytes) -> Page:
    """The result of `compare`."""
    blocks: list[Block] = [] if result["suite"] is None else [published_table(result)]
    blocks += [comparison_table(result), *_notes(result)]
    if result["limits"]:
        blocks += [Heading("Limits"), _limits_table(result)]
    caption = _CAPTION.format(result["baseline"]) if len(result["models"]) > 1 else _CAPTION_OF_ONE
    blocks.append(Image(forest_png, caption, "forest.png", is_wide=True))
    by_length = length_table(result)
    if by_length.rows:
        blocks += [Heading("At equal length"), by_length, _LENGTH_NOTE]
    shown = _flip_tables(result, flips)
    blocks += [*shown, _FLIPS_NOTE] if shown else []
    settings = [(f"data {item['source']}", item["fingerprint"][:12]) for item in result["data"] if "source" in item]
    settings += [("resamples", result["settings"]["num_resamples"]), ("seed", result["seed"])]
    settings += result["versions"].items()
    blocks += [Heading("Data and settings"), _model_table(result), words_table(("setting", "value"), settings)]
    return Page(title(result), blocks)


def title(result: dict[str, Any]) -> str:
    """Which models, on what."""
    what = "preference pairs" if result["suite"] is None else result["suite"]
    return f"{' and '.join(result['models'])} on {what}" if len(result["models"]) < 4 else f"Reward models on {what}"


def _notes(result: dict[str, Any]) -> list[str]:
    notes = []
    if len(result["models"]) > 1:
        notes.append(
            f"Differences are to {result['baseline']}, the baseline, on the same rows: 95 % paired bootstrap "
            f"intervals ({result['settings']['num_resamples']} resamples of rows). Gained: rows that the model has "
            "right and the baseline wrong; lost: the other way round. McNemar p is the exact two-sided p-value of "
            "their imbalance; Holm's, in brackets, accounts for the number of tests among all rows, among sections, "
            "and among subsets."
        )
        left_out = result["groups"][0]["models"]
        ties = {name: entry["mcnemar"]["left_out"] for name, entry in left_out.items() if "mcnemar" in entry}
        if any(ties.values()):
            counts = ", ".join(f"{name} {count}" for name, count in ties.items())
            notes.append(f"Rows with a tie or part of a credit count in the differences, not in McNemar's: {counts}.")
    notes.append(
        "Intervals of accuracies are 95 % Wilson intervals."
        + (" A tie counts half." if result["suite"] is None else " Credits of items are those of the suite; the mean "
           "credit of rows is not the published score, which weighs them in its own way.")
    )  # fmt: skip
    if not length_table(result).rows:
        why = "no group of rows consists of pairs"
        if result["suite"] is None:
            why = "the folders are of an earlier version and hold no lengths; evaluate again"
        notes.append(f"Accuracy at equal length was not measured: {why}.")
    return notes


def _limits_table(result: dict[str, Any]) -> Table:
    below = {(part["model"], part["name"]): part["value"] for part in result["below"]}
    rows = [
        [name, f"{limit:g}", model, f"below: {below[model, name]:.4f}" if (model, name) in below else "held"]
        for name, limit in result["limits"].items()
        for model in result["models"]
    ]
    return Table(["limit on", "at least", "model", "found"], rows, align="lrll")


def _flip_tables(result: dict[str, Any], flips: list[dict[str, Any]]) -> list[Block]:
    header = ["id", "subset", "change", "margin of the baseline", "margin", "change, scaled"]
    blocks: list[Block] = []
    for name, counts in result["flips"].items():
        own = [flip for flip in flips if flip["model"] == name and "margin_change" in flip]
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


def _model_table(result: dict[str, Any]) -> Table:
    rows = []
    for name, part in result["models"].items():
        settings = {key: value for key, value in part.get("settings", {}).items() if key != "data"}
        shown = ", ".join(f"{key} {value}" for key, value in settings.items())
        rows.append([name, str(part.get("model", "")), str(part.get("model_fingerprint", ""))[:12], shown])
    return words_table(["name", "model", "fingerprint", "settings of the evaluation"], rows)


def _label(group: dict[str, Any]) -> str:
    return str(group["name"]) if group["level"] != "section" else f"section {group['name']}"


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"


def _with_interval(entry: dict[str, Any], name: str, sign: str = "") -> str:
    if name not in entry:
        return ""
    return with_interval(entry[name], entry[f"{name}_interval"], sign)


def _p_value(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def _score(value: Any) -> str:
    return "incomplete" if value is None else f"{value:.4f}"
