"""Every code block of README and documentation: read by what reads it, and run where it can run.

Blocks without a language are shell. bash itself reads them, with stand-ins that write down how they were called, so
that loops, quotes, variables and comments mean what they mean to a reader. Files, flags, settings and bodies of
requests are checked; in slow tests the calls run with tiny models, in a folder that has what the pages name. What does
not run stands in `NOT_RUN`, `NOT_RUN_PAGES` or `LINES_NOT_RUN` with the reason.
"""

import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from inform_rm.cli.dispatch import main, parse
from inform_rm.cli.plan import _read as read_own_flags
from inform_rm.cli.train import read_flags
from inform_rm.training.reward_arguments import arguments_from_mapping, field_types, with_our_names

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "mkdocs.yml").is_file():
    pytest.skip("no source checkout around these tests", allow_module_level=True)

PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md")), *sorted(ROOT.glob("docs/**/*.md"))]
}
BACKBONE = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB, SERVER = "it reads the Hub or writes to it", "it needs a server of another project"
# What a call of inform-rm holds -> why it is not run. Its words are parsed all the same.
NOT_RUN = {
    r"--suite ": HUB + ", or needs whole suites; tests/eval/suites run them on made rows",
    r"--push-to |--revision |HuggingFaceH4/": HUB,
    r"--endpoint ": SERVER + "; tests/eval/judging and tests/eval/generation have one of their own",
    r"--load_in_4bit": "8B on a GPU; tests/test_recipes.py runs 4 bits on a CPU",
    r"^serve ": "it ends by Ctrl-C; the requests on its pages are sent to the same application below",
    r"^plan recipes/|recipes/shapes/": "tests/test_recipes.py runs plans of all recipes",
    r"\.\.\.|demo-output/|new=|other-eval|DIR/|FILE ": "it names what only a reader has",
    r"--labels ": "tests/eval/detection/test_detect.py has labels",
    r"--proxy runs/first runs/second": "tests/eval/best_of_n run it with fewer prompts",
    r"--gold STRONGER_MODEL": "examples/best_of_n.py is this, and is run",
    r"^train --model .*--data pairs.csv": "the start page has the same, and is run",
    r"runs/prioritized|runs/rrm": "tests/training and examples/prioritized.py run both",
    r"^train settings.yaml --seed 1": "the same run without a setting is on the page, and is run",
}
NOT_RUN_PAGES = {
    "docs/results/": "what was measured took minutes to days",
    "CONTRIBUTING.md": "make calls the tests themselves",
}
# Programs of others, of which no more is checked than that the files they are given are there.
OTHER_PROGRAMS = {"git", "pytest", "python3", ".", ".ci/run", "vllm", "transformers"}
LINES_NOT_RUN = {"trainer.push_to_hub()": HUB}  # of Python


