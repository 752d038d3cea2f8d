"""A batch that is too much for the memory of one of two DDP processes: parted there, and the other does not wait."""

import json

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed

# Runs are named after the processes that have too little memory; what breaks off has left gradients behind.
PATCH = """
import os, torch
from inform_rm.training import loop
torch.randn_like = torch.zeros_like
plain = loop.RewardLoop.compute_loss

def compute_loss(self, model, inputs, *args, **kwargs):
    loss = plain(self, model, inputs, *args, **kwargs)
    tokens, name = inputs["input_ids"].numel(), self.args.output_dir.split("/")[-1]
    if os.environ["RANK"] in name.split()[0].split("+") and tokens > (90 if "packed" in name else 160):
        (7 * loss).backward()
        os.write(1, f"BROKE {name} {os.environ['RANK']} {tokens}\\n".encode())
        raise torch.OutOfMemoryError("for a test")
    return loss

loop.RewardLoop.compute_loss = compute_loss
"""
KINDS = {
    "packed": {"tokens_per_batch": 100_000},
    "packed in rows": {"tokens_per_batch": 150},
    "padded": {"batching": "padded", "gradient_accumulation_steps": 2},
}


def test_one_process_parts_a_batch_and_the_other_does_not_wait(settings, pairs_file, launcher, tmp_path):
    # 27 pairs in batches of 16: in the last step of an epoch the second process has none that count.
    common = {"data": [pairs_file(27)], "architecture": "inform", "optim": "sgd", "learning_rate": 0.1,
              "per_device_train_batch_size": 8, "max_steps": -1, "num_train_epochs": 2}  # fmt: skip
    names = [f"{broken} {kind}" for kind in KINDS for broken in ("none", "1", "0+1")]
    runs = [settings(**common, **KINDS[name.split(" ", 1)[1]], output_dir=name) for name in names]
    out, _ = launcher.train_all(runs, "ddp", PATCH)
    for name in names:
        broken, kind = name.split(" ", 1)
        for rank in "01":
            assert (f"BROKE {name} {rank} " in out) == (rank in broken.split("+")), out
        whole, parted = (
            json.loads((tmp_path / run / "train_result.json").read_text())["log_history"]
            for run in (f"none {kind}", name)
        )
        for quantity in ("loss", "grad_norm", "accuracy", "kl_nats"):
            expected = [line[quantity] for line in whole if quantity in line]
            assert len(expected) >= 2
            assert [line[quantity] for line in parted if quantity in line] == pytest.approx(
                expected, abs=1e-5, rel=1e-4
            )
        weights = load_file(tmp_path / name / "model.safetensors")
        for key, value in load_file(tmp_path / f"none {kind}" / "model.safetensors").items():
            torch.testing.assert_close(weights[key], value, atol=1e-5, rtol=1e-4, msg=f"{name} {key}")
