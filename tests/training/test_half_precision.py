"""bfloat16 weights: the head stays float32, lost updates are warned of, and the compensated optimizer loses none."""

import dataclasses
import importlib.util
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from inform_rm import InfoRMForSequenceClassification
from inform_rm.errors import InputError
from inform_rm.training import half_precision
from inform_rm.training.run import train


@pytest.fixture
def settings(base_settings):
    """The default learning rate, for which bfloat16 is too coarse."""
    return base_settings(gradient_accumulation_steps=1, learning_rate=5e-6, dtype="bfloat16")


@pytest.fixture
def optimi():
    pytest.importorskip("optimi", reason="torch-optimi is not installed")


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.name == half_precision.__name__]


# --- the head ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["inform", "standard"])
def test_fresh_head_of_a_bfloat16_backbone_is_the_float32_one(causal_lm_dir, architecture):
    folder = causal_lm_dir("llama")
    heads = []
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        model = InfoRMForSequenceClassification.from_backbone(folder, architecture=architecture, dtype=dtype)
        assert model.dtype == dtype
        heads.append(model.score.state_dict())
    assert all(value.dtype == torch.float32 and torch.equal(value, heads[1][name]) for name, value in heads[0].items())


def test_trained_head_is_float32_in_the_folder_and_when_it_is_loaded(settings):
    train(settings)
    saved = load_file(f"{settings.output_dir}/model.safetensors")
    dtypes = {(name.split(".")[0], value.dtype) for name, value in saved.items()}
    assert dtypes == {("model", torch.bfloat16), ("score", torch.float32)}
    for options in ({}, {"dtype": torch.bfloat16}):
        loaded = AutoModelForSequenceClassification.from_pretrained(settings.output_dir, **options)
        assert loaded.dtype == torch.bfloat16
        assert all(torch.equal(value, saved[name]) for name, value in loaded.state_dict().items())
        assert {value.dtype for value in loaded.score.parameters()} == {torch.float32}
    # Training changed digits that bfloat16 does not have.
    assert any((saved[name] != saved[name].bfloat16().float()).any() for name in saved if name.startswith("score"))


# --- lost updates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_run_that_loses_updates_says_so_once_and_names_the_ways_out(settings, dtype, tmp_path, caplog):
    half = tmp_path / "half"
    shutil.copytree(settings.model, half)
    AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.bfloat16).save_pretrained(half)
    with caplog.at_level(logging.WARNING):
        train(dataclasses.replace(settings, dtype=dtype, model=str(half)))
    (message,) = warnings(caplog)
    assert "dtype: float32 and bf16: true" in message and "optim: stable_adamw" in message
    assert "inform-rm[bf16]" in message and "adamw_torch_fused" in message


def test_runs_that_lose_nothing_say_nothing(settings, optimi, tmp_path, caplog):
    pytest.importorskip("peft", reason="peft is not installed")
    for name, change in {
        "float32": {"dtype": "float32"}, "autocast": {"dtype": "float32", "bf16": True},
        "compensated": {"optim": "stable_adamw"}, "lora": {"lora_r": 2},
    }.items():  # fmt: skip
        with caplog.at_level(logging.WARNING):
            train(dataclasses.replace(settings, **change, max_steps=1, output_dir=str(tmp_path / name)))
    assert warnings(caplog) == []


def test_adapters_on_a_bfloat16_backbone_are_float32_and_train(settings, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed")
    config = dataclasses.replace(settings, lora_r=2, merge_adapters=False)
    train(config)
    saved = load_file(f"{config.output_dir}/adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    trained = [value for name, value in saved.items() if "lora_B" in name]  # start at zero
    assert len(trained) == 14 and all((value != 0).all() for value in trained)


# --- the compensated optimizer -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optim", "package", "extra"),
    [("stable_adamw", "torch-optimi", "bf16"), ("paged_adamw_8bit", "bitsandbytes", "quant")],
)
def test_an_optimizer_without_its_library_is_refused_in_one_line(optim, package, extra, settings, monkeypatch):
    plain = importlib.util.find_spec
    absent = ("optimi", "bitsandbytes")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else plain(name))
    with pytest.raises(InputError, match=rf"^optim: '{optim}' needs {package}\. .*'inform-rm\[{extra}\]'$"):
        train(dataclasses.replace(settings, optim=optim))


@pytest.mark.slow
def test_compensated_bfloat16_weights_go_where_float32_weights_go(settings, optimi, tmp_path):
    """Over 60 steps; without compensation they stay behind. Movement along the float32 run's, 1 being all of it."""
    shared = dataclasses.replace(
        settings,
        architecture="standard",
        max_steps=60,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        save_steps=60,
    )
    start = InfoRMForSequenceClassification.from_backbone(settings.model, dtype=torch.float32).model.state_dict()
    moved = {}
    for name, change in {
        "float32": {"dtype": "float32", "optim": "stable_adamw"}, "plain": {}, "compensated": {"optim": "stable_adamw"}
    }.items():  # fmt: skip
        train(dataclasses.replace(shared, **change, output_dir=str(tmp_path / name)))
        trained = load_file(tmp_path / name / "model.safetensors")
        # From the start as the run's own weights hold it.
        dtype = torch.float32 if name == "float32" else torch.bfloat16
        moved[name] = torch.cat(
            [(trained[f"model.{key}"].float() - value.to(dtype).float()).flatten() for key, value in start.items()]
        )
    target = moved.pop("float32")
    along = {name: (movement @ target / (target @ target)).item() for name, movement in moved.items()}
    assert along["compensated"] == pytest.approx(1, abs=0.15)
    assert along["plain"] < 0.5


def test_resumed_run_with_the_compensated_optimizer_equals_the_uninterrupted_one(settings, optimi, tmp_path):
    config = dataclasses.replace(settings, optim="stable_adamw", save_total_limit=None)
    train(config)
    cut = tmp_path / "cut"
    shutil.copytree(config.output_dir, cut)
    shutil.rmtree(cut / "checkpoints" / "checkpoint-6")
    (cut / "train_result.json").unlink()
    assert train(dataclasses.replace(config, output_dir=str(cut)))["resumed_from_step"] == 3
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", cut))
    assert all(torch.equal(first[name], second[name]) for name in first)
