"""Runs that are killed, for tests that continue them."""

import json
import subprocess
import sys

import pytest

from inform_rm.training.reward_arguments import RewardTrainingArguments, settings_of

KILLED = """
import json, os, signal, sys
from inform_rm.training.reward_arguments import arguments_from_mapping
from inform_rm.training.run import train
from inform_rm.training.trainer import RewardTrainer

save = RewardTrainer._save_checkpoint

def save_then_die(self, *args, **kwargs):
    save(self, *args, **kwargs)
    if self.state.global_step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

RewardTrainer._save_checkpoint = save_then_die
train(arguments_from_mapping(json.loads(sys.argv[1]), "test"))
"""


@pytest.fixture
def train_and_kill(tmp_path):
    """Train in a process of its own, which dies as soon as the checkpoint of the given step is whole."""

    def run(config, step):
        command = [sys.executable, "-c", KILLED, json.dumps(settings_of(config)), str(step)]
        # Workers outlive a killed parent for some seconds and would hold a pipe open.
        with (tmp_path / "log").open("w") as log:
            killed = subprocess.run(command, stdout=log, stderr=log, check=False)
        assert killed.returncode == -9, (tmp_path / "log").read_text()

    return run


@pytest.fixture
def base_settings(causal_lm_dir, pairs_file, tmp_path):
    """Settings of a short run on the module's own pairs; keywords change them."""

    def make(**changes):
        base = {
            "model": str(causal_lm_dir("llama")), "data": (str(pairs_file),), "output_dir": str(tmp_path / "run"),
            "latent_dim": 8, "learning_rate": 1e-3, "max_steps": 6, "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2, "logging_steps": 1, "save_steps": 3, "use_cpu": True,
        }  # fmt: skip
        return RewardTrainingArguments(**{**base, **changes})

    return make
