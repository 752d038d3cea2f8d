"""Reward heads that a checkpoint's config does not tell of: one linear row, found among the weights themselves.

OpenRLHF saves a reward model under the class of its backbone, with ``score.weight`` or a head of another name and
nothing about ``num_labels``. TRL's ``AutoModelForCausalLMWithValueHead`` adds ``v_head.summary.weight`` and ``.bias``
to a causal language model; LLaMA-Factory puts the same two into ``value_head.safetensors`` beside it. All three read
the reward at the last token of the attention mask, as ``architecture: standard`` does, so that is how they are loaded.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import MODEL_FOR_MASKED_LM_MAPPING

from inform_rm.errors import InputError
from inform_rm.modeling_inform import InfoRMForSequenceClassification
from inform_rm.safety.checkpoints import find_file, reading_weights, weight_files

logger = logging.getLogger(__name__)

HEAD_FILE, PICKLED_HEAD_FILE = "value_head.safetensors", "value_head.bin"


@dataclass(frozen=True)
class RewardHead:
    """A linear layer from the hidden state to one number, by its weights."""

    prefix: str  # of its weight's name: "score", "v_head.summary", ...
    has_bias: bool
    file: Path | None = None  # where it is not among the backbone's weights

    def __str__(self) -> str:
        return f"{self.prefix}.weight" + ("" if self.file is None else f" in {self.file.name}")


def find_reward_head(model: str | Path, config: Any, *, revision: str | None = None) -> RewardHead | None:
    """The one head of shape (1, hidden size) among the weights of a decoder; None if there is none.

    Raises:
        InputError: several such heads, one that is pickled, or a weight file that cannot be read.
    """
    text_config = config.get_text_config()
    hidden_size = getattr(text_config, "word_embed_proj_dim", None) or getattr(text_config, "hidden_size", None)
    if hidden_size is None or (
        type(text_config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(text_config, "is_decoder", False)
    ):
        return None
    beside = find_file(model, HEAD_FILE, revision)
    heads = [] if beside is None else _heads_in(beside, hidden_size, beside)
    if beside is not None and not heads:
        raise InputError(
            f"model: {model}/{HEAD_FILE} holds no linear layer from {hidden_size} numbers to one. Pass the folder of "
            "a reward model whose value head is such a layer."
        )
    for path in weight_files(model, revision=revision):
        heads += _heads_in(path, hidden_size, None)
    if len(heads) > 1:
        raise InputError(
            f"model: {model} holds {len(heads)} heads that could give the reward: {', '.join(map(str, heads))}. "
            "Remove all but the right one from its files."
        )
    if heads:
        return heads[0]
    if find_file(model, PICKLED_HEAD_FILE, revision) is not None:
        raise InputError(
            f"model: {model} has its head in {PICKLED_HEAD_FILE}; reading a pickle can run any code. Where you trust "
            f"it, convert it: safetensors.torch.save_file(torch.load('{PICKLED_HEAD_FILE}', weights_only=True), "
            f"'{HEAD_FILE}'). Without it the folder is no reward model."
        )
    return None


def other_head_weights(model: str | Path, *, revision: str | None = None) -> list[str]:
    """Names of weights that sound like a head's but are no row of one: of several classes, or of several layers."""
    found = []
    for path in weight_files(model, revision=revision):
        with safe_open(path, framework="pt") as file:
            found += [key for key in file.keys() if re.search(r"(^|[._])(score|v_?head|value|reward|classif)", key)]
    return sorted(key for key in found if not re.search(r"(^|\.)(layers?|h|blocks)\.\d", key))


def load_with_head(model: str | Path, head: RewardHead | None, **settings: Any) -> Any:
    """`InfoRMForSequenceClassification.from_backbone`, going on from the checkpoint's own head where it can.

    A head that `find_reward_head` found goes on with ``architecture="standard"``, whose reward it is: a row and
    perhaps a constant. Dropout, which TRL's value head has while training, is left out. ``architecture="inform"``
    starts afresh. Both are logged. ``settings`` are keywords of ``from_backbone``.
    """
    name, from_backbone = str(model), InfoRMForSequenceClassification.from_backbone
    if head is None:
        return from_backbone(name, **settings)
    if head.file is None and head.prefix != "score":
        settings["key_mapping"] = {rf"^{re.escape(head.prefix)}\.": "score."}
    if settings.get("architecture") != "standard":
        logger.warning("%s has a reward head (%s); architecture: inform starts with a fresh one.", name, head)
        return from_backbone(name, **settings)
    # A value head of TRL may stand beside what a PPO run left; by their weights the two are the same.
    logger.warning("%s: its head %s is taken as reward head, at the last token of each row.", name, head)
    wants_info = settings.pop("output_loading_info", False)
    options = {**settings, "head_bias": head.has_bias, "output_loading_info": True}
    reward_model, loading = from_backbone(name, **options)
    absent = {key for key in loading["missing_keys"] if key.startswith("score.")}
    if head.file is not None:
        with safe_open(head.file, framework="pt") as weights, torch.no_grad():
            for kind, parameter in reward_model.score.named_parameters():
                parameter.copy_(weights.get_tensor(f"{head.prefix}.{kind}"))
    elif absent:
        raise InputError(f"model: {name} holds {head}, which could not be read as the reward head ({sorted(absent)}).")
    loading["missing_keys"] = set(loading["missing_keys"]) - absent
    return (reward_model, loading) if wants_info else reward_model


def _heads_in(path: Path, hidden_size: int, file: Path | None) -> list[RewardHead]:
    """Weights of shape ``(1, hidden_size)`` outside layers, where gates of experts have that shape as well."""
    with reading_weights(path), safe_open(path, framework="pt") as weights:
        names = set(weights.keys())
        found = [name for name in sorted(names) if weights.get_slice(name).get_shape() == [1, hidden_size]]
    prefixes = [name.removesuffix(".weight") for name in found if name.endswith(".weight")]
    return [
        RewardHead(prefix, f"{prefix}.bias" in names, file)
        for prefix in prefixes
        if not re.search(r"(^|\.)\d+(\.|$)|embed", prefix)
    ]