@cache
def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of every block, also of those in lists."""
    tokens = MarkdownIt("commonmark").parse(PAGES[page].read_text(encoding="utf-8"))
    return [(token.info.strip(), token.content) for token in tokens if token.type in ("fence", "code_block")]


def fences(page: str, language: str) -> list[str]:
    return [text for name, text in blocks(page) if name == language]


def pages_with(language: str) -> list[str]:
    return [page for page in PAGES if fences(page, language)]


# bash reads a block; each call of a program ends here. PATH has nothing, and `.` and paths are functions, too.
RECORD = """PATH=/nowhere; record() { printf '%s\\0' "$@" $'\\x1e'; }
command_not_found_handle() { record "$@"; }; function . { record . "$@"; }; function cd { :; }
function .ci/run { record .ci/run; }
"""


@cache
def calls_in(text: str) -> list[list[str]]:
    """Every call of a program in a shell block, in order, as the program would get it."""
    done = subprocess.run(["/bin/bash", "-c", RECORD + text], capture_output=True, text=True, check=False)
    assert not done.stderr, f"{done.stderr}\n{text}"
    return [call.split("\0")[:-1] for call in done.stdout.split("\x1e\0") if call]


def calls(page: str) -> list[list[str]]:
    return [words for text in fences(page, "") for words in calls_in(text)]


def why_not_run(page: str, words: list[str]) -> str | None:
    if words == ["--help"]:
        return "it ends the program"
    by_page = next((why for start, why in NOT_RUN_PAGES.items() if page.startswith(start)), None)
    return by_page or next((why for pattern, why in NOT_RUN.items() if re.search(pattern, " ".join(words))), None)


def test_every_block_is_of_a_kind_that_something_reads():
    kinds = {(page, kind) for page in PAGES for kind, _ in blocks(page)}
    assert {kind for _, kind in kinds} <= {"", "python", "yaml", "diff", "csv", "text"}
    # Text is what no program reads: trees of folders, rules, equations.
    texts = {page for page, kind in kinds if kind == "text"}
    assert texts == {"docs/architecture/index.md", "docs/how-to/export.md", "docs/reference/suites.md"}


@pytest.mark.parametrize("page", pages_with(""))
def test_every_call_in_a_shell_block_is_one_that_can_be_made(page, capsys):
    for words in calls(page):
        try:
            check_call(words)
        except SystemExit:
            pytest.fail(f"{' '.join(words)}\n{capsys.readouterr().err}")
        named = [
            word for word in words if re.match(r"(recipes|benchmarks|examples|inform_rm|tests)/[\w/.-]+\.\w+$", word)
        ]
        assert [name for name in named if not (ROOT / name).is_file()] == []


def check_call(words: list[str]) -> None:
    """Fail if a program would not take these words; for each program what it can be asked about."""
    program, *rest = words
    line = " ".join(words)
    if program == "inform-rm":
        check_own(rest) if rest != ["--help"] else None
    elif program == "accelerate":
        configs = ROOT / "inform_rm/training/accelerate_configs"
        assert (configs / Path(rest[rest.index("--config_file") + 1]).name).is_file(), line
        assert rest[rest.index("-m") + 1] == "inform_rm.cli", line
        check_own(rest[rest.index("inform_rm.cli") + 1 :])
    elif program.startswith("--"):  # flags without their command
        check_own(["check-data", "--data", "d", *words])
    elif program == "python" and rest[0] == "-c":
        compile(rest[1], line, "exec")
    elif program == "python":
        source = "".join(path.read_text() for path in (ROOT / rest[0]).parent.glob(f"{Path(rest[0]).stem}*.py"))
        flags = [word for word in rest if word.startswith("--")]
        assert [flag for flag in flags if f'"{flag}"' not in source] == [], line
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert rest[0] in targets, line
    elif program == "curl":
        body = json.loads(rest[rest.index("-d") + 1])
        assert body and re.match(r"http://127\.0\.0\.1:8000/(score|classify)$", rest[0]), line
    elif program == "pip":
        assert rest[0] in ("install", "download"), line
        asked = re.search(r"\[(.*)\]", rest[-1])
        extras = re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE)
        assert asked is None or set(asked[1].split(",")) <= set(extras), line
    else:
        assert program in OTHER_PROGRAMS, f"a new program: {line}"


def check_own(words: list[str]) -> None:
    """A call of this package's command: flags and settings by the real parsers."""
    found = parse(words)
    if words[0] == "train":
        check_settings(read_flags(found.settings)[1], " ".join(words))
    if words[0] == "plan":
        check_settings(read_own_flags(found.settings)[2], " ".join(words))


def check_settings(given: dict[str, Any], where: str) -> None:
    faults: list[str] = []
    named = with_our_names(given, {}, faults)
    unknown = set(named) - set(field_types())
    assert not unknown and not faults, f"{where}: {unknown} {faults}"
    needed = {"model": "m", "data": "d", "output_dir": "o", "use_cpu": True}
    # What needs a GPU, another package or a whole configuration to be accepted is looked up by its name alone.
    elsewhere = {"bf16", "load_in_4bit", "load_in_8bit", "streaming", "push_to_hub", "report_to", "optim", "objective"}
    arguments_from_mapping({**needed, **{key: value for key, value in named.items() if key not in elsewhere}}, where)


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_yaml_is_settings(page):
    for text in fences(page, "yaml"):
        check_settings(yaml.safe_load(text), page)


