"""How to serve a folded folder: what ``inform-rm export --folded`` prints."""

import json
import shlex
from pathlib import Path

from transformers import AutoTokenizer

from inform_rm.hub.engine_inputs import compare_engine_inputs

# Classes that vLLM 0.32.0 does not load by themselves, and the one around which it builds the same classifier.
_VLLM_CLASSES = {"Gemma3TextForSequenceClassification": "Gemma3ForCausalLM"}


def engine_advice(folder: str | Path) -> list[str]:
    """Lines about a folded model: its constant, vLLM's command, and what must be said in a request.

    Ways in which an engine feeds other tokens whatever is said were warned of when the folder was written.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (class_name,), offset = config["architectures"], config["reward_offset"]
    constant = f" {'-' if offset < 0 else '+'} {abs(offset)!r}" if offset else ""
    inputs = compare_engine_inputs(AutoTokenizer.from_pretrained(folder))
    said = [
        f"{item.way}: {item.difference}. {item.remedy}" for item in inputs if item.difference and item.is_avoidable
    ]
    return [
        f"{class_name}: reward of the model = folded reward{constant}",
        f"vLLM: {vllm_command(str(folder), class_name, offset)}",
        *said,
    ]


def vllm_command(model: str, class_name: str, offset: float) -> str:
    """The command that serves a folded model with its constant added.

    vLLM 0.32.0, ``vllm/config/pooler.py``: what ``logit_mean`` holds is subtracted.
    """
    command = ["vllm", "serve", model, "--runner", "pooling"]
    if class_name in _VLLM_CLASSES:
        overrides = json.dumps({"architectures": [_VLLM_CLASSES[class_name]]})
        command += ["--convert", "classify", "--hf-overrides", overrides]
    if offset:
        command += ["--pooler-config", json.dumps({"logit_mean": -offset})]
    return shlex.join(command)
