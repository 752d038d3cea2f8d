"""How to serve a folded folder: what ``inform-rm export --folded`` prints."""

import json
import shlex
from pathlib import Path

from transformers import AutoTokenizer

from inform_rm.hub.engine_inputs import compare_engine_inputs


def engine_advice(folder: str | Path) -> list[str]:
    """Lines about a folded model: its constant, vLLM's command, and what must be said in a request.

    Ways in which an engine feeds other tokens whatever is said were warned of when the folder was written.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    offset = config["reward_offset"]
    constant = f" {'-' if offset < 0 else '+'} {abs(offset)!r}" if offset else ""
    command = ["vllm", "serve", str(folder), "--runner", "pooling"]
    if offset:
        command += ["--pooler-config", pooler_config(offset)]
    inputs = compare_engine_inputs(AutoTokenizer.from_pretrained(folder))
    said = [
        f"{item.way}: {item.difference}. {item.remedy}" for item in inputs if item.difference and item.is_avoidable
    ]
    return [
        f"{config['architectures'][0]}: reward of the model = folded reward{constant}",
        f"vLLM: {shlex.join(command)}",
        *said,
    ]


def pooler_config(offset: float) -> str:
    """VLLM's ``--pooler-config`` that adds the constant (0.32.0, ``vllm/config/pooler.py``: minus ``logit_mean``)."""
    return json.dumps({"logit_mean": -offset})
