"""The page and the plot of `inform-rm evaluate`."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from inform_rm.util.page import Heading, Image, Page, Table, settings_table

_LENGTH_PARTS = {
    "chosen_longer": "chosen is longer",
    "chosen_shorter": "chosen is shorter",
    "same_length": "same length",
}
_ACCURACY_HEADER = ("pairs", "n", "accuracy", "95 % interval", "ties", "accuracy, ties wrong", "mean margin")
_CAPTION = (
    "Accuracy of pairs against the predicted probability, with 95 % Wilson intervals; the dashed line is perfect."
)
_COUNTS = ("pairs_read", "bad_rows", "not_sampled", "overlong", "dropped", "truncated", "evaluated")


def accuracy_table(result: dict[str, Any]) -> Table:
    """A result of `pairwise_accuracy`: all pairs, each subset, each part by length."""
    parts = {"all": result, **result.get("subsets", {})}
    parts |= {_LENGTH_PARTS[name]: part for name, part in result.get("by_length", {}).items()}
    columns = ("num_pairs", "accuracy", "accuracy_interval", "num_ties", "accuracy_ties_wrong", "mean_margin")
    return Table(_ACCURACY_HEADER, [(name, *(part[column] for column in columns)) for name, part in parts.items()])


def result_page(result: dict[str, Any], reliability_png: bytes) -> Page:
    """The result of `evaluate`."""
    notes = [
        "A tie (equal rewards) counts half in the accuracy, and as wrong in the column named so. "
        "Intervals are 95 % Wilson intervals.",
        f"Expected calibration error (10 bins): {result['calibration']['expected_calibration_error']:.3f}.",
    ]
    if "longer_wins_accuracy" in result:
        notes.append(f'The rule "the longer response wins" has accuracy {result["longer_wins_accuracy"]:.3f} here.')
    rows = [(item["source"], *(item[name] for name in _COUNTS), item["fingerprint"][:12]) for item in result["data"]]
    data = Table(["source", *(name.replace("_", " ") for name in _COUNTS), "fingerprint"], rows)
    return Page(
        f"Accuracy of {result['model']}",
        [
            accuracy_table(result), *notes, Image(reliability_png, _CAPTION, "reliability.png"), Heading("Data"), data,
            Heading("Settings"), result_settings(result),
        ],
    )  # fmt: skip


def result_settings(result: dict[str, Any]) -> Table:
    """What a result was computed with: settings, seed, the model's weights and versions."""
    weights = {"model fingerprint": result["model_fingerprint"][:12]} if "model_fingerprint" in result else {}
    return settings_table(result["settings"], {"seed": result["seed"]}, weights, result["versions"])


def reliability_figure(bins: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy of pairs against predicted probability, one point a bin of `reliability_bins`, with its interval."""
    figure = Figure(figsize=(5.5, 5.0), layout="constrained")
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    confidence = [part["mean_confidence"] for part in bins]
    accuracy = [part["accuracy"] for part in bins]
    below = [part["accuracy"] - part["accuracy_interval"][0] for part in bins]
    above = [part["accuracy_interval"][1] - part["accuracy"] for part in bins]
    axes.plot([0.5, 1.0], [0.5, 1.0], linestyle="--", color="grey", label="perfectly calibrated")
    axes.errorbar(confidence, accuracy, yerr=[below, above], fmt="o-", capsize=3, label="model, 95 % interval")
    axes.set(ylabel="share of pairs ranked right", ylim=(0.0, 1.02), xlim=(0.49, 1.01))
    axes.legend(loc="lower right")
    centers = [(part["low"] + part["high"]) / 2 for part in bins]
    widths = [0.9 * (part["high"] - part["low"]) for part in bins]
    counts.bar(centers, [part["num_pairs"] for part in bins], width=widths, color="lightsteelblue")
    counts.set(xlabel="predicted probability, sigmoid(|margin|)", ylabel="pairs")
    return figure
