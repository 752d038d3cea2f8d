"""``inform-rm plan``: the table and the JSON say what `plan` found, and exit codes say whether it fits."""

import json

import pytest

from inform_rm.cli.dispatch import main
from inform_rm.training.fake_step import PassCounts

SHAPE = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 99,
         "num_attention_heads": 4}  # fmt: skip


@pytest.fixture
def command(tmp_path, monkeypatch):
    def count(model, rows, length, *, autocast, read):
        return PassCounts(*(rows * length * each for each in (1e4, 1.5e4, 0.0, 1e6, 3e6)))

    monkeypatch.setattr("inform_rm.training.plan.count_pass", count)
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return ["plan", "--model", "org/model", "--config", str(tmp_path / "config.json")]


def test_the_table_says_what_fits_and_what_is_assumed(command, capsys):
    assert (
        main([*command, "--memory", "24", "--prompt-tokens", "100", "--response_tokens", "20", "--pairs", "6400"]) == 0
    )
    printed = capsys.readouterr().out
    for part in ("weights", "gradients", "optimizer", "kept for the backward pass", "peak", "24 - 2 in reserve"):
        assert part in printed
    assert "fits: " in printed and "what helps" not in printed
    assert "a pass has 1,120 tokens" in printed  # 8 pairs of 140
    assert "prompts of 100 and responses of 20 tokens; of 989 TFLOP/s a GPU reaches 0.35" in printed
    assert "a step of 64 pairs" in printed and "; 100 steps take" in printed


def test_json_has_the_same_figures(command, capsys):
    assert main([*command, "--gpus", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["total"] == pytest.approx(sum(found["parts"].values())) and found["fits"] is True
    assert found["pairs_per_step"] == 64 and found["hours"] is None and found["advice"] == []
    assert found["assumed"]["utilisation"] == 0.35 and found["assumed"]["launch"] == "fsdp2"
    assert "gathered weights" in found["parts"]


def test_what_does_not_fit_ends_with_1_and_says_what_helps(command, capsys):
    assert main([*command, "--memory", "0.03", "--reserve", "0"]) == 1
    printed = capsys.readouterr().out
    assert "does not fit: " in printed and "what helps" in printed
    assert "per_device_train_batch_size: 2, gradient_accumulation_steps: 32: " in printed
    assert main([*command, "--memory", "0.03", "--json", "false"]) == 1
    assert "does not fit: " in capsys.readouterr().out
    assert main([*command, "--memory", "0.03", "--reserve", "0", "--json"]) == 1
    settings = [advice["settings"] for advice in json.loads(capsys.readouterr().out)["advice"]]
    assert {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 32} in settings


@pytest.mark.parametrize(
    "more, words",
    [
        (["--gpus", "two"], "--gpus: 'two'; expected a number"),
        (["--memory"], "--memory: True; expected a number"),
        (["--launch"], "--launch: True; expected a value"),
        (["--reserve", "nan"], "reserve: nan; expected GiB, 0 or more"),
        (["--utilisation", "35"], "utilisation: 35.0; it is a share of the peak, at most 1"),
        (["--load_in_4bit"], "load_in_4bit needs LoRA"),
        (["--json", "yes"], "--json: 'yes'; expected the bare flag, or true or false"),
        (["--pairs", "0"], "--pairs: 0; expected a whole number of at least 1"),
        (["--lora_rank", "8"], "unknown setting 'lora_rank'"),
        (["--config", "nothing.json"], "--config is given twice"),
    ],
)
def test_wrong_use_is_named(command, capsys, more, words):
    assert main([*command, *more]) == 2
    assert words in capsys.readouterr().err


def test_a_model_whose_config_cannot_be_had_is_named(capsys, tmp_path):
    assert main(["plan", "--model", str(tmp_path / "none")]) == 2
    assert "--config FILE" in capsys.readouterr().err


def test_help_lists_its_flags(capsys):
    assert main(["plan", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--memory" in printed and "--utilisation" in printed and "Exit code 1" in printed
