"""What `inform_rm.evaluate` found, on pairs, on rankings and on scored responses."""

from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from inform_rm.eval import report
from inform_rm.eval.frame import ModelResult, unwritten
from inform_rm.util.page import Page, Table, figure_png


@dataclass(frozen=True, kw_only=True)
class EvaluationResult(ModelResult):
    """The accuracy of a reward model on preference pairs: `inform_rm.eval.accuracy.pairwise_accuracy`.

    Attributes:
        data: per source its fingerprint and counts of pairs read, not sampled, over-long, dropped, truncated and
            evaluated, the bad rows, and ``partly_rendered``: ``n`` pairs of which the chat template deleted text, and
            up to 5 ``examples``.
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

    @property
    def title(self) -> str:
        """What was evaluated."""
        return f"Accuracy of {self.model}"

    def table(self) -> Table:
        """All pairs, each subset, each part by length."""
        return report.accuracy_table(self.to_dict())

    def figure(self) -> Figure:
        """Accuracy against predicted probability."""
        return report.reliability_figure(self.calibration["bins"])

    def page(self) -> Page:
        """All of it."""
        return report.result_page(self.to_dict(), figure_png(self.figure()))


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

    @property
    def title(self) -> str:
        """What was evaluated."""
        return f"Rankings by {self.model}"

    def table(self) -> Table:
        """All prompts and each subset."""
        return report.ranking_table(self.to_dict())


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

    @property
    def title(self) -> str:
        """What was evaluated."""
        return f"Scores by {self.model}"

    def table(self) -> Table:
        """All responses and each subset."""
        return report.score_table(self.to_dict())

    def figure(self) -> Figure:
        """Rewards against scores."""
        return report.score_figure(self.rows)

    def page(self) -> Page:
        """All of it."""
        return report.score_page(self.to_dict(), figure_png(self.figure()))
