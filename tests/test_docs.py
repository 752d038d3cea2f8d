"""README, documentation and help: links and anchors, code and commands, pictures, and what must not stand there."""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from inform_rm.cli.dispatch import main, make_parser

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "mkdocs.yml").is_file():
    pytest.skip("no source checkout around these tests", allow_module_level=True)

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
]
# Names of papers that only those who wrote this had.
INTERNAL = re.compile(r"\bDESIGN\b|\bPLATFORM\b|\bPAPERS\.md|\bSTYLE\.md|\.\./shared|/work/")


@functools.cache
def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def inline(page: Path) -> Iterator[Token]:
    for token in tokens(page):
        yield from token.children or ()


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@functools.cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    titles = [after.content for token, after in zip(tokens(page), tokens(page)[1:], strict=False)
              if token.type == "heading_open"]  # fmt: skip
    found = set()
    for title in titles:
        text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", title)
        found.add(re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", text.strip().lower())))
    return found


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    for name in ("griffe", "latex2mathml", "mkdocs"):
        pytest.importorskip(name)
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs/hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_word_of_what_a_reader_does_not_have():
    assert [page for page in PAGES if INTERNAL.search(page.read_text(encoding="utf-8"))] == []


def test_no_such_word_in_any_help(capsys):
    for name in ["", *commands()]:
        with contextlib.suppress(SystemExit):
            main([*name.split(), "--help"])
    shown = capsys.readouterr().out
    assert shown.count("usage: inform-rm") == len(commands()) + 1
    assert INTERNAL.findall(shown) == []


def commands() -> set[str]:
    (found,) = (action for action in make_parser()._actions if getattr(action, "choices", None))
    return set(found.choices or ())


def test_links_and_anchors_resolve():
    broken = []
    for page, token in ((each, token) for each in PAGES for token in inline(each)):
        target = str(token.attrs.get("href") or token.attrs.get("src") or "")
        if not target or re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        if not found.is_file() or (anchor and anchor not in anchors(found)):
            broken.append((page_id(page), target))
    assert broken == []


def test_pages_that_code_names_exist():
    folders = ("inform_rm", "benchmarks", "examples", "tests")
    named = {
        found
        for path in (*(path for name in folders for path in (ROOT / name).rglob("*.py")), ROOT / "CHANGELOG.md")
        for found in re.findall(r"\bdocs/[\w/-]+\.(?:md|png)\b", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_every_picture_says_in_words_what_it_shows():
    texts = [(page_id(page), token.content) for page in PAGES for token in inline(page) if token.type == "image"]
    assert len(texts) > 5 and [text for text in texts if len(text[1].split()) < 4] == []


def test_no_picture_of_the_pages_is_heavy():
    pictures = list((ROOT / "docs").rglob("*.png"))
    assert len(pictures) > 5
    assert [path.name for path in pictures if path.stat().st_size > 150_000] == []


def test_figures_take_their_colours_from_one_place():
    """Matplotlib's defaults nowhere; other colours than the palette's only there and in the grounds of pages."""
    palette = (ROOT / "inform_rm/util/colors.py").read_text()
    own = {"inform_rm/util/colors.py", "inform_rm/util/page.py"}
    others = set()
    for path in (path for folder in ("inform_rm", "benchmarks") for path in (ROOT / folder).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        is_new = any(color not in palette for color in re.findall(r"\"#[0-9a-fA-F]{6}\"", source))
        if page_id(path) not in own and (is_new or re.search(r"\"C[\d{]|steelblue|tab:", source)):
            others.add(page_id(path))
    assert others == set()


def test_flags_that_are_named_exist(capsys):
    """In the text a command stands with some of its flags, and needs no more."""
    (of_name,) = (action.choices for action in make_parser()._actions if action.choices)
    for page, token in ((each, token) for each in PAGES for token in inline(each)):
        name, *flags = token.content.split()[1:] or [""]
        if token.type != "code_inline" or not token.content.startswith("inform-rm ") or name in ("train", "plan"):
            continue
        assert name in of_name or name == "--help", (page_id(page), token.content)
        try:
            of_name[name].canonical(flags) if name in of_name else None
        except SystemExit:
            pytest.fail(f"{page_id(page)}: {token.content}\n{capsys.readouterr().err}")


def test_readme_is_short_and_its_sentences_too():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    sentences: list[str] = []
    for token in tokens(ROOT / "README.md"):
        words = "".join(
            child.content if child.type in ("text", "code_inline") else " " for child in token.children or ()
        )
        sentences += re.split(r"(?<=[.!?:])\s+", words)
    assert [sentence for sentence in sentences if len(sentence.split()) > 25] == []


def test_every_result_stands_in_the_reference_with_each_of_its_fields_explained(hooks):
    page = (ROOT / "docs/reference/files.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^<!-- result: (inform_rm\.\S+) -->$", page, re.MULTILINE))
    defined, extended = set(), {"Result"}
    for path in (ROOT / "inform_rm").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name, base in re.findall(r"^class (\w+)\((\w*Result)\):", path.read_text(encoding="utf-8"), re.MULTILINE):
            defined.add(f"{module}.{name}")
            extended.add(base)
    own = {name for name in defined if name.rpartition(".")[2] not in extended or name.endswith(".EvaluationResult")}
    assert own - shown == set()
    for path in shown:
        kind = hooks.named(path)
        written = {each.name for each in dataclasses.fields(kind) if each.metadata.get("written", True)}
        assert written - set(hooks.attribute_texts(kind)) == set(), path


def test_pages_show_every_setting_command_and_flag(hooks):
    from inform_rm.training.arguments import OUR_SETTINGS

    def built(name: str) -> str:
        return hooks.on_page_markdown((ROOT / f"docs/reference/{name}.md").read_text(encoding="utf-8"))

    settings, sections = built("settings"), built("commands")
    assert re.findall(r"^\| `(\w+)` \|", settings, re.MULTILINE) == list(OUR_SETTINGS)
    assert set(re.findall(r"^## inform-rm (\S+)$", sections, re.MULTILINE)) == commands()
    assert "| `--fail-below` |" in sections and "(required)" in sections
    assert "<!--" not in settings + sections + built("files")


def test_equations_become_mathml(hooks):
    page = hooks.on_page_content(
        '<p><span class="arithmatex">\\(a &lt; b\\)</span></p><div class="arithmatex">\\[\nx^2\n\\]</div>'
    )
    assert page.count("<math") == 2 and "arithmatex" not in page and "<msup>" in page and "<mo>&#x0003C;</mo>" in page


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(hooks, tmp_path):
    build = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "-q",
        "-d",
        str(tmp_path / "site"),
        "-f",
        str(ROOT / "mkdocs.yml"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(build, capture_output=True, text=True, env=environment, check=False, timeout=600)
    assert built.returncode == 0, built.stderr[-3000:]
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(
            r'<(?:script|img|iframe|source)[^>]*\ssrc="(https?:[^"]+)"|<link[^>]*\shref="(https?:[^"]+)"', text
        )
        assert loaded == [], page
        assert "<!-- " not in re.sub(r"(?s)<(script|style|pre).*?</\1>", "", text), page