@pytest.mark.parametrize("page", pages_with("diff"))
def test_what_a_diff_stands_in_is_there(page):
    """Lines that a diff keeps or takes away are in the file that it names last before them."""
    for text in fences(page, "diff"):
        source = None
        for line in text.splitlines():
            if named := re.match(r" # ((?:inform_rm|tests)/\S+\.py)", line):
                source = (ROOT / named[1]).read_text() if (ROOT / named[1]).is_file() else ""
            elif source and line[:1] in (" ", "-") and line[1:].strip():
                assert line[1:] in source, f"{page}: {line}"


def test_every_reason_for_not_running_is_needed():
    lines = [" ".join(words[1:]) for page in PAGES for words in calls(page) if words[0] == "inform-rm"]
    assert [pattern for pattern in NOT_RUN if not any(re.search(pattern, line) for line in lines)] == []
    assert [start for start in NOT_RUN_PAGES if not any(page.startswith(start) for page in PAGES)] == []
    code = "\n".join(text for page in PAGES for text in fences(page, "python"))
    assert [line for line in [*LINES_NOT_RUN, *SHORTER] if line not in code] == []


PROMPTS = [f"Name fruit {n}." for n in range(12)]
PAIRS = [{"prompt": prompt, "chosen": f"An apple, {prompt}", "rejected": "A chair."} for prompt in PROMPTS]
ROWS = [{"prompt": PROMPTS[n % 12], "response": f"An apple, {n}.", "gold": n / 7} for n in range(40)]
MODELS = {
    "tiny": (BACKBONE, "BACKBONE", "POLICY", "org/model"),
    "reward": ("org/reward-model", "A", "B", "runs/first", "runs/inform"),
}
FILES = {
    ("pairs", "held-out", "train", "test", "other", "org/pairs/train", "org/pairs/test"): PAIRS,
    ("before", "step-100", "step-200", "sft", "rlhf", "rows", "best-a", "best-b"): ROWS,
}
# The last of two equal flags counts.
_QUICK = ["--alpha", "0.1"]
MORE_FLAGS = {
    "train": ["--use_cpu", "true", "--latent_dim", "4"], "detect": _QUICK, "select": _QUICK,
    "generate": ["--num-prompts", "8", "--max-new-tokens", "8"],
}  # fmt: skip
_GRPO = "max_steps=1, max_completion_length=8, per_device_train_batch_size=4, num_generations=4, use_cpu=True"
SHORTER = {
    "learning_rate=1e-5)": "learning_rate=1e-5, max_steps=1, use_cpu=True)",
    "num_train_epochs=5,": "max_steps=1, use_cpu=True,",
    "max_steps=500, eval_steps=100,": "max_steps=1, use_cpu=True,",
    'GRPOConfig("runs/grpo")': f'GRPOConfig("runs/grpo", {_GRPO})',
    "every=50": "every=1",
    ', revision="COMMIT"': "",  # a folder has none
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    import torch
    from transformers import AutoTokenizer

    from inform_rm import InfoRMForSequenceClassification
    from inform_rm.world.backbone import write_backbone

    folder = tmp_path_factory.mktemp("models")
    write_backbone(folder / "tiny")
    torch.manual_seed(0)
    InfoRMForSequenceClassification.from_backbone(str(folder / "tiny"), latent_dim=4).save_pretrained(
        folder / "reward"
    )
    AutoTokenizer.from_pretrained(folder / "tiny").save_pretrained(folder / "reward")
    return folder


@pytest.fixture
def as_reader(models, tmp_path, monkeypatch) -> None:
    """In a folder that has what the pages name: small models under the names of large ones, and files of rows."""
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    for model, names in MODELS.items():
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).symlink_to(tmp_path / model)
    for names, rows in FILES.items():
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    csv = "".join(f'{pair["prompt"]},"{pair["chosen"]}",{pair["rejected"]}\n' for pair in PAIRS)
    for name in ("pairs", "held-out"):
        (tmp_path / f"{name}.csv").write_text("prompt,chosen,rejected\n" + csv)
    settings = {"model": BACKBONE, "data": ["pairs.jsonl"], "output_dir": "runs/first", "latent_dim": 4}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def given_to(page: str) -> dict[str, Any]:
    """Names that the Python of a page takes as known."""
    many = [PROMPTS[n % 12] for n in range(120)]  # an alpha of 0.01 needs more than 100
    written = [f"An apple, {n}." for n in range(120)]
    if page == "README.md":
        from datasets import Dataset

        tasks = Dataset.from_list([{"prompt": prompt} for prompt in many])
        return {
            "pairs": PAIRS,
            "held_out": PAIRS[:4],
            "prompts": many,
            "responses": written,
            "tasks": tasks,
            "policy": "tiny",
        }
    if page in ("docs/how-to/grpo.md", "docs/how-to/hacking.md"):
        trl = pytest.importorskip("trl")
        from datasets import Dataset

        names = {"policy": "tiny", "prompts": Dataset.from_list([{"prompt": prompt} for prompt in many])}
        args = eval(f'GRPOConfig("runs/grpo", {_GRPO})', {"GRPOConfig": trl.GRPOConfig})
        return {**names, "args": args, "prompts_before": many, "responses_before": written}
    return {}


