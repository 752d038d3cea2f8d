"""README, documentation and help: links and anchors, code and commands, pictures, and what must not stand there."""

import contextlib
import dataclasses
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from inform_rm.cli.dispatch import main, make_parser, parse
from inform_rm.cli.plan import _read as read_own_flags
from inform_rm.cli.train import read_flags
from inform_rm.training.reward_arguments import arguments_from_mapping, field_types, with_our_names

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "mkdocs.yml").is_file():
    pytest.skip("no source checkout around these tests", allow_module_level=True)

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
]
# Names of papers that only those who wrote this had.
INTERNAL = re.compile(r"\bDESIGN\b|\bPLATFORM\b|\bPAPERS\.md|\bSTYLE\.md|\.\./shared|/work/")
BACKBONE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def inline(page: Path) -> Iterator[Token]:
    for token in tokens(page):
        yield from token.children or ()


def fences(page: Path, *languages: str) -> list[str]:
    return [token.content for token in tokens(page) if token.type == "fence" and token.info.strip() in languages]


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


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


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_no_word_of_what_a_reader_does_not_have(page):
    assert INTERNAL.findall(page.read_text(encoding="utf-8")) == []


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


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_and_anchors_resolve(page):
    broken = []
    for token in inline(page):
        target = str(token.attrs.get("href") or token.attrs.get("src") or "")
        if not target or re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        if not found.is_file() or (anchor and anchor not in anchors(found)):
            broken.append(target)
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


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_picture_says_in_words_what_it_shows(page):
    texts = [token.content for token in inline(page) if token.type == "image"]
    assert [text for text in texts if len(text.split()) < 4] == []


def test_figures_take_their_colours_from_one_place():
    own = {"inform_rm/util/colors.py", "inform_rm/util/page.py"}  # the palette; the grounds of light and dark pages
    others = [
        page_id(path)
        for path in (ROOT / "inform_rm").rglob("*.py")
        if re.search(r"\"#[0-9a-fA-F]{6}\"|\"C\d|steelblue|tab:", path.read_text(encoding="utf-8"))
    ]
    assert set(others) == own


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_compiles(page):
    for number, code in enumerate(fences(page, "python")):
        compile(code, f"{page_id(page)}, block {number}", "exec")


def commands_in_blocks(page: Path) -> list[str]:
    """What follows ``inform-rm`` on each line of a block that begins with it, or that accelerate launches."""
    lines = [line for code in fences(page, "", "bash", "sh") for line in code.replace("\\\n", " ").splitlines()]
    found = [re.match(r"\s*(?:inform-rm|accelerate launch .* -m inform_rm\.cli) (.+)", line) for line in lines]
    return [match[1] for match in found if match]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_in_blocks_parse(page, capsys):
    for line in commands_in_blocks(page):
        words = shlex.split(re.sub(r"\$\w+", "0.1", line), comments=True)
        if words == ["--help"]:
            continue
        try:
            found = parse(words)
        except SystemExit:
            pytest.fail(f"inform-rm {line}\n{capsys.readouterr().err}")
        if words[0] == "train":
            check_settings(read_flags(found.settings)[1], line)
        if words[0] == "plan":
            check_settings(read_own_flags(found.settings)[2], line)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_flags_that_are_named_exist(page, capsys):
    """In the text a command stands with some of its flags, and needs no more."""
    (of_name,) = (action.choices for action in make_parser()._actions if action.choices)
    for token in inline(page):
        name, *flags = token.content.split()[1:] or [""]
        if token.type != "code_inline" or not token.content.startswith("inform-rm ") or name in ("train", "plan"):
            continue
        assert name in of_name or name == "--help", token.content
        try:
            of_name[name].canonical(flags) if name in of_name else None
        except SystemExit:
            pytest.fail(f"{token.content}\n{capsys.readouterr().err}")


def check_settings(given: dict[str, Any], where: str) -> None:
    faults: list[str] = []
    named = with_our_names(given, {}, faults)
    unknown = set(named) - set(field_types())
    assert not unknown and not faults, f"{where}: {unknown} {faults}"
    needed = {"model": "m", "data": "d", "output_dir": "o", "use_cpu": True}
    # What needs a GPU, another package or a whole configuration to be accepted is looked up by its name alone.
    elsewhere = {"bf16", "load_in_4bit", "load_in_8bit", "streaming", "push_to_hub", "report_to", "optim", "objective"}
    arguments_from_mapping({**needed, **{key: value for key, value in named.items() if key not in elsewhere}}, where)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_settings_in_yaml_are_settings(page):
    for code in fences(page, "yaml"):
        check_settings(yaml.safe_load(code), page_id(page))


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


def run_in_order(blocks: list[str], folder: Path, backbone: Path, names: dict[str, Any]) -> dict[str, Any]:
    """The blocks of a page, one after the other in one namespace, within a folder and on a small backbone."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        for number, code in enumerate(blocks):
            exec(compile(code.replace(BACKBONE, str(backbone)), f"block {number}", "exec"), names)
    finally:
        os.chdir(before)
    return names


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    from inform_rm.world.backbone import write_backbone

    folder = tmp_path_factory.mktemp("backbone")
    write_backbone(folder)
    return folder


PAIRS = [{"prompt": f"Name fruit {n}.", "chosen": f"An apple, the {n}th.", "rejected": "A chair."} for n in range(12)]


@pytest.mark.slow
def test_python_of_the_readme_runs(backbone, tmp_path):
    code = fences(ROOT / "README.md", "python")
    without_rl = [block for block in code if "trl" not in block]
    assert len(without_rl) == 2
    names = run_in_order(without_rl, tmp_path, backbone, {"pairs": PAIRS, "held_out": PAIRS[:4]})
    assert names["output"].kl.shape == (1,) and names["output"].reward_std.shape == (1, 1)

    pytest.importorskip("trl")
    from datasets import Dataset

    (rl,) = (block for block in code if "trl" in block)
    short = "max_steps=2, max_completion_length=8, per_device_train_batch_size=4, num_generations=4, use_cpu=True"
    rl = rl.replace('GRPOConfig("runs/grpo")', f'GRPOConfig("runs/grpo", {short})').replace("every=50", "every=1")
    prompts = [pair["prompt"] for pair in PAIRS] * 10  # an alpha of 0.01 needs more than 100
    given = {
        "prompts": prompts, "responses": [f"An apple, {n}." for n in range(120)], "policy": str(backbone),
        "tasks": Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
    }  # fmt: skip
    trainer = run_in_order([rl], tmp_path, backbone, given)["trainer"]
    assert any("csi_normalized" in line for line in trainer.state.log_history)


@pytest.mark.slow
def test_python_of_the_start_page_runs(backbone, tmp_path):
    rows = "".join(f'{pair["prompt"]},"{pair["chosen"]}",{pair["rejected"]}\n' for pair in PAIRS)
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\n" + rows)
    names = run_in_order(fences(ROOT / "docs/start/ten-minutes.md", "python"), tmp_path, backbone, {})
    assert (tmp_path / "train.csv").exists() and (tmp_path / "runs/python/model.safetensors").exists()
    assert names["scorer"].score(["Name a fruit."], ["An apple."]).isfinite().all()


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
