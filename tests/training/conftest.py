"""Runs that are killed, for tests that continue them."""

import os
import signal

import pytest

from inform_rm.training.reward_arguments import RewardTrainingArguments
from inform_rm.training.run import train
from inform_rm.training.trainer import RewardTrainer


@pytest.fixture
def train_and_kill(exit_code_of_fork):
    """Train in a fork, which dies as soon as the checkpoint of the given step is whole."""

    def run(config, step):
        def killed():
            save = RewardTrainer._save_checkpoint

            def save_then_die(self, *args, **kwargs):
                save(self, *args, **kwargs)
                if self.state.global_step == step:
                    os.kill(os.getpid(), signal.SIGKILL)

            RewardTrainer._save_checkpoint = save_then_die
            train(config)

        assert exit_code_of_fork(killed) == -signal.SIGKILL

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
