"""One page kit: what stands on a page in order, written as self-contained HTML or as Markdown.

Every text is plain text; escaping happens here and in the templates, nowhere else.
"""

import base64
import html
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A figure is drawn twice, for light and for dark pages; the browser picks.
_LIGHT = {"figure.facecolor": "#ffffff", "axes.facecolor": "#ffffff"}
_DARK = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), "#15181b"),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#d7dadd"),
    "legend.edgecolor": "#3b4148",
}
_PLAIN = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
# An underscore before a letter, as most names have it, ends nothing in Markdown.
# A bracket means something only where what follows makes it a link; "[0.490, 0.943]" stays legible as it is.
_MARKED = re.compile(r"[\\`*|~#]|\](?=[(\[:])|_+(?![^\W_])")
_MARKED_IN_LABEL = re.compile(r"[\[\]]|" + _MARKED.pattern)
_LIST_START = re.compile(r"^(?:[-+]|\d+[.)](?=\s|$))")


@dataclass(frozen=True)
class Heading:
    """A heading below the page's title."""

    text: str


@dataclass(frozen=True)
class Note:
    """A paragraph that steps back: how to read what stands above it."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table; every value is shown by `cell_text`.

    Attributes:
        header: one name a column.
        rows: one value a column.
        align: one letter a column, ``l`` for words and ``r`` for numbers; numbers in all columns but the first if
            empty.
        caption: what the table is about, where the text before it does not say.

    Raises:
        ValueError: a row or ``align`` has another length than the header.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    align: str = ""
    caption: str = ""

    def __post_init__(self) -> None:
        lengths = {len(row) for row in self.rows} | {len(self.columns)}
        if lengths != {len(self.header)}:
            raise ValueError(f"a table of {len(self.header)} columns has rows or alignment of {sorted(lengths)}.")

    @property
    def columns(self) -> str:
        """Alignment of every column."""
        return self.align or "l" + "r" * (len(self.header) - 1)

    def cells(self) -> list[list[str]]:
        """The rows as they are shown."""
        return [[cell_text(value) for value in row] for row in self.rows]

    def html(self) -> str:
        """The table alone, as a notebook shows it."""
        return _templates(is_html=True).get_template("table.html.j2").render(block=self)


@dataclass(frozen=True)
class Image:
    """A drawing.

    Attributes:
        png: the image, for pages of both themes if ``dark_png`` is missing.
        caption: also its alternative text.
        file: its name beside a Markdown page, which shows no image without one.
        dark_png: the image on a dark page.
        is_wide: keep it legible on a phone; it scrolls in a box of its own there.
    """

    png: bytes
    caption: str
    file: str = ""
    dark_png: bytes | None = None
    is_wide: bool = False


@dataclass(frozen=True)
class PointMap:
    """Points that show their text when pointed at; in HTML only, and the one block with a script.

    Attributes:
        points: columns ``x``, ``y``, ``kind``, ``set``, ``reward`` and ``response`` of equal length; with labels also
            ``hacked``: true (a triangle), false (a black edge) or ``None``.
        colors: kind to colour.
    """

    points: Mapping[str, Sequence[Any]]
    colors: Mapping[str, str]


Block = str | Heading | Note | Table | Image | PointMap  # a string is a paragraph


@dataclass(frozen=True)
class Page:
    r"""A title and what stands below it, in order.

    Example:
        >>> print(Page("A|B", ["Two pairs.", Table(("name", "accuracy"), [("all", 0.5)])]).markdown())
        # A\|B
        <BLANKLINE>
        Two pairs.
        <BLANKLINE>
        | name | accuracy |
        |:---|---:|
        | all | 0.500 |
        <BLANKLINE>
    """

    title: str
    blocks: Sequence[Block]

    def html(self) -> str:
        """A page without outside files that follows the reader's theme and fits a phone."""
        return _templates(is_html=True).get_template("page.html.j2").render(page=self)

    def markdown(self) -> str:
        """The same as Markdown, without what only HTML can show; its images are files beside it."""
        parts = [f"# {markdown_text(self.title)}", *map(_markdown_block, self.blocks)]
        return "\n\n".join(filter(None, parts)) + "\n"


