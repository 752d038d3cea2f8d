"""What two processes save: ordinary Hub folders, checkpoints that continue the same run, refusals that say why."""

import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from inform_rm.errors import InputError
from inform_rm.training.reward_arguments import arguments_from_mapping
from inform_rm.training.run import train

pytestmark = pytest.mark.distributed

# A run whose output is named "cut" stops once, two that are named "left" for good, after the checkpoint of step 3.
# Each process says what the model's weights are before anything copies them from one process to the other.
PATCH = """
import hashlib, os
from inform_rm.errors import InputError
from inform_rm.training import loop, trainer

plain_step, plain_loop_init = trainer.RewardTrainer.training_step, loop.RewardLoop.__init__
stopped = []

def step(self, *args):
    name = self.args.output_dir.split("/")[-1].split()[-1]
    if self.state.global_step == 4 and name in ("cut", "left") and (name == "left" or not stopped):
        stopped.append(name)
        raise InputError(f"stopped {name}")
    return plain_step(self, *args)

def loop_init(self, **kwargs):
    digest = hashlib.sha256()
    for name, value in sorted(kwargs["model"].named_parameters()):
        digest.update(name.encode() + value.detach().numpy().tobytes())
    os.write(1, f"WEIGHTS {digest.hexdigest()}\\n".encode())
    plain_loop_init(self, **kwargs)

trainer.RewardTrainer.training_step, loop.RewardLoop.__init__ = step, loop_init
"""
LOADS = """
import sys
from transformers import AutoModelForSequenceClassification
model, info = AutoModelForSequenceClassification.from_pretrained(
    sys.argv[1], trust_remote_code=True, output_loading_info=True
)
assert not info["missing_keys"] and not info["unexpected_keys"], info
assert "inform_rm" not in sys.modules
"""


@pytest.mark.parametrize("kind", ("ddp", "fsdp2", "two machines, sharded"))
def test_folders_and_resuming(kind, settings, launcher, tmp_path):
    common = {"architecture": "inform", "max_steps": 6, "save_steps": 3, "batching": "padded"}
    names = ("whole", "cut", "left", "cut")
    runs = [settings(**common, output_dir=f"{kind} {name}") for name in names]
    if kind == "fsdp2":
        runs.append(settings(**common, lora_r=2, output_dir=f"{kind} lora"))
    out, _ = launcher.train_all(runs, kind, PATCH)
    assert out.count("REFUSED stopped cut") == out.count("REFUSED stopped left") == 2 and out.count("REFUSED") == 4
    if kind != "ddp":
        assert out.count("PREPARED FSDPInfoRM") == 2 * 4
    # The head is drawn alike in both processes, each time.
    digests = [line.split()[1] for line in out.splitlines() if line.startswith("WEIGHTS")]
    assert len(digests) == 2 * len(runs) and len(set(digests)) == 1 + (kind == "fsdp2")

    whole, cut = (json.loads((tmp_path / f"{kind} {name}" / "train_result.json").read_text()) for name in names[:2])
    assert cut["resumed_from_step"] == 3 and cut["num_processes"] == 2
    for quantity in ("loss", "grad_norm", "kl_nats"):
        one, other = ([line[quantity] for line in run["log_history"] if quantity in line] for run in (whole, cut))
        assert len(one) == 6 and other == pytest.approx(one, abs=1e-6), quantity

    # The folder of one process: the same files, settings, names, shapes and types.
    train(arguments_from_mapping(settings(**common, output_dir="one", per_device_train_batch_size=8), "test"))
    folders = [tmp_path / f"{kind} whole"] + [tmp_path / f"{kind} lora"] * (kind == "fsdp2")
    expected = load_file(tmp_path / "one" / "model.safetensors")
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
        assert json.loads((folder / "config.json").read_text()) == json.loads(
            (tmp_path / "one" / "config.json").read_text()
        )
        weights = load_file(folder / "model.safetensors")
        described = [{name: (value.shape, value.dtype) for name, value in w.items()} for w in (weights, expected)]
        assert described[0] == described[1]
        subprocess.run([sys.executable, "-I", "-c", LOADS, str(folder)], check=True, capture_output=True)
        _, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
    checkpoint = tmp_path / f"{kind} whole" / "checkpoints" / "checkpoint-6"
    if kind == "two machines, sharded":
        assert (checkpoint / "pytorch_model_fsdp_0" / ".metadata").exists()
    else:  # a checkpoint is such a folder, too
        subprocess.run([sys.executable, "-I", "-c", LOADS, str(checkpoint)], check=True, capture_output=True)
        weights = load_file(tmp_path / f"{kind} whole" / "model.safetensors")
        saved = load_file(checkpoint / "model.safetensors")
        assert all(value.equal(saved[name]) for name, value in weights.items())

    # One process does not go on silently where two stopped.
    alone = settings(**common, output_dir=f"{kind} left", per_device_train_batch_size=8)
    with pytest.raises(InputError, match=r"2 processes \((DDP|FSDP, (FULL|SHARDED)_STATE_DICT)\), this one has 1"):
        train(arguments_from_mapping(alone, "test"))
