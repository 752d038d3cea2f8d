"""Pairs, settings of a short run on them, and runs that are killed, for tests that continue them."""

import json
import os
import signal

import pytest

from inform_rm.training.reward_arguments import RewardTrainingArguments
from inform_rm.training.run import train
from inform_rm.training.trainer import RewardTrainer

COLOURS = ["red", "blue", "green", "black", "white", "brown", "pink", "grey"]


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    """48 pairs of different lengths: the chosen side names the asked colour."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = []
    for index in range(48):
        right, wrong = COLOURS[index % 8], COLOURS[(index + 1 + index // 8) % 8]
        rows.append(
            {
                "prompt": f"Name the colour {right}" + " please" * (index % 5),
                "chosen": f"It is {right}." + " Indeed." * (index % 3),
                "rejected": f"It is {wrong}.",
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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
    """Settings of a short run on `pairs_file`, which a module may have of its own; keywords change them."""

    def make(**changes):
        base = {
            "model": str(causal_lm_dir("llama")), "data": (str(pairs_file),), "output_dir": str(tmp_path / "run"),
            "latent_dim": 8, "learning_rate": 1e-3, "max_steps": 6, "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2, "logging_steps": 1, "save_steps": 3, "use_cpu": True,
        }  # fmt: skip
        return RewardTrainingArguments(**{**base, **changes})

    return make
