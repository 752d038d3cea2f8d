"""Training with two CPU processes under FSDP2, launched as users launch it."""

import json
import subprocess
import sys
import textwrap

import pytest
from transformers import AutoModelForSequenceClassification

from inform_rm.training.config import TrainingConfig
from inform_rm.training.run import train

pytestmark = pytest.mark.distributed

# Accelerate turns FSDP on CPU processes into DDP without a word. This patch, put in the processes through
# sitecustomize, makes FSDP2 run there; the class that it prints shows that it did.
PATCH = """
import os
import accelerate.accelerator, accelerate.state
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

plain_init = AcceleratorState.__init__

def init(self, *args, fsdp_plugin=None, **kwargs):
    plain_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP

AcceleratorState.__init__ = init
plain_prepare = accelerate.accelerator.fsdp2_prepare_model

def prepare(*args, **kwargs):
    model = plain_prepare(*args, **kwargs)
    os.write(1, f"PREPARED {type(model).__name__}\\n".encode())  # whole, though both processes write
    return model

accelerate.accelerator.fsdp2_prepare_model = prepare
"""

FSDP2 = {
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_state_dict_type": "FULL_STATE_DICT", "fsdp_reshard_after_forward": True,
        "fsdp_cpu_ram_efficient_loading": False, "fsdp_offload_params": False,
        "fsdp_activation_checkpointing": False,
    },
}  # fmt: skip


def test_two_processes_train_as_one_and_save_ordinary_folders(causal_lm_dir, tmp_path, train_on_two):
    data = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"Count to {n}.", "chosen": "one two " * (n % 4 + 1), "rejected": "no " * (n % 3 + 1)}
        for n in range(32)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": str(causal_lm_dir("llama")), "data": [str(data)], "eval_data": [str(data)],
        "architecture": "standard",
        "learning_rate": 1e-3, "max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
        "logging_steps": 1, "eval_steps": 4, "save_steps": 4, "use_cpu": True, "output": str(tmp_path / "two"),
    }  # fmt: skip
    run = train_on_two(settings, FSDP2, PATCH)
    assert run.stdout.count("PREPARED FSDPInfoRMForSequenceClassification") == 2

    two = json.loads((tmp_path / "two" / "train_result.json").read_text())
    assert (two["distributed_type"], two["num_processes"]) == ("FSDP", 2)
    assert two["evaluation"]["num_pairs"] == 32
    one = train(
        TrainingConfig(**settings | {"data": (str(data),), "eval_data": (str(data),), "output": str(tmp_path / "one"),
                                     "per_device_train_batch_size": 8})
    )  # fmt: skip
    for name in ("loss", "accuracy", "margin", "grad_norm"):
        first, second = ([line[name] for line in r["log_history"] if "loss" in line] for r in (one, two))
        assert second == pytest.approx(first, abs=1e-4), name
    assert two["evaluation"]["accuracy"] == one["evaluation"]["accuracy"]

    for folder in (tmp_path / "two", tmp_path / "two" / "checkpoints" / "checkpoint-4"):
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == ["InfoRMForSequenceClassification"]
        assert not list(folder.glob("_fsdp*.py"))
        code = textwrap.dedent("""
            import sys
            from transformers import AutoModel
            model, info = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"], info
            assert "inform_rm" not in sys.modules
        """)
        subprocess.run([sys.executable, "-I", "-c", code, str(folder)], check=True, capture_output=True)
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "two", output_loading_info=True)
    assert not info["missing_keys"] and model.config.architecture == "standard"
