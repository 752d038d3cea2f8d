"""The command line end to end on tiny models: exit codes, messages, files."""

import io
import json
import re
import subprocess
import sys

import pytest
from transformers import AutoModelForSequenceClassification

from inform_rm.cli import main
from inform_rm.cli.train import read_flags


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "pairs.jsonl"
    rows = [
        {"prompt": f"Say {word}.", "chosen": word, "rejected": word + "!", "subset": "ab"[index % 2]}
        for index, word in enumerate(["sun", "moon", "sea", "sky", "tree", "bird", "rain", "snow"])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trained(causal_lm_dir, pairs_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli-run") / "run"
    code = main(
        ["train", "--model", str(causal_lm_dir("llama")), "--data", str(pairs_file), "--output", str(folder),
         "--latent_dim", "4", "--max_steps", "2", "--use_cpu", "true", "--per_device_train_batch_size", "4",
         "--gradient_accumulation_steps", "1"]
    )  # fmt: skip
    assert code == 0
    return folder


def test_simulate_names_proxies_by_folder_or_as_told(trained, causal_lm_dir, pairs_file, tmp_path, capsys):
    command = ["simulate", "--data", str(pairs_file), "--policy", str(causal_lm_dir("llama")), "--max-new-tokens", "4",
               "--gold", str(trained), "--num-prompts", "3", "--num-responses", "4", "--output", str(tmp_path / "out"),
               "--proxy", str(trained), f"again={trained}"]  # fmt: skip
    assert main(command) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert list(result["proxies"]) == ["run", "again"] and result["ns"] == [1, 2, 4]
    assert result["proxies"]["run"] == result["proxies"]["again"]
    assert "again: gold peaks at n = " in capsys.readouterr().out
    assert main([*command, "--proxy", str(trained), str(trained)]) == 2
    assert "two models have the same name" in capsys.readouterr().err


def test_train_evaluate_score_export_in_a_row(trained, pairs_file, tmp_path, capsys):
    assert main(["evaluate", "--model", str(trained), "--data", str(pairs_file), "--output", str(tmp_path / "e")]) == 0
    result = json.loads((tmp_path / "e" / "result.json").read_text())
    assert result["num_pairs"] == 8
    *_, found, done = capsys.readouterr().out.splitlines()
    assert found.startswith(f"accuracy {result['accuracy']:.4f} on 8 pairs")
    assert done == f"evaluated 8 pairs; see {tmp_path}/e/result.html"
    assert {"result.json", "result.md", "reliability.png", "pairs.jsonl"} <= {
        p.name for p in (tmp_path / "e").iterdir()
    }

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "Say sun.", "response": text}) + "\n" for text in ("sun", "moon")))
    out = tmp_path / "scored.jsonl"
    arguments = ["score", "--model", str(trained), "--input", str(rows), "--output", str(out)]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"scored 2 rows, 0 bad rows without a reward; see {out}\n"
    assert main([*arguments, "--uncertainty", "8"]) == 0
    assert f"{out} exists and is replaced at the end; another --output keeps it\n" in capsys.readouterr().out
    scored = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["response"] for row in scored] == ["sun", "moon"]
    assert all(row["reward_std"] > 0 for row in scored)

    assert main(["export", "--model", str(trained), "--output", str(tmp_path / "hub")]) == 0
    assert "model.safetensors" in (printed := capsys.readouterr().out)
    assert re.search(rf"exported \d+ files, [\d,]+ bytes; see {tmp_path}/hub\n$", printed)
    assert not (tmp_path / "hub" / "train_result.json").exists()
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hub").state_dict()
    original = AutoModelForSequenceClassification.from_pretrained(trained).state_dict()
    assert all((exported[name] == original[name]).all() for name in original)
    for folder in (trained, tmp_path / "hub"):  # whoever may read the config may read the weights
        assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_check_data_prints_and_writes(causal_lm_dir, pairs_file, tmp_path, capsys):
    arguments = ["check-data", "--data", str(pairs_file), "--tokenizer", str(causal_lm_dir("llama"))]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    done = f"checked 8 rows, 0 that training would stop at; see {tmp_path}/preflight.json\n"
    assert capsys.readouterr().out.endswith(done) and (tmp_path / "preflight.json").is_file()
    assert main([*arguments, "--max-length", "16"]) == 1
    assert "Rows that training with default settings would stop at: 1" in capsys.readouterr().out


