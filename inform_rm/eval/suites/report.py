"""The page and the plot of a benchmark suite's result."""

from typing import Any

from matplotlib.figure import Figure

from inform_rm.eval.report import result_settings
from inform_rm.eval.suites.tables import Suite
from inform_rm.util.colors import BLUE, SKY
from inform_rm.util.page import Block, Heading, Image, Page, Table, format_interval

_CAPTION = "Sections that are whole (dark), then the subsets that are there (light), with 95 % intervals."


def headline(result: dict[str, Any]) -> str:
    """One sentence: the score, or that there is none, and why."""
    if result["complete"]:
        interval = f" (95 % interval {format_interval(result['interval'])})" if "interval" in result else ""
        return f"Score {result['score']:.4f}{interval} on the whole of {result['title']}."
    return f"No score: {result['title']} is incomplete here. What is there is reported by subset."


def suite_page(suite: Suite, result: dict[str, Any], plot: bytes) -> Page:
    """The result of `evaluate_suite`."""
    blocks: list[Block] = [headline(result), Image(plot, _CAPTION, "sections.png")]
    for title, table in _tables(suite, result).items():
        if table.rows:
            blocks += [Heading(title), table] if title else [table]
    half = "Equal rewards of a pair give half here, not nothing as published. "
    blocks += [
        (half if result["settings"]["ties"] == "half" else "") + suite.rule,
        "Intervals: Wilson's for subsets, a bootstrap within subsets for sections and score.",
        f"Source: {suite.citation}.",
    ]
    return Page(f"{result['title']}: {result['model']}", blocks)


def subsets_table(suite: Suite, result: dict[str, Any]) -> Table:
    """Every subset that is there."""
    rows = [
        (name, f"{part['accuracy']:.4f}", part.get("interval", "-"), part["num_items"],
         "-" if part["published_items"] is None else part["published_items"], part["num_ties"], suite.section_of(name))
        for name, part in result["subsets"].items()
    ]  # fmt: skip
    header = ("subset", "accuracy", "95 % interval", "items", "published", "ties", "section")
    return Table(header, rows, align="lrrrrrl")


def sections_figure(result: dict[str, Any]) -> Figure:
    """Horizontal bars: the score of each whole section, then the subsets."""
    bars = [(name, part["score"], part.get("interval"), BLUE) for name, part in result["sections"].items()]
    bars += [(name, part["accuracy"], part["interval"], SKY) for name, part in result["subsets"].items()]
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


def _tables(suite: Suite, result: dict[str, Any]) -> dict[str, Table]:
    """Title to table; one without rows is not shown."""
    sections = [
        (f"{name}{'' if part['weight'] else ' (beside the score)'}", f"{part['score']:.4f}", part.get("interval", "-"),
         part["num_items"])
        for name, part in result["sections"].items()
    ]  # fmt: skip
    sources = [(part["source"], part["items"], part["bad_rows"], part["fingerprint"][:12]) for part in result["data"]]
    return {
        "": Table(("section", "score", "95 % interval", "items"), sections),
        "Missing for a score": Table(("section: subset and items",), [(text,) for text in result["missing"]]),
        "Subsets": subsets_table(suite, result),
        "More of this suite": Table(("figure", "value"), _own_figures(result)),
        "Data": Table(("source", "items", "bad rows", "fingerprint"), sources),
        "Items": Table(tuple(result["counts"]), [tuple(result["counts"].values())]),
        "Settings": result_settings(result),
    }


def _own_figures(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What only some suites have."""
    own = []
    if result.get("score_with_prior_sets") is not None:
        own.append(("score with prior sets", f"{result['score_with_prior_sets']:.4f}"))
    own += [(f"Ties: {name.replace('_', ' ')}", f"{value:.4g}") for name, value in result.get("ties", {}).items()]
    if "styles" in result:
        parts = {"all domains": result["styles"], **result["styles"]["domains"]}
        cells = [(name, kind, part.get(kind)) for name, part in parts.items() for kind in ("hard", "normal", "easy")]
        own += [(f"{name}: {kind}", f"{value:.4f}") for name, kind, value in cells if value is not None]
    if "twins" in result:
        own.append((f"both of {result['twins']['num_twins']} twins right", f"{result['twins']['both_right']:.4f}"))
    return own
