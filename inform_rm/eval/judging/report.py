"""Results, plots and pages of `inform-rm judge`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from inform_rm.eval.frame import Result
from inform_rm.util.colors import BLUE, GREY, VERMILION
from inform_rm.util.page import Block, Heading, Table, settings_table, with_interval

_SHOWN = 20
_CAPTION = "Share of the judged pairs; the black dot is the win rate, a tie counting half, with its 95 % interval."
_LABEL_CAPTION = (
    "Share of the labelled responses; the black dot is the share said to exploit a reward, with its 95 % interval."
)


@dataclass(frozen=True, kw_only=True)
class JudgedResult(Result):
    """What both kinds of judging report.

    Attributes:
        judge: endpoint, model and the SHA-256 of its prompt.
        data: of each source its label, digest, rows and bad rows.
        num_unreadable: pairs or responses without a readable verdict, which no figure contains.
        unreadable: up to 1000 of them: where, why, and the end of the answers.
        asked_now: requests that were sent in this call; the other answers were known.
        tokens: ``prompt`` and ``completion`` tokens of all answers, as the server counts them.
        cost: of these, if prices were given.
    """

    judge: dict[str, Any]
    data: list[dict[str, Any]]
    num_unreadable: int
    unreadable: list[dict[str, Any]]
    asked_now: int
    tokens: dict[str, int]
    cost: float | None = None

    def _about(self) -> str:
        cost = "" if self.cost is None else f", cost {self.cost:.4g}"
        return (
            f"Judge: {self.judge['model']} at {self.judge['endpoint']}; {self.tokens['prompt']:,} prompt tokens and "
            f"{self.tokens['completion']:,} answered ones{cost}. A judge errs: compare it with people on some rows "
            "before you believe it."
        )

    def _not_readable(self) -> list[Block]:
        if not self.unreadable:
            return []
        rows = [
            (", ".join(part["where"]), part["reason"], " | ".join(text or "none" for text in part["answers"]))
            for part in self.unreadable[:_SHOWN]
        ]
        return [Heading("Not readable"), Table(("where", "why", "end of the answers"), rows, align="lll")]

    def settings_table(self) -> Table:
        """What it was computed with."""
        sources = {f"data {number}": part["source"] for number, part in enumerate(self.data, start=1)}
        prompt = {"prompt of the judge, SHA-256": self.judge["prompt_sha256"]}
        return settings_table(sources, self.settings, prompt, {"seed": self.seed}, self.versions)


@dataclass(frozen=True, kw_only=True)
class WinRateResult(JudgedResult):
    """Pairwise judgments.

    Attributes:
        num_pairs: responses with a partner to the same prompt.
        num_judged: of these with a readable verdict in both orders, or two equal responses.
        num_prompts: of these.
        wins: preferred in both orders.
        ties: all others.
        losses: the baseline was preferred in both orders.
        win_rate: ``(wins + ties / 2) / num_judged``.
        win_rate_interval: 95 %.
        interval_kind: how it was made.
        identical: pairs of equal responses, ties without a question.
        position: ``pairs`` both of whose verdicts name a place, of which the ``both_first`` place, the
            ``both_second`` place or the ``same_winner`` was named; ``first_share`` and its interval.
        mean_words: of both sides.
        unpaired: responses without a partner.
    """

    num_pairs: int
    num_judged: int
    num_prompts: int
    wins: int
    ties: int
    losses: int
    win_rate: float
    win_rate_interval: list[float]
    interval_kind: str
    identical: int
    position: dict[str, Any]
    mean_words: list[float]
    unpaired: dict[str, Any]

    title = property("Win rate of {0.data[0][source]} over {0.data[1][source]}".format)

    def table(self) -> Table:
        """Counts, win rate and position bias."""
        position = self.position
        bias = (position.get("first_share"), position.get("first_share_interval"))
        header = ("pairs", "judged", "wins", "ties", "losses", "win rate", "95 % interval", "first place preferred",
                  "95 % interval")  # fmt: skip
        row = (self.num_pairs, self.num_judged, self.wins, self.ties, self.losses, self.win_rate,
               self.win_rate_interval, *bias)  # fmt: skip
        return Table(header, [row], align="r" * len(header))

    def figure(self) -> Figure:
        """Wins, ties and losses as one bar."""
        parts = [("wins", self.wins, BLUE), ("ties", self.ties, GREY), ("losses", self.losses, VERMILION)]
        return _bar(parts, self.win_rate, self.win_rate_interval)

    def _blocks(self) -> list[Block]:
        position = self.position
        return [
            self.table(),
            f"Win rate {with_interval(self.win_rate, self.win_rate_interval)} ({self.interval_kind}) on "
            f"{self.num_judged} pairs of {self.num_prompts} prompts. Each pair was shown in both orders; where the "
            f"verdicts disagree, or one of them is a tie, it counts as a tie. {self.identical} pairs had equal "
            f"responses and were not asked about; {self.num_unreadable} could not be read and are in no figure.",
            f"Position: of {position['pairs']} pairs whose verdicts both name a place, {position['same_winner']} name "
            f"the same response, {position['both_first']} the first place in both orders, {position['both_second']} "
            "the second. A judge without this bias prefers the first place in half of its verdicts.",
            f"Mean words: {self.mean_words[0]:.1f}, of the baseline {self.mean_words[1]:.1f}. Without a partner to "
            f"the same prompt: {self.unpaired['responses']} responses, {self.unpaired['baseline']} of the baseline.",
            self._about(),
            self._drawn(_CAPTION, "win_rate.png"),
            *self._not_readable(),
        ]


@dataclass(frozen=True, kw_only=True)
class LabelResult(JudgedResult):
    """Labels of single responses.

    Attributes:
        num_responses: that were shown.
        num_labelled: with a readable verdict.
        hacked: of these, said to exploit a reward.
        share: ``hacked / num_labelled``.
        share_interval: Wilson's, 95 %.
    """

    num_responses: int
    num_labelled: int
    hacked: int
    share: float
    share_interval: list[float]

    title = property("Responses of {0.data[0][source]} that exploit a reward".format)

    def table(self) -> Table:
        """Counts and share."""
        header = ("responses", "labelled", "exploit", "share", "95 % interval")
        row = (self.num_responses, self.num_labelled, self.hacked, self.share, self.share_interval)
        return Table(header, [row], align="r" * len(header))

    def figure(self) -> Figure:
        """Both labels as one bar."""
        parts = [("exploit", self.hacked, VERMILION), ("do not", self.num_labelled - self.hacked, BLUE)]
        return _bar(parts, self.share, self.share_interval)

    def _blocks(self) -> list[Block]:
        note = (
            f"{self.num_unreadable} answers could not be read and are in no figure. The labels are in labels.jsonl; "
            "inform-rm detect --labels compares them with the outliers of the latents."
        )
        image = self._drawn(_LABEL_CAPTION, "labels.png")
        return [self.table(), note, self._about(), image, *self._not_readable()]


def _bar(parts: Sequence[tuple[str, int, str]], share: float, interval: Sequence[float]) -> Figure:
    figure = Figure(figsize=(7.5, 1.9), layout="constrained")
    axes = figure.subplots()
    total, start = sum(number for _, number, _ in parts), 0.0
    for name, number, color in parts:
        axes.barh(0, number / total, left=start, color=color, label=f"{name} ({number})", height=0.6)
        start += number / total
    low, high = interval
    sides = [[max(0.0, share - low)], [max(0.0, high - share)]]
    axes.axvline(0.5, color="grey", linestyle="--", linewidth=0.9)
    axes.errorbar(share, 0, xerr=sides, fmt="o", color="black", capsize=5, linewidth=2)
    axes.set(xlim=(0, 1), yticks=[], xlabel="share")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure
