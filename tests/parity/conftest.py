"""What the comparisons with other libraries share: a tiny model folder, text pairs, a process without the package."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from inform_rm import InfoRMConfig, InfoRMForSequenceClassification

WORDS = ["apple", "pear", "red", "blue", "sea", "sky", "grass", "rose"]
# `inform_rm` is made impossible to import: only the code inside the model folder can be used.
BLOCK_PACKAGE = """
import sys
sys.modules["inform_rm"] = None
import torch
torch.set_num_threads(1)
"""


@pytest.fixture
def preference_rows() -> list[dict[str, str]]:
    """32 text pairs of unequal lengths; the chosen side says "good", the rejected side "bad"."""
    generator = torch.Generator().manual_seed(0)

    def text() -> str:
        length = int(torch.randint(1, 7, (1,), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator).tolist())

    return [
        {"prompt": f"{text()} ", "chosen": f"{text()} good {text()}", "rejected": f"{text()} bad {text()}"}
        for _ in range(32)
    ]


@pytest.fixture
def save_reward_model(
    tmp_path: Path, backbone_configs: dict[str, PretrainedConfig], tokenizer: PreTrainedTokenizerFast
) -> Callable[[str], Path]:
    """``save_reward_model(architecture)`` writes a fresh model and its tokenizer, and gives the folder."""

    def save(architecture: str) -> Path:
        torch.manual_seed(0)
        config = InfoRMConfig(text_config=backbone_configs["llama"], latent_dim=8, architecture=architecture)
        folder = tmp_path / f"{architecture}-reward-model"
        InfoRMForSequenceClassification(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def run_without_package(tmp_path: Path) -> Callable[..., str]:
    """``run_without_package(script, *arguments)`` runs Python text where `inform_rm` is absent, gives its output."""

    def run(script: str, *arguments: object) -> str:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(tmp_path / "remote-code"),
            "TOKENIZERS_PARALLELISM": "false",
        }
        environment.pop("PYTHONPATH", None)
        finished = subprocess.run(
            [sys.executable, "-c", BLOCK_PACKAGE + textwrap.dedent(script), *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            timeout=300,
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout

    return run