def test_a_terminal_that_is_not_utf8_shows_escapes(pairs_file, tmp_path, monkeypatch):
    path = tmp_path / "paires-\u00e9.jsonl"
    path.write_bytes(pairs_file.read_bytes())
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["check-data", "--data", str(path)]) == 0
    stdout.seek(0)
    assert "paires-\\xe9.jsonl" in stdout.read()


def test_wrong_use_exits_with_2_and_one_line(tmp_path, capsys):
    assert main(["train", "--model", "m", "--data", "d", "--output", str(tmp_path / "o"), "--beta", "-1"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "beta must be a finite number of at least 0" in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_train_ends_with_what_was_made_and_where(tmp_path, monkeypatch, capsys):
    result = {"evaluation": None, "steps": 2, "train_pairs": {"pairs": 8}}
    monkeypatch.setattr("inform_rm.training.run.train", lambda args: result)
    assert main(["train", "--model", "m", "--data", "d", "--output", f"{tmp_path}/o"]) == 0
    budget, done = capsys.readouterr().out.splitlines()
    assert budget.startswith("beta 0.1 pays for at most 3.47 nats a response")
    assert done == f"trained a reward model in 2 steps on 8 pairs; see {tmp_path}/o"
    result |= {"budget": {"nats_per_response": 3.47, "flip_rate_at_most": 0.25, "flip_rate_limit": 0.29,
                          "nats_per_response_at_that": 0.65}}  # fmt: skip
    assert main(["train", "--model", "m", "--data", "d", "--output", f"{tmp_path}/o"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("labels: at most 25 % can be wrong at random")
    assert main(["train", "--model", "m", "--data", "d", "--output", f"{tmp_path}/o", "--architecture=standard"]) == 0
    assert not capsys.readouterr().out.startswith("beta")


def test_flags_of_train_may_be_dashed_bare_and_named_as_in_trl():
    words = ["a.yaml", "--model_name_or_path", "m", "--per-device-train-batch-size=4", "--bf16", "--data", "a", "b"]
    assert read_flags(words) == (
        "a.yaml",
        {"model_name_or_path": "m", "per_device_train_batch_size": "4", "bf16": True, "data": ["a", "b"]},
    )


def test_flags_of_train_that_are_unknown_misplaced_or_doubled_are_refused(tmp_path, capsys):
    required = ["--model", "m", "--data", "d", "--output", str(tmp_path / "o")]
    for words, message in (
        (["--learnin-rate", "1", *required], "unknown setting 'learnin_rate' (did you mean 'learning_rate'?)"),
        (["--bf16", *required, "--bf16"], "--bf16 is given twice"),
        (["one.yaml", "two.yaml"], "'two.yaml': expected one file of settings"),
        ([*required, "--output_dir", "p"], "output_dir is given twice"),
    ):
        assert main(["train", *words]) == 2
        shown = capsys.readouterr().err
        assert message in shown
        usage = "usage: inform-rm train [CONFIG.yaml] [--SETTING VALUE ...]"
        assert shown.startswith(usage) == ("unknown" in message)


def test_failure_while_running_exits_with_1(trained, pairs_file, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "result.json")

    monkeypatch.setattr("inform_rm.util.files.os.replace", full)
    arguments = ["evaluate", "--model", str(trained), "--data", str(pairs_file), "--output", str(tmp_path / "e")]
    assert main(arguments) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "e" / "result.json").exists()


def test_module_and_script_are_the_same_program():
    module = subprocess.run([sys.executable, "-m", "inform_rm.cli", "--version"], capture_output=True, text=True)
    assert module.returncode == 0 and module.stdout.startswith("inform-rm ")
