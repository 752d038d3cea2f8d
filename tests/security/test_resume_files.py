"""Checkpoints of a run that was cut off, with pickles that would run code, or garbage, in place of their files."""

import dataclasses
import os
import pickle
import shutil

import pytest
import torch

from inform_rm.errors import InputError
from inform_rm.training.reward_arguments import RewardTrainingArguments
from inform_rm.training.run import train
from inform_rm.util.checkpoints import COMPLETE_FILE, complete_checkpoints, mark_complete


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.fixture(scope="module")
def cut_off(causal_lm_dir, tmp_path_factory):
    """Settings and folder of a run of 2 steps of which one is saved, as if it had been killed then."""
    folder = tmp_path_factory.mktemp("cut-off")
    pairs = folder / "pairs.jsonl"
    pairs.write_text('{"prompt": "Say sun.", "chosen": "sun", "rejected": "moon"}\n' * 8)
    config = RewardTrainingArguments(
        model=str(causal_lm_dir("llama")), data=(str(pairs),),
        output_dir=str(folder / "run"), latent_dim=4, max_steps=2,
        save_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=1, use_cpu=True,
    )  # fmt: skip
    train(config)
    (folder / "run" / "train_result.json").unlink()
    shutil.rmtree(folder / "run" / "checkpoints" / "checkpoint-2")
    return config, folder / "run"


@pytest.fixture
def resumed(cut_off, tmp_path):
    """A copy of that run: its settings and its checkpoint."""
    config, folder = cut_off
    shutil.copytree(folder, tmp_path / "run")
    (checkpoint,) = complete_checkpoints(tmp_path / "run" / "checkpoints")
    return dataclasses.replace(config, output_dir=str(tmp_path / "run")), checkpoint


def declare_complete(checkpoint):
    """Who can write a pickle can write its size."""
    (checkpoint / COMPLETE_FILE).unlink()
    mark_complete(checkpoint)


@pytest.mark.parametrize(
    ("name", "named", "saved_by"),
    [
        ("optimizer.pt", "optimizer.pt", "torch"),
        ("rng_state.pth", "rng_state", "pickle"),
        ("pytorch_model.bin", "the weights", "torch"),
        ("model.safetensors", "the weights", "torch"),
    ],
)
def test_a_pickle_is_refused_and_its_code_is_not_run(name, named, saved_by, resumed, tmp_path):
    config, checkpoint = resumed
    assert (checkpoint / name).exists() or name == "pytorch_model.bin"
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    content = {"state": Payload(tmp_path / "canary"), "param_groups": []}
    if saved_by == "torch":
        torch.save(content, checkpoint / name)
    else:
        (checkpoint / name).write_bytes(pickle.dumps(content))
    declare_complete(checkpoint)
    with pytest.raises(InputError, match=named) as caught:
        train(config)
    assert str(checkpoint) in str(caught.value)
    assert not (tmp_path / "canary").exists()


def test_a_sound_checkpoint_is_continued_and_its_training_args_are_not_read(resumed, tmp_path):
    config, checkpoint = resumed
    torch.save(Payload(tmp_path / "canary"), checkpoint / "training_args.bin")
    declare_complete(checkpoint)
    assert train(config)["resumed_from_step"] == 1
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trainer_state.json", b"not JSON"),
        ("trainer_state.json", b'{"global_step": 7}'),
        ("trainer_state.json", b'{"global_step": 1, "unknown": 1}'),
        ("trainer_state.json", b"[" * 100_000),
        ("optimizer.pt", b""),
        ("../run.json", b"[" * 100_000),
    ],
)
def test_garbage_is_refused_by_name(name, content, resumed):
    config, checkpoint = resumed
    (checkpoint / name).write_bytes(content)
    declare_complete(checkpoint)
    with pytest.raises(InputError, match=os.path.basename(name).partition(".")[0]):
        train(config)


def test_the_pickles_would_run_elsewhere(tmp_path):
    torch.save(Payload(tmp_path / "one"), tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "one").is_dir()