def cell_text(value: Any) -> str:
    """How a value stands in a table: a float with three decimals, an interval as ``0.490 to 0.943``, nothing for None.

    Example:
        >>> [cell_text(value) for value in (0.25, (0.1, 0.5), 3, None, "1e-05")]
        ['0.250', '0.100 to 0.500', '3', '', '1e-05']
    """
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(part, int | float) for part in value):
        return format_interval(value)
    return "" if value is None else str(value)


def format_interval(interval: Sequence[float]) -> str:
    """``0.490 to 0.943``."""
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


def with_interval(value: float, interval: Sequence[float], sign: str = "") -> str:
    """``0.750 [0.490, 0.943]``; signs are shown for ``sign="+"``."""
    low, high = interval
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def words_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A table of words alone, such as settings: values as Python writes them, lists by their entries."""
    shown = [[_setting_text(value) for value in row] for row in rows]
    return Table(header, shown, align="l" * len(header))


def settings_table(*settings: Mapping[str, Any]) -> Table:
    """One row a setting."""
    return words_table(("setting", "value"), [row for part in settings for row in part.items()])


def _setting_text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def figure_png(figure: "Figure") -> bytes:
    """The figure as a PNG file's bytes, drawn without a display."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def themed_image(draw: Callable[[], "Figure"], caption: str) -> Image:
    """A figure drawn for light and for dark pages; ``draw`` is called for each."""
    import matplotlib as mpl

    drawn = []
    for colors in (_LIGHT, _DARK):
        settings: Any = {**_PLAIN, **colors}
        with mpl.rc_context(settings):
            drawn.append(figure_png(draw()))
    return Image(drawn[0], caption, dark_png=drawn[1])


def png_data_uri(png: bytes) -> str:
    """The image as text for an ``src`` attribute, so that a page needs no second file."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


class Markdown(str):
    """Text that is Markdown already."""


def markdown_text(text: str, marked: re.Pattern[str] = _MARKED) -> Markdown:
    r"""Text on one line that is neither HTML nor a link nor code nor the end of a cell in Markdown.

    Example:
        >>> markdown_text("<b> `a|b`\n[c](d)")
        '&lt;b&gt; \\`a\\|b\\` [c\\](d)'
    """
    line = html.escape(" ".join(text.split()), quote=False)
    return Markdown(marked.sub(lambda found: "".join(f"\\{mark}" for mark in found.group()), line))


def markdown_paragraph(text: str) -> Markdown:
    """`markdown_text` at the start of a line: what begins like a list is none."""
    line = markdown_text(text)
    return Markdown(_LIST_START.sub(lambda found: f"{found.group()[:-1]}\\{found.group()[-1]}", line, count=1))


def markdown_table(table: Table) -> Markdown:
    r"""The table in Markdown, without its caption.

    Example:
        >>> print(markdown_table(Table(("name", "n"), [("a|b", 3)])))
        | name | n |
        |:---|---:|
        | a\|b | 3 |
    """
    lines = ["| " + " | ".join(map(markdown_text, line)) + " |" for line in [table.header, *table.cells()]]
    lines.insert(1, "|" + "|".join(":---" if side == "l" else "---:" for side in table.columns) + "|")
    return Markdown("\n".join(lines))


def _markdown_block(block: Block) -> str:
    match block:
        case Heading():
            return f"## {markdown_text(block.text)}"
        case Table():
            table = markdown_table(block)
            return f"{markdown_paragraph(block.caption)}\n\n{table}" if block.caption else table
        case Image():
            return f"![{markdown_text(block.caption, _MARKED_IN_LABEL)}]({block.file})" if block.file else ""
        case PointMap():
            return ""
        case _:
            return markdown_paragraph(block if isinstance(block, str) else block.text)


def fill_markdown(template: str, **values: Any) -> str:
    """Fill a template file of the package whose name ends in ``.md.j2``; values are plain text or `Markdown`."""
    return _templates(is_html=False).get_template(template).render(**values)


@cache
def _templates(is_html: bool) -> Environment:
    """Templates in which every value is escaped: as HTML, or by `markdown_text` unless it is `Markdown` already."""

    def escape_markdown(value: Any) -> Markdown:
        return value if isinstance(value, Markdown) else markdown_text(str(value))

    environment = Environment(
        loader=PackageLoader("inform_rm.util"),
        autoescape=is_html,
        finalize=None if is_html else escape_markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"data_uri": png_data_uri, "kind": lambda block: type(block).__name__}
    return environment
