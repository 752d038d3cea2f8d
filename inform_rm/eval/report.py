"""The page and the plot of `inform-rm evaluate`."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from inform_rm.util.colors import SKY
from inform_rm.util.page import Block, Heading, Image, Page, Table, settings_table

_LENGTH_PARTS = {
    "chosen_longer": "chosen is longer",
    "chosen_shorter": "chosen is shorter",
    "same_length": "same length",
}
_ACCURACY_HEADER = ("pairs", "n", "accuracy", "95 % interval", "ties", "accuracy, ties wrong", "mean margin")
_CAPTION = (
    "Accuracy of pairs against the predicted probability, with 95 % Wilson intervals; the dashed line is perfect."
)
_RANKING_NOTE = (
    "Kendall's tau-b is the mean over prompts of the rank correlation of rewards and labels, 0 where all rewards are "
    "equal. Top-1 accuracy: the response with the largest reward is among the best."
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
    is_ranked = "kendall_tau" in result
    intervals = "bootstraps over prompts (2,000 resamples)" if is_ranked else "Wilson intervals"
    notes = [
        "A tie (equal rewards) counts half in the accuracy, and as wrong in the column named so. "
        f"Intervals are 95 % {intervals}.",
        f"Expected calibration error (10 bins): {result['calibration']['expected_calibration_error']:.3f}.",
    ]
    if "longer_wins_accuracy" in result:
        notes.append(f'The rule "the longer response wins" has accuracy {result["longer_wins_accuracy"]:.3f} here.')
    rankings: list[Block] = [ranking_table(result), _RANKING_NOTE, Heading("Untied pairs")] if is_ranked else []
    return Page(
        f"{'Rankings by' if is_ranked else 'Accuracy of'} {result['model']}",
        [
            *rankings, accuracy_table(result), *notes, Image(reliability_png, _CAPTION, "reliability.png"),
            Heading("Data"), _data_table(result), Heading("Settings"), result_settings(result),
        ],
    )  # fmt: skip


def _data_table(result: dict[str, Any]) -> Table:
    """Counts of each source."""
    counts = [name if name in result["data"][0] else "rows_read" for name in _COUNTS]
    rows = [(item["source"], *(item[name] for name in counts), item["fingerprint"][:12]) for item in result["data"]]
    return Table(["source", *(name.replace("_", " ") for name in counts), "fingerprint"], rows)


def ranking_table(result: dict[str, Any]) -> Table:
    """A `RankingResult`: all prompts and each subset."""
    columns = (
        "num_prompts", "num_responses", "kendall_tau", "kendall_tau_interval", "top_1_accuracy",
        "top_1_accuracy_interval", "accuracy",
    )  # fmt: skip
    header = ("prompts", "n", "responses", "Kendall's tau-b", "95 % interval", "top-1 accuracy", "95 % interval",
              "accuracy of untied pairs")  # fmt: skip
    parts = {"all": result, **result.get("subsets", {})}
    return Table(header, [(name, *(part[column] for column in columns)) for name, part in parts.items()])


def score_table(result: dict[str, Any]) -> Table:
    """A `ScoreResult`: all responses and each subset."""
    columns = ("num_scored", "rmse", "mean_error", "pearson", "pearson_interval", "spearman")
    header = ("responses", "n", "RMSE", "mean error", "Pearson", "95 % interval", "Spearman")
    parts = {"all": result, **result.get("subsets", {})}
    return Table(header, [(name, *(part.get(column) for column in columns)) for name, part in parts.items()])


def score_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Rewards against scores; the dashed line is equality."""
    figure = Figure(figsize=(5.5, 5.0), layout="constrained")
    axes = figure.subplots()
    scores, rewards = ([row[name][0] for row in rows] for name in ("labels", "rewards"))
    axes.plot(scores, rewards, ".", alpha=0.4, rasterized=True)
    low, high = min(scores), max(scores)
    axes.plot([low, high], [low, high], linestyle="--", color="grey", label="reward = score")
    axes.set(xlabel="score", ylabel="reward")
    axes.legend(loc="upper left")
    return figure


def score_page(result: dict[str, Any], png: bytes) -> Page:
    """The result of `evaluate` on scored responses."""
    note = "Scores are as they were given. The interval of Pearson's correlation is Fisher's."
    return Page(
        f"Scores by {result['model']}",
        [
            score_table(result), note, Image(png, "Rewards against scores, a point a response.", "scores.png"),
            Heading("Data"), _data_table(result), Heading("Settings"), result_settings(result),
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
    counts.bar(centers, [part["num_pairs"] for part in bins], width=widths, color=SKY)
    counts.set(xlabel="predicted probability, sigmoid(|margin|)", ylabel="pairs")
    return figure
