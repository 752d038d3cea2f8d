"""What `inform_rm.evaluate` found, on pairs, on rankings and on scored responses; its tables, plots and pages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from inform_rm.eval.frame import ModelResult, unwritten
from inform_rm.util.colors import SKY
from inform_rm.util.page import Block, Heading, Table

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


@dataclass(frozen=True, kw_only=True)
class EvaluationResult(ModelResult):
    """The accuracy of a reward model on preference pairs: `inform_rm.eval.accuracy.pairwise_accuracy`.

    Attributes:
        data: per source its fingerprint and counts of pairs read, not sampled, over-long, dropped, truncated and
            evaluated, the bad rows, and ``not_as_written``: ``n`` pairs that are not read as they stand, and up to 5
            ``examples``.
        num_pairs: that were evaluated.
        accuracy: share of pairs with the larger reward for the chosen response, ties half.
        accuracy_interval: 95 % Wilson interval.
        accuracy_ties_wrong: the same, ties wrong.
        accuracy_ties_wrong_interval: of that.
        num_ties: pairs with two equal rewards.
        mean_margin: mean reward of the chosen response minus that of the rejected one.
        calibration: ``expected_calibration_error``, and the ``bins`` of the reliability plot.
        by_length: the statistics of the pairs whose chosen response is the longer, the shorter, or as long.
        longer_wins_accuracy: of the rule "the longer response wins", in characters.
        subsets: the statistics by subset.
        rows: of each pair source, id, subset, lengths and rewards: the lines of ``pairs.jsonl``.
    """

    data: list[dict[str, Any]]
    num_pairs: int
    accuracy: float
    accuracy_interval: list[float]
    accuracy_ties_wrong: float
    accuracy_ties_wrong_interval: list[float]
    num_ties: int
    mean_margin: float
    calibration: dict[str, Any]
    by_length: dict[str, dict[str, Any]] | None = None
    longer_wins_accuracy: float | None = None
    subsets: dict[str, dict[str, Any]] | None = None
    rows: list[dict[str, Any]] = unwritten()

    title = property("Accuracy of {0.model}".format)

    def table(self) -> Table:
        """All pairs, each subset, each part by length."""
        parts = {"all": self.to_dict(), **(self.subsets or {})}
        parts |= {_LENGTH_PARTS[name]: part for name, part in (self.by_length or {}).items()}
        columns = ("num_pairs", "accuracy", "accuracy_interval", "num_ties", "accuracy_ties_wrong", "mean_margin")
        return Table(_ACCURACY_HEADER, [(name, *(part[column] for column in columns)) for name, part in parts.items()])

    def figure(self) -> Figure:
        """Accuracy against predicted probability."""
        return reliability_figure(self.calibration["bins"])

    def _blocks(self, intervals: str = "Wilson intervals") -> list[Block]:
        notes = [
            "A tie (equal rewards) counts half in the accuracy, and as wrong in the column named so. "
            f"Intervals are 95 % {intervals}.",
            f"Expected calibration error (10 bins): {self.calibration['expected_calibration_error']:.3f}.",
        ]
        if self.longer_wins_accuracy is not None:
            notes.append(f'The rule "the longer response wins" has accuracy {self.longer_wins_accuracy:.3f} here.')
        image = self._drawn(_CAPTION, "reliability.png")
        return [EvaluationResult.table(self), *notes, image, Heading("Data"), _data_table(self.data)]


@dataclass(frozen=True, kw_only=True)
class RankingResult(EvaluationResult):
    """How a reward model orders the responses of each prompt, against rankings.

    The fields of `EvaluationResult` are about all pairs of responses to one prompt with different labels. Such pairs
    are not independent: the 95 % intervals are bootstraps over prompts (those in ``calibration`` take pairs as they
    are). In ``subsets`` each part has all of these.

    Attributes:
        num_prompts: rankings, each with at least one such pair.
        num_responses: of all of them.
        kendall_tau: Kendall's tau-b of rewards and labels, mean over prompts; 0 where all rewards are equal.
        kendall_tau_interval: of the mean.
        top_1_accuracy: share of prompts whose response with the largest reward is among the best.
        top_1_accuracy_interval: see above.
        rows: of each ranking source, id, subset, and its responses' labels, lengths and rewards: the lines of
            ``rankings.jsonl``.
    """

    num_prompts: int
    num_responses: int
    kendall_tau: float
    kendall_tau_interval: list[float]
    top_1_accuracy: float
    top_1_accuracy_interval: list[float]

    title = property("Rankings by {0.model}".format)

    def table(self) -> Table:
        """All prompts and each subset."""
        columns = (
            "num_prompts", "num_responses", "kendall_tau", "kendall_tau_interval", "top_1_accuracy",
            "top_1_accuracy_interval", "accuracy",
        )  # fmt: skip
        header = ("prompts", "n", "responses", "Kendall's tau-b", "95 % interval", "top-1 accuracy", "95 % interval",
                  "accuracy of untied pairs")  # fmt: skip
        parts = {"all": self.to_dict(), **(self.subsets or {})}
        return Table(header, [(name, *(part[column] for column in columns)) for name, part in parts.items()])

    def _blocks(self, intervals: str = "bootstraps over prompts (2,000 resamples)") -> list[Block]:
        return [self.table(), _RANKING_NOTE, Heading("Untied pairs"), *super()._blocks(intervals)]


@dataclass(frozen=True, kw_only=True)
class ScoreResult(ModelResult):
    """How near a reward model's rewards are to scores.

    Attributes:
        data: as of `EvaluationResult`, with ``rows_read``.
        num_scored: responses.
        rmse: root mean squared difference of reward and score.
        mean_error: mean of reward minus score.
        pearson: linear correlation; ``None`` where rewards or scores do not differ.
        pearson_interval: 95 %, by Fisher's transformation.
        spearman: the same of ranks.
        subsets: the same per subset.
        rows: of each response source, id, subset, score (``labels``), length and reward: the lines of
            ``scored.jsonl``.
    """

    data: list[dict[str, Any]]
    num_scored: int
    rmse: float
    mean_error: float
    pearson: float | None = None
    pearson_interval: list[float] | None = None
    spearman: float | None = None
    subsets: dict[str, dict[str, Any]] | None = None
    rows: list[dict[str, Any]] = unwritten()

    title = property("Scores by {0.model}".format)

    def table(self) -> Table:
        """All responses and each subset."""
        columns = ("num_scored", "rmse", "mean_error", "pearson", "pearson_interval", "spearman")
        header = ("responses", "n", "RMSE", "mean error", "Pearson", "95 % interval", "Spearman")
        parts = {"all": self.to_dict(), **(self.subsets or {})}
        return Table(header, [(name, *map(part.get, columns)) for name, part in parts.items()])

    def figure(self) -> Figure:
        """Rewards against scores; the dashed line is equality."""
        figure = Figure(figsize=(5.5, 5.0), layout="constrained")
        axes = figure.subplots()
        scores, rewards = ([row[name][0] for row in self.rows] for name in ("labels", "rewards"))
        axes.plot(scores, rewards, ".", alpha=0.4, rasterized=True)
        low, high = min(scores), max(scores)
        axes.plot([low, high], [low, high], linestyle="--", color="grey", label="reward = score")
        axes.set(xlabel="score", ylabel="reward")
        axes.legend(loc="upper left")
        return figure

    def _blocks(self) -> list[Block]:
        note = "Scores are as they were given. The interval of Pearson's correlation is Fisher's."
        image = self._drawn("Rewards against scores, a point a response.", "scores.png")
        return [self.table(), note, image, Heading("Data"), _data_table(self.data)]


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


def _data_table(sources: Sequence[dict[str, Any]]) -> Table:
    """Counts of each source."""
    counts = [name if name in sources[0] else "rows_read" for name in _COUNTS]
    rows = [(item["source"], *(item[name] for name in counts), item["fingerprint"][:12]) for item in sources]
    return Table(["source", *(name.replace("_", " ") for name in counts), "fingerprint"], rows)
