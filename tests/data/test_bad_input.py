"""Bad files, rows, settings and checkpoints through the command line: exit code, message, and nothing half-written."""

import json
import os
import re
import signal
from pathlib import Path

import pytest

from inform_rm import InfoRMForSequenceClassification
from inform_rm.cli import main
from inform_rm.hub.export import export_model

GOOD = {"prompt": "Say sun.", "chosen": "sun", "rejected": "moon"}


def row(**changes):
    return json.dumps({**GOOD, **changes}).encode()


@pytest.fixture
def good_file(tmp_path):
    path = tmp_path / "good.jsonl"
    path.write_bytes(row() + b"\n" + row(chosen="sea") + b"\n")
    return path


def refused(capsys, arguments, message, output=None):
    """Exit code 2, one line on stderr that matches, and an output folder with nothing in it."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    line = next(line for line in error.splitlines() if line.startswith("error: "))
    assert re.search(message, line), line
    if output is not None:
        assert not Path(output).exists() or not any(Path(output).rglob("*.json*")), list(Path(output).rglob("*"))


def test_bad_row_is_named_or_skipped_and_listed(reward_dir, tmp_path, capsys):
    path, output = tmp_path / "pairs.jsonl", tmp_path / "out"
    path.write_bytes(row() + b"\n" + row(rejected="sun") + b"\n")
    arguments = ["evaluate", "--model", reward_dir, "--data", path, "--output", output]
    refused(capsys, arguments, r"pairs\.jsonl, row 2.*Such a pair teaches nothing", output)
    assert main([str(argument) for argument in [*arguments, "--on-bad-row", "skip"]]) == 0
    result = json.loads((output / "result.json").read_text())
    assert result["num_pairs"] == 1
    assert "row 2" in result["data"][0]["bad_row_reasons"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_length", "3"], "max_length|3 tokens|longer"),
        (["--lr_scheduler_type", "zigzag"], "zigzag"),
        (["--optim", "magic"], "magic"),
    ],
)
def test_bad_training_setting_is_refused(arguments, message, causal_lm_dir, good_file, tmp_path, capsys):
    output = tmp_path / "out"
    command = ["train", "--model", causal_lm_dir("llama"), "--data", good_file, "--output", output]
    command += ["--use_cpu", "true"]
    refused(capsys, [*command, *arguments], message)
    assert not (output / "config.json").exists()


def test_no_backbone_is_refused(tmp_path, good_file, capsys):
    arguments = ["train", "--model", tmp_path, "--data", good_file, "--output", tmp_path / "out"]
    refused(capsys, arguments, "tokenizer|cannot be loaded")


def test_output_that_is_a_file_is_refused_before_any_work(reward_dir, good_file, tmp_path, capsys):
    (tmp_path / "out").write_text("keep me")
    arguments = ["evaluate", "--model", reward_dir, "--data", good_file, "--output", tmp_path / "out"]
    refused(capsys, arguments, "is a file; expected a folder")
    assert (tmp_path / "out").read_text() == "keep me"


def test_unwritable_output_is_refused(reward_dir, good_file, capsys):
    arguments = ["evaluate", "--model", reward_dir, "--data", good_file, "--output", "/proc/inform-rm"]
    refused(capsys, arguments, "cannot write to /proc/inform-rm")


def test_export_does_not_overwrite(reward_dir, tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("keep me")
    refused(capsys, ["export", "--model", reward_dir, "--output", tmp_path], "exists and is not an empty folder")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_disk_full_while_exporting_leaves_nothing(reward_dir, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(InfoRMForSequenceClassification, "save_pretrained", full)
    assert main(["export", "--model", str(reward_dir), "--output", str(tmp_path / "hub")]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_killed_while_exporting_leaves_no_folder_of_that_name(reward_dir, tmp_path, monkeypatch, exit_code_of_fork):
    def kill(folder):
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr("inform_rm.hub.export.add_remote_code", kill)
        killed = exit_code_of_fork(lambda: export_model(str(reward_dir), str(tmp_path / "hub")))
    assert killed == -signal.SIGKILL and not (tmp_path / "hub").exists()
    assert main(["export", "--model", str(reward_dir), "--output", str(tmp_path / "hub")]) == 0


def test_huge_unicode_is_scored_not_mangled(reward_dir, tmp_path):
    text = "𒀀🏳️‍🌈é\u202e" * 12
    path, output = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
    path.write_text(json.dumps({"prompt": text[:10], "response": text[:14]}) + "\n")
    code = main(["score", "--model", str(reward_dir), "--input", str(path), "--output", str(output)])
    assert code == 0
    assert json.loads(output.read_text())["response"] == text[:14]
