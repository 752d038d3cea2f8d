"""Pages hold the texts that were put on them, as texts, in HTML and in Markdown, whatever the texts are."""

import ast
import base64
import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from inform_rm.util.page import (
    Heading,
    Image,
    Note,
    Page,
    PointMap,
    Table,
    cell_text,
    fill_markdown,
    settings_table,
    themed_image,
)

HOSTILE = st.sampled_from([
    "<script>alert(1)</script>", "</title>", "[a](b)", "![a](b)", "`a`", "*a* _b_ ~~c~~", "a|b\\", "\\|", "\n\n# a",
    "&lt;", "1. a", "- a", "---", "[a]: b", "<!-- a", "{{ 1 }}", "{% raw %}", "a_b __c__d_",
    "<http://a.b>", "```", "$", "\"'", "]",
])  # fmt: skip
# Control characters are no text, and readers of HTML put others in their place.
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
TEXTS = st.lists(HOSTILE | TEXT, min_size=1, max_size=4).map("".join)
PNG = b"\x89PNG"


def plain(texts):
    return [" ".join(text.split()) for text in texts]


def page_of(text):
    """A page that has the text in every place."""
    table = Table([text, "n"], [[text, text], ["", 1]], caption=text)
    return Page(text, [text, Heading(text), Note(text), table, Image(PNG, text, "a.png", PNG, is_wide=True)])


@given(TEXTS)
@settings(max_examples=60)
def test_any_text_is_the_same_text_in_every_place_of_a_page(read_page, text):
    page = read_page(page_of(text).html())
    assert page.texts["title"] == page.texts["h1"] == page.texts["h2"] == page.texts["caption"] == [text]
    assert page.texts["p"] == [text, text] and page.texts["figcaption"] == page.values("alt") == [text]
    assert page.rows == [[text, "n"], [text, text], ["", "1"]]
    allowed = (
        "html head meta title style body h1 h2 p div table caption thead tbody tr th td figure picture source img"
    )
    assert set(page.tags) <= {*allowed.split(), "figcaption"}


@given(TEXTS)
@settings(max_examples=60)
def test_any_text_is_the_same_text_on_one_line_of_markdown(read_page, text):
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    page = read_page(reader.render(page_of(text).markdown()))
    line = plain([text])
    shown = [part for part in plain(page.texts.get("p", [])) if part]
    assert plain(page.texts["h1"]) == plain(page.texts["h2"]) == line and page.values("alt") == line
    assert shown == [part for part in line * 3 if part]
    assert [plain(row) for row in page.rows] == [[*line, "n"], [*line, *line], ["", "1"]]
    assert set(page.tags) <= {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "img"}


@given(st.lists(st.lists(TEXTS, min_size=3, max_size=3), min_size=1, max_size=4))
@settings(max_examples=30)
def test_every_line_of_a_markdown_table_has_the_cells_of_its_header(rows):
    lines = Page("", [Table(("a", "b", "c"), rows)]).markdown().strip().splitlines()[-len(rows) - 2 :]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {4}


@pytest.mark.parametrize(("rows", "align"), [([["a"]], ""), ([["a", "b", "c"]], ""), ([["a", "b"]], "l")])
def test_a_ragged_table_is_refused(rows, align):
    with pytest.raises(ValueError, match="a table of 2 columns"):
        Table(("one", "two"), rows, align=align)


def test_words_stand_left_and_numbers_right(read_page):
    page = Page("", [Table(("a", "b", "c"), [("x", 1, "y")], align="lrl")])
    assert read_page(page.html()).values("class") == ["scroll", *["words"] * 4]
    assert "|:---|---:|:---|" in page.markdown()
    assert "|:---|---:|---:|" in Page("", [Table(("a", "b", "c"), [])]).markdown()


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.12345, "0.123"), (1, "1"), (True, "True"), (None, ""), (float("nan"), "nan"), ([0.1, 1], "0.100 to 1.000"),
     (["a", "b"], "['a', 'b']"), ([1.0], "[1.0]")],
)  # fmt: skip
def test_a_value_has_one_form(value, shown):
    assert cell_text(value) == shown


def test_settings_are_shown_as_they_were_given():
    table = settings_table({"rate": 5e-6, "data": ["a", "b"], "split": None}, {"none": ()})
    assert table.cells() == [["rate", "5e-06"], ["data", "a, b"], ["split", "none"], ["none", "none"]]


@given(st.lists(TEXTS, min_size=1, max_size=3))
@settings(max_examples=20)
def test_texts_of_a_point_map_are_data(read_page, texts):
    numbers = [float(number) for number in range(len(texts))]
    points = {**dict.fromkeys(("x", "y", "reward"), numbers), **dict.fromkeys(("kind", "set", "response"), texts)}
    written = Page("", [PointMap(points, {"new": "#aabbcc"})])
    page = read_page(written.html())
    data, _ = page.texts["script"]
    assert json.loads(data) == {**points, "colors": {"new": "#aabbcc"}}
    assert page.values("style") == ["color: #aabbcc", "position: relative"] and written.markdown() == "# \n"


def test_an_image_is_inside_the_page_and_a_file_beside_markdown(read_page):
    blocks = [Image(b"1", "one", "one.png"), Image(b"2", "two"), Image(b"3", "three", dark_png=b"4")]
    sources = read_page(Page("", blocks).html()).values("src", "srcset")
    prefix = "data:image/png;base64,"
    assert [base64.b64decode(source.removeprefix(prefix)) for source in sources] == [b"1", b"2", b"4", b"3"]
    assert Page("", blocks).markdown() == "# \n\n![one](one.png)\n"


def test_a_themed_image_is_drawn_for_both_themes_and_leaves_the_settings_alone(drawn):
    import matplotlib as mpl

    before, seen = dict(mpl.rcParams), []

    def draw():
        seen.append(mpl.rcParams["text.color"])
        return Figure(figsize=(1, 1))

    image = themed_image(draw, "nothing")
    assert len(set(seen)) == 2 and image.dark_png not in (None, image.png) and dict(mpl.rcParams) == before


def test_a_value_that_a_template_does_not_get_is_an_error():
    with pytest.raises(Exception, match="table"):
        fill_markdown("card_results.md.j2", notes=[])


@pytest.mark.parametrize(
    "name",
    ["hub.run_report", "hub.cards", "eval.results", "eval.decompose_report", "world.demo_report",
     *(f"eval.{room}.report" for room in ("comparison", "detection", "best_of_n", "suites"))],
)  # fmt: skip
def test_modules_that_build_pages_write_no_markup(name):
    source = Path(str(import_module(f"inform_rm.{name}").__file__)).read_text(encoding="utf-8")
    texts = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    found = [text for text in texts if isinstance(text, str) and re.search(r"</?\w+[ >]|\]\(|^\||^# |```", text)]
    assert found == []