def run_python(code: str, names: dict[str, Any], where: str) -> None:
    for long, short in {**SHORTER, **dict.fromkeys(LINES_NOT_RUN, "")}.items():
        code = code.replace(long, short)
    exec(compile(code, where, "exec"), names)


def runs_something(page: str) -> bool:
    return bool(fences(page, "python")) or any(
        words[0] == "inform-rm" and why_not_run(page, words[1:]) is None for words in calls(page)
    )


@pytest.mark.slow
@pytest.mark.usefixtures("as_reader")
@pytest.mark.parametrize("page", [page for page in PAGES if runs_something(page)])
def test_blocks_of_a_page_run_one_after_the_other(page, capsys):
    names, number = given_to(page), 0
    for kind, text in blocks(page):
        if kind == "python":
            number += 1
            run_python(text, names, f"{page}, Python block {number}")
        for words in calls_in(text) if kind == "" else ():
            if words[0] == "inform-rm" and why_not_run(page, words[1:]) is None:
                if words[1] == "generate":
                    Path(words[words.index("--output") + 1]).unlink(missing_ok=True)
                asked = ["1" if word == "10000" else word for word in words[1:]]  # steps
                done = main([*asked, *MORE_FLAGS.get(words[1], [])])
                assert done == 0, f"{' '.join(words)}\n{capsys.readouterr().err[-2000:]}"
    if page == "README.md":
        assert names["output"].kl.shape == (1,) and names["output"].reward_std.shape == (1, 1)
        assert any("csi_normalized" in line for line in names["trainer"].state.log_history)
    if page == "docs/start/ten-minutes.md":
        for name in ("first", "python"):
            assert Path(f"runs/{name}/model.safetensors").is_file()
        assert names["scorer"].score(["Name a fruit."], ["An apple."]).isfinite().all()


@pytest.mark.slow
@pytest.mark.usefixtures("as_reader")
def test_requests_on_the_pages_are_answered(monkeypatch):
    testclient, httpx = (pytest.importorskip(name) for name in ("fastapi.testclient", "httpx"))
    from inform_rm import RewardScorer
    from inform_rm.serving.app import create_app

    found = [words[1:] for page in PAGES for words in calls(page) if words[0] == "curl"]
    assert len(found) >= 4
    (client_code,) = (code for code in fences("docs/how-to/grpo.md", "python") if "httpx" in code)
    with testclient.TestClient(create_app(RewardScorer("reward")), base_url="http://127.0.0.1:8000") as client:
        for url, *words in found:
            name, value = words[words.index("-H") + 1].split(": ")
            answer = client.post(url, content=words[words.index("-d") + 1], headers={name: value})
            assert answer.status_code == 200, f"{url}: {answer.text}"
            assert answer.json()["rewards" if url.endswith("/score") else "data"]
        monkeypatch.setattr(httpx, "post", lambda url, json, timeout: client.post(url, json=json))
        names: dict[str, Any] = {}
        run_python(client_code, names, "grpo.md")
        assert len(names["served_reward"](["Name a fruit."] * 2, ["An apple.", "A chair."])) == 2
