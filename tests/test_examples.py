"""The example scripts run as they stand, each in a fork: importing PyTorch again would take longer than they do."""

import contextlib
import runpy
import sys
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
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="no source checkout around these tests")


def run_script(name, folder, run_in_fork, *flags):
    """What it prints."""
    log = folder / "log"

    def run():
        sys.argv = [f"{name}.py", "--output", str(folder / "run"), *flags]
        with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")

    code = run_in_fork(run)
    printed = log.read_text()
    assert code == 0, printed[-3000:]
    return printed


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_as_it_stands(name, exit_code_of_fork, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if name == "grpo_with_watch":
        pytest.importorskip("trl", reason="TRL is an optional extra: pip install 'inform-rm[rl]'")
    words, files = SCRIPTS[name]
    printed = run_script(name, tmp_path, exit_code_of_fork)
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
