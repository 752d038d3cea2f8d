"""Example scripts and notebooks run as they stand, each in a fork, which spares importing PyTorch again."""

import ast
import contextlib
import json
import runpy
import sys
import traceback
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Script -> what it must print, and files that it must leave.
SCRIPTS = {
    "train_in_memory": (
        ["step 8: accuracy", "accuracy of the exported model: ", "outlying responses (MOP): "],
        ["hub/config.json", "hub/model.safetensors", "hub/README.md"],
    ),
    "prioritized": (
        ["step 8: prompt-free gap", "accuracy: ", "preference mostly about the response alone: "],
        ["model/model.safetensors", "decomposition/result.html"],
    ),
    "audit_any_model": (
        ["a reward: ", "on 64 pairs (95 % interval", "preference mostly about the response alone: "],
        ["accuracy/result.html", "decomposition/result.html"],
    ),
    "grpo_with_watch": (["step 2: CSI", "step 4: CSI", "stopped at step 4 of 4"], ["reward/config.json"]),
    "best_of_n": (
        ["the policy wrote 16 responses to each of 8 prompts", "gold peaks at n = "],
        ["result/result.html"],
    ),
    "serve_and_call": (["two responses to a prompt: {", "'num_classes': 1", "the server has ended"], []),
}
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="no source checkout around these tests")


def printed_by(function, folder, run_in_fork):
    """What it prints in a fork."""
    log = folder / "log"

    def run():
        with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                function()
            except BaseException:
                traceback.print_exc()
                raise

    code = run_in_fork(run)
    printed = log.read_text()
    assert code == 0, printed[-3000:]
    return printed


def run_script(name, folder, run_in_fork, *flags):
    """What it prints."""

    def run():
        sys.argv = [f"{name}.py", "--output", str(folder / "run"), *flags]
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")

    return printed_by(run, folder, run_in_fork)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags"),
    [*((name, ()) for name in SCRIPTS), ("train_in_memory", ("--torch-compile", "aot_eager"))],
    ids=[*SCRIPTS, "train_in_memory, compiled"],
)
def test_a_script_runs_as_it_stands(name, flags, exit_code_of_fork, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if name == "grpo_with_watch":
        pytest.importorskip("trl", reason="TRL is an optional extra: pip install 'inform-rm[rl]'")
    words, files = SCRIPTS[name]
    printed = run_script(name, tmp_path, exit_code_of_fork, *flags)
    for text in words:
        assert text in printed
    assert [file for file in files if not (tmp_path / "run" / file).is_file()] == []


@pytest.mark.slow
def test_best_of_n_takes_a_real_language_model(shared_dir, exit_code_of_fork, tmp_path):
    policy = shared_dir / "models" / "stories260K"
    printed = run_script("best_of_n", tmp_path, exit_code_of_fork, "--policy", str(policy))
    assert "the policy wrote 16 responses to each of 8 prompts" in printed


def test_every_script_is_run_and_says_what_it_needs():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SCRIPTS)
    for path in EXAMPLES.glob("*.py"):
        first = path.read_text().split('"""')[1]
        assert f"python examples/{path.name} --output " in first and "second" in first and "Needs" in first, path.name


def cells_of(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def run_cell(source, names):
    """Run a cell; its last line, if it is an expression, is shown as a notebook shows it."""
    body = ast.parse(source).body
    last = ast.Expression(body.pop().value) if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    if last is not None:
        shown = eval(compile(last, "cell", "eval"), names)
        getattr(shown, "_repr_html_", shown.__repr__)()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, exit_code_of_fork, tmp_path):
    if "trl" in path.read_text():
        pytest.importorskip("trl", reason="TRL is an optional extra: pip install 'inform-rm[rl]'")

    def run():
        names = {"__name__": "__main__"}
        for cell in cells_of(path):
            run_cell("".join(cell["source"]), names)

    printed_by(run, tmp_path, exit_code_of_fork)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_saved_with_outputs_without_errors_and_small(path):
    cells = cells_of(path)
    first = "".join(json.loads(path.read_text())["cells"][0]["source"])
    assert "Needs" in first and "seconds" in " ".join(first.split())
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))  # at one go
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert len(outputs) >= 3
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert path.stat().st_size < 100_000


def test_there_are_three_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["load_and_score", "train_and_look_inside", "watch_a_grpo_run"]
