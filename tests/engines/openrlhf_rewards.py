"""Rewards of folded models from OpenRLHF's own code, against this package's: the third part of `make test-engines`.

    python openrlhf_rewards.py FOLDER PYTHON      FOLDER is what `folded_models.py` wrote, PYTHON runs this package

OpenRLHF needs GPUs to train; two pieces of it need none, and are run as they come: the class that a reward model
beside the policy is loaded into, in float32 (OpenRLHF itself takes bfloat16 or float16), and the client that
``--reward.remote_url`` starts, which asks `inform-rm serve` with a token in its URL. deepspeed, flash-attn and peft,
which neither of the two uses here, are replaced by empty modules. Exit code 1 if a reward differs by more than
TOLERANCE.
"""

import asyncio
import importlib.machinery
import json
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

TOLERANCE = 1e-3
NOT_USED = (
    "deepspeed", "flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed", "peft",
    "peft.tuners.lora",
)  # fmt: skip


def prepare_imports(root):
    """Make OpenRLHF's modules importable without those that its packages import for training."""
    for name in NOT_USED:
        module = mock.MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None), __version__="0", __path__=[])
        sys.modules[name] = module
    for name in ("openrlhf", "openrlhf.models", "openrlhf.utils"):
        module = types.ModuleType(name)
        module.__path__ = [str(Path(root, *name.split(".")))]
        sys.modules[name] = module


def beside_the_policy(folder, cases, dtype):
    """Rewards of OpenRLHF's class on one batch that is padded on the left, as its server pads."""
    import torch
    from openrlhf.models.model import get_llm_for_sequence_regression
    from openrlhf.utils import utils
    from transformers import AutoTokenizer

    with mock.patch.object(utils, "convert_to_torch_dtype", lambda _: dtype):
        model = get_llm_for_sequence_regression(
            str(folder), "reward", attn_implementation="eager", value_head_prefix="score"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    batch = tokenizer.pad({"input_ids": cases["ids"]}, return_tensors="pt")
    with torch.no_grad():
        rewards = model.eval()(batch["input_ids"], batch["attention_mask"])
    return [reward + cases["offset"] for reward in rewards.float().tolist()]


async def by_remote_url(url, texts):
    """Rewards that OpenRLHF's client gets for texts, one a request."""
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    executor = SingleTurnAgentExecutor([url])
    rewards = []
    for text in texts:
        (answer,) = await executor._fetch_rewards_via_http([text], ["unused"], [None])
        (reward,) = answer["rewards"]
        assert answer == {"rewards": [reward], "scores": [reward], "extra_logs": {}}, answer
        rewards.append(reward)
    return rewards


def served(python, folder, texts):
    """Ask `inform-rm serve`, which asks for a token."""
    with tempfile.NamedTemporaryFile("w", suffix=".token") as token:
        token.write("engines-token\n")
        token.flush()
        command = [python, "-m", "inform_rm.cli", "serve", "--model", str(folder), "--port", "0",
                   "--token-file", token.name, "--device", "cpu", "--dtype", "float32"]  # fmt: skip
        server = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
        try:
            address = server.stdout.readline().rpartition("http://")[2].strip()
            if not address:
                raise RuntimeError("inform-rm serve did not start")
            return asyncio.run(by_remote_url(f"http://openrlhf:engines-token@{address}/get_reward", texts))
        finally:
            server.terminate()
            server.wait(60)


def main():
    folder, python, *families = sys.argv[1:]
    root = Path(sys.prefix, "openrlhf")
    if not root.is_dir():
        print("skipped: OpenRLHF's files are not there; `make test-engines` brings them", file=sys.stderr)
        return 0
    prepare_imports(root)
    import torch

    names = families or sorted(path.parent.name for path in Path(folder).glob("*/cases.json"))
    wrong = []
    print("| family | OpenRLHF | largest difference | deviation of the rewards |\n|---|---|---|---|")

    def compare(name, way, rewards, expected, is_exact=True):
        difference = (torch.tensor(rewards) - torch.tensor(expected)).abs().max().item()
        print(f"| {name} | {way} | {difference:.1e} | {torch.tensor(expected).std().item():.1f} |", flush=True)
        if is_exact and not difference <= TOLERANCE:
            wrong.append(f"{name}: {way} differs by {difference:.3g}")

    for name in names:
        cases = json.loads(Path(folder, name, "cases.json").read_text())
        expected = cases["rewards"]
        for dtype in (torch.float32, torch.bfloat16):
            rewards = beside_the_policy(Path(folder, name, "folded"), cases, dtype)
            way = f"model, {str(dtype).removeprefix('torch.')}"
            compare(name, way, rewards, expected, is_exact=dtype == torch.float32)
    name = names[0]
    cases = json.loads(Path(folder, name, "cases.json").read_text())
    rewards = served(python, Path(folder, name, "original"), cases["texts"])
    compare(name, "remote_url to inform-rm serve", rewards, cases["rewards"])
    print("\n" + ("\n".join(wrong) or f"all in float32 within {TOLERANCE:g}"))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
