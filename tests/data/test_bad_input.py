"""Bad files, rows, settings and checkpoints through the command line: exit code, message, and nothing half-written."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from inform_rm import InfoRMForSequenceClassification
from inform_rm.cli import main

GOOD = {"prompt": "Say sun.", "chosen": "sun", "rejected": "moon"}


def row(**changes):
    return json.dumps({**GOOD, **changes}).encode()


# Content of a pairs file (or the record of its second row), and what the message must name.
BAD_DATA = {
    "broken JSON": (b'{"prompt": "a", "chosen": ', r"row 2"),
    "not an object": (b'["a", "b"]', r"row 2.*expected an object"),
    "a bare number": (b"7", r"row 2.*expected an object"),
    "missing prompt": (json.dumps({"chosen": "sun", "rejected": "moon"}).encode(), r"row 2.*prompt"),
    "missing rejected": (json.dumps({"prompt": "a", "chosen": "sun"}).encode(), r"row 2.*no 'rejected'"),
    "missing chosen": (json.dumps({"prompt": "a", "rejected": "sun"}).encode(), r"row 2.*no 'chosen'"),
    "empty prompt": (row(prompt=""), r"row 2.*prompt"),
    "empty response": (row(chosen=""), r"row 2.*chosen"),
    "only whitespace": (row(rejected=" \n\t "), r"row 2.*rejected"),
    "only invisible characters": (row(chosen="\u200b\ufeff"), r"row 2.*chosen"),
    "identical sides": (row(rejected="sun"), r"row 2.*Such a pair teaches nothing"),
    "number as response": (row(chosen=3), r"row 2.*chosen"),
    "null as response": (row(chosen=None), r"row 2.*chosen"),
    "number as prompt": (row(prompt=3), r"row 2.*'prompt' is int 3"),
    "NaN margin": (b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": NaN}', r"row 2.*margin"),
    "infinite margin": (b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1e999}', r"row 2.*margin"),
    "text margin": (row(margin="much"), r"row 2.*margin"),
    "unknown role": (row(prompt=[{"role": "boss", "content": "Say sun."}]), r"row 2.*'boss'"),
    "message without content": (row(prompt=[{"role": "user"}]), r"row 2.*content"),
    "empty message list": (row(prompt=[]), r"row 2.*empty list"),
    "prompt that ends with the assistant": (
        row(prompt=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
        r"row 2.*last turn of the prompt is 'assistant'",
    ),
    "sides of two kinds": (row(chosen=[{"role": "assistant", "content": "sun"}]), r"row 2.*same form"),
    "lone surrogate": (b'{"prompt": "a", "chosen": "\\ud800", "rejected": "c"}', r"row 2"),
    "bytes that are no UTF-8": (b'{"prompt": "\xff\xfe", "chosen": "b", "rejected": "c"}', r"row 2|UTF-8"),
    "tools": (row(tools=[{"name": "search"}]), r"row 2.*tools"),
}


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


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_row_is_named(case, reward_dir, tmp_path, capsys):
    content, message = BAD_DATA[case]
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(row() + b"\n" + content + b"\n")
    output = tmp_path / "out"
    refused(capsys, ["evaluate", "--model", reward_dir, "--data", path, "--output", output], message, output)


@pytest.mark.parametrize("case", ["broken JSON", "identical sides", "NaN margin"])
def test_bad_row_can_be_skipped_and_is_listed(case, reward_dir, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(row() + b"\n" + BAD_DATA[case][0] + b"\n")
    output = tmp_path / "out"
    arguments = ["evaluate", "--model", reward_dir, "--data", path, "--output", output, "--on-bad-row", "skip"]
    assert main([str(argument) for argument in arguments]) == 0
    result = json.loads((output / "result.json").read_text())
    assert result["num_pairs"] == 1
    assert "row 2" in result["data"][0]["bad_row_reasons"][0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "the file is empty"),
        ("pairs.txt", b"hello", r"pairs\.txt"),
        ("broken.json", b"[{", r"broken\.json"),
        ("text.json", b'"text"', r"text\.json"),
        ("plain.jsonl.gz", b"not gzip at all", r"plain\.jsonl\.gz"),
        ("cut.jsonl.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xab", r"cut\.jsonl\.gz"),
        ("pairs.parquet", b"PAR1 but no more", r"pairs\.parquet"),
        ("twice.csv", b"prompt,prompt,chosen\na,b,c\n", r"twice\.csv"),
        ("ragged.csv", b"prompt,chosen,rejected\na,b\n", r"ragged\.csv"),
        ("latin.csv", "prompt,chosen,rejected\ncafé,b,c\n".encode("latin-1"), r"latin\.csv"),
    ],
)
def test_bad_file_is_named(name, content, message, reward_dir, tmp_path, capsys):
    path = tmp_path / name
    path.write_bytes(content)
    output = tmp_path / "out"
    refused(capsys, ["evaluate", "--model", reward_dir, "--data", path, "--output", output], message, output)


def test_missing_file_is_named(reward_dir, tmp_path, capsys):
    arguments = ["evaluate", "--model", reward_dir, "--data", tmp_path / "none.jsonl", "--output", tmp_path / "out"]
    refused(capsys, arguments, r"none\.jsonl", tmp_path / "out")


def damaged(reward_dir, folder, damage):
    shutil.copytree(reward_dir, folder)
    damage(folder)
    return folder


def cut_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def change_config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def pickle_weights(folder):
    state = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def remove_tokenizer(folder):
    for path in [*folder.glob("tokenizer*"), *folder.glob("chat_template*")]:
        path.unlink()


def no_special_tokens(folder):
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for name in ("pad_token", "unk_token", "eos_token", "bos_token"):
        settings.pop(name, None)
    path.write_text(json.dumps(settings))


BAD_MODELS = {
    "truncated weights": (cut_weights, "cannot load"),
    "no safetensors file": (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "cannot load"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"no \*\.safetensors"),
    "pickled weights": (pickle_weights, "only pickled weights"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json"),
    "config that is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config"),
    "latent_dim 0": (change_config(latent_dim=0), "latent_dim must be a whole number"),
    "latent_dim x": (change_config(latent_dim="x"), "latent_dim must be a whole number"),
    "negative beta": (change_config(beta=-1), "beta must be a finite number"),
    "another latent_dim than the weights": (change_config(latent_dim=5), "score"),
    "unknown decoder": (change_config(latent_decoder="tree"), "decoder must be one of"),
    "no tokenizer": (remove_tokenizer, "tokenizer"),
    "tokenizer without special tokens": (no_special_tokens, "no pad, unk or eos token"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_checkpoint_is_refused(case, reward_dir, good_file, tmp_path, capsys):
    damage, message = BAD_MODELS[case]
    folder = damaged(reward_dir, tmp_path / "model", damage)
    output = tmp_path / "out"
    refused(capsys, ["evaluate", "--model", folder, "--data", good_file, "--output", output], message, output)


def test_causal_lm_is_no_reward_model(causal_lm_dir, good_file, tmp_path, capsys):
    arguments = ["evaluate", "--model", causal_lm_dir("llama"), "--data", good_file, "--output", tmp_path / "out"]
    refused(capsys, arguments, "reward model", tmp_path / "out")


def test_larger_vocabulary_than_embeddings_is_refused(reward_dir, tokenizer, good_file, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(reward_dir, folder)
    larger = type(tokenizer).from_pretrained(folder)
    larger.add_tokens([f"<new{number}>" for number in range(40)])
    larger.save_pretrained(folder)
    arguments = ["evaluate", "--model", folder, "--data", good_file, "--output", tmp_path / "out"]
    refused(capsys, arguments, "ids go up to", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beta", "-1"], "beta must be a finite number of at least 0"),
        (["--latent_dim", "0"], "latent_dim must be a finite number of at least 1"),
        (["--latent_dim", "x"], "latent_dim: must be a whole number, got 'x'"),
        (["--max_length", "3"], "max_length|3 tokens|longer"),
        (["--overlong", "cut"], "overlong: must be one of"),
        (["--lr_scheduler_type", "zigzag"], "zigzag"),
        (["--optim", "magic"], "magic"),
    ],
)
def test_bad_training_setting_is_refused(arguments, message, causal_lm_dir, good_file, tmp_path, capsys):
    output = tmp_path / "out"
    command = [
        "train",
        "--model",
        causal_lm_dir("llama"),
        "--data",
        good_file,
        "--output",
        output,
        "--use_cpu",
        "true",
    ]
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


def test_killed_while_exporting_leaves_no_folder_of_that_name(reward_dir, tmp_path):
    code = (
        "import os, signal, sys\n"
        "import inform_rm.hub.export as hub\n"
        "hub.add_remote_code = lambda folder: os.kill(os.getpid(), signal.SIGKILL)\n"
        "hub.export_model(sys.argv[1], sys.argv[2])\n"
    )
    command = [sys.executable, "-c", code, str(reward_dir), str(tmp_path / "hub")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -9
    assert not (tmp_path / "hub").exists()
    assert main(["export", "--model", str(reward_dir), "--output", str(tmp_path / "hub")]) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n', "row 1: no 'response'"),
        (b'{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": 3}\n', "1 of 2 rows .*row 2.*expected text"),
        (b'{"prompt": "a", "response": "b", "reward": 1}\n', "'reward' already"),
        (b"{\n", "row 1"),
        (b"", "rows"),
    ],
)
def test_bad_score_input_is_refused(content, message, reward_dir, tmp_path, capsys):
    path, output = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
    path.write_bytes(content)
    refused(capsys, ["score", "--model", reward_dir, "--input", path, "--output", output], message)
    assert not output.exists()


def test_huge_unicode_is_scored_not_mangled(reward_dir, tmp_path):
    text = "𒀀🏳️‍🌈é\u202e" * 12
    path, output = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
    path.write_text(json.dumps({"prompt": text[:10], "response": text[:14]}) + "\n")
    code = main(["score", "--model", str(reward_dir), "--input", str(path), "--output", str(output)])
    assert code == 0
    assert json.loads(output.read_text())["response"] == text[:14]


def test_longer_than_the_model_reads_is_an_error_not_a_cut(reward_dir, tmp_path, capsys):
    path, output = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": "word " * 500}) + "\n")
    refused(capsys, ["score", "--model", reward_dir, "--input", path, "--output", output], "128")
    assert not output.exists()
