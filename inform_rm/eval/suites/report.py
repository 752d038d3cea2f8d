"""The result of a benchmark suite, its page and its plot."""

from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from inform_rm.eval.frame import ModelResult, unwritten
from inform_rm.eval.suites.tables import suite_named
from inform_rm.util.colors import BLUE, SKY
from inform_rm.util.page import Block, Heading, Page, Table, format_interval

_CAPTION = "Sections that are whole (dark), then the subsets that are there (light), with 95 % intervals."


@dataclass(frozen=True, kw_only=True)
class SuiteResult(ModelResult):
    """The score of a reward model on a benchmark suite: the figures of `summarize_suite`.

    Attributes:
        title: of the suite.
        citation: of its paper and source.
        suite: its name.
        complete: nothing is missing.
        score: by the published aggregation; ``None`` where the suite is not complete.
        missing: a sentence for each lack.
        sections: of each whole one ``score``, ``num_items``, ``weight`` and ``interval``.
        subsets: of each with items ``accuracy``, ``interval``, ``num_items``, ``published_items``, ``num_ties`` and
            ``num_dropped``.
        interval: 95 %, of the score.
        score_with_prior_sets: RewardBench: the published score with its prior sets.
        prior_sets_missing: RewardBench: what of them is missing.
        ties: RewardBench 2: the parts of the section Ties.
        styles: RM-Bench: hard, normal, easy, overall and by domain.
        twins: prompt-swap: ``num_twins``, and the share of them of which both are right, ``both_right``.
        counts: items read, over-long, dropped, truncated, evaluated, those of which a correct and a wrong candidate
            become the same tokens (``indistinguishable``), and those that are not read as they stand
            (``not_as_written``).
        data: each source as `load_suite_items` describes it.
        on_hub: ``id``, ``config`` and ``split`` of the parts of the suite's data set on the Hub, wherever its items
            were read; ``None`` if it has none.
        rows: of each item the rewards of its candidates, the correct ones first, and its mark: the lines of
            ``items.jsonl``.
    """

    title: str  # type: ignore[misc]  # a class variable elsewhere
    citation: str
    suite: str
    complete: bool
    score: float | None
    missing: list[str]
    sections: dict[str, dict[str, Any]]
    subsets: dict[str, dict[str, Any]]
    counts: dict[str, int]
    data: list[dict[str, Any]]
    on_hub: list[dict[str, Any]] | None = None
    interval: list[float] | None = None
    score_with_prior_sets: float | None = None
    prior_sets_missing: list[str] | None = None
    ties: dict[str, Any] | None = None
    styles: dict[str, Any] | None = None
    twins: dict[str, Any] | None = None
    rows: list[dict[str, Any]] = unwritten()

    @property
    def headline(self) -> str:
        """One sentence: the score, or that there is none, and why."""
        if self.complete:
            interval = "" if self.interval is None else f" (95 % interval {format_interval(self.interval)})"
            return f"Score {self.score:.4f}{interval} on the whole of {self.title}."
        return f"No score: {self.title} is incomplete here. What is there is reported by subset."

    def table(self) -> Table:
        """The subsets that are there."""
        section_of = suite_named(self.suite).section_of
        rows = [
            (name, f"{part['accuracy']:.4f}", part["interval"], part["num_items"],
             "-" if part["published_items"] is None else part["published_items"], part["num_ties"], section_of(name))
            for name, part in self.subsets.items()
        ]  # fmt: skip
        header = ("subset", "accuracy", "95 % interval", "items", "published", "ties", "section")
        return Table(header, rows, align="lrrrrrl")

    def figure(self) -> Figure:
        """Horizontal bars: the score of each whole section, then the subsets."""
        bars = [(name, part["score"], part.get("interval"), BLUE) for name, part in self.sections.items()]
        bars += [(name, part["accuracy"], part["interval"], SKY) for name, part in self.subsets.items()]
        figure = Figure(figsize=(6.5, 1.0 + 0.32 * max(2, len(bars))), layout="constrained")
        axes = figure.subplots()
        for place, (_, value, interval, color) in enumerate(bars):
            axes.barh(place, value, height=0.7, color=color)
            if interval is not None:
                axes.plot(interval, [place, place], color="black", linewidth=1.2)
            axes.text(1.02, place, f"{value:.3f}", va="center", transform=axes.get_yaxis_transform())
        axes.set_yticks(range(len(bars)), [name for name, *_ in bars])
        axes.invert_yaxis()
        axes.set(xlim=(0.0, 1.0), xlabel="score")
        return figure

    def page(self) -> Page:
        """All of it."""
        suite = suite_named(self.suite)
        blocks: list[Block] = [self.headline, self._drawn(_CAPTION, "sections.png")]
        for title, table in self._tables().items():
            if table.rows:
                blocks += [Heading(title), table] if title else [table]
        half = "Equal rewards of a pair give half here, not nothing as published. "
        blocks += [
            (half if self.settings["ties"] == "half" else "") + suite.rule,
            "Intervals: Wilson's for subsets, a bootstrap within subsets for sections and score.",
            f"Source: {self.citation}.",
        ]
        return Page(f"{self.title}: {self.model}", blocks)

    def _tables(self) -> dict[str, Table]:
        """Title to table; one without rows is not shown."""
        sections = [
            (f"{name}{'' if part['weight'] else ' (beside the score)'}", f"{part['score']:.4f}",
             part.get("interval", "-"), part["num_items"])
            for name, part in self.sections.items()
        ]  # fmt: skip
        sources = [(part["source"], part["items"], part["bad_rows"], part["fingerprint"][:12]) for part in self.data]
        return {
            "": Table(("section", "score", "95 % interval", "items"), sections),
            "Missing for a score": Table(("section: subset and items",), [(text,) for text in self.missing]),
            "Subsets": self.table(),
            "More of this suite": Table(("figure", "value"), self._own_figures()),
            "Data": Table(("source", "items", "bad rows", "fingerprint"), sources),
            "Items": Table(tuple(self.counts), [tuple(self.counts.values())]),
            "Settings": self.settings_table(),
        }

    def _own_figures(self) -> list[tuple[str, str]]:
        """What only some suites have."""
        own = []
        if self.score_with_prior_sets is not None:
            own.append(("score with prior sets", f"{self.score_with_prior_sets:.4f}"))
        own += [(f"Ties: {name.replace('_', ' ')}", f"{value:.4g}") for name, value in (self.ties or {}).items()]
        if self.styles is not None:
            parts = {"all domains": self.styles, **self.styles["domains"]}
            cells = [
                (name, kind, part.get(kind)) for name, part in parts.items() for kind in ("hard", "normal", "easy")
            ]
            own += [(f"{name}: {kind}", f"{value:.4f}") for name, kind, value in cells if value is not None]
        if self.twins is not None:
            own.append((f"both of {self.twins['num_twins']} twins right", f"{self.twins['both_right']:.4f}"))
        return own
