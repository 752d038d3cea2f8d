"""Reward models stored as adapters: a folder with LoRA weights, the reward head and a base model's name.

Such a folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` as peft writes them, the head whole among
the weights, and beside them the ``config.json`` of the InfoRM model that base, adapters and head make together.
"""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file

from inform_rm.configuration_inform import HEAD_SETTINGS
from inform_rm.errors import InputError
from inform_rm.modeling_inform import InfoRMForSequenceClassification
from inform_rm.safety.checkpoints import (
    ADAPTER_REFUSAL,
    check_checkpoint,
    check_code_is_own,
    find_file,
    read_object,
    reading_weights,
    warn_unpinned,
)
from inform_rm.scoring.value_heads import find_reward_head, load_with_head

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_HEAD_PREFIX = "base_model.model.score."
# What must agree between the base that the adapters were trained on and the one that is found under its name.
_BACKBONE_SIZES: tuple[str, ...] = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "vocab_size",
)  # fmt: skip


def holds_adapters(model: str | Path, revision: str | None = None) -> bool:
    """Whether a folder or Hub id holds adapters; of what cannot be reached nothing is known, so no."""
    if Path(model).is_dir():
        return (Path(model) / ADAPTER_FILES[0]).is_file()
    try:
        return find_adapter_config_file(str(model), revision=revision) is not None
    except (OSError, ValueError):  # no such repository, or no valid id: the loader of whole models says so
        return False


def import_peft(needed_by: str) -> Any:
    """The module `peft`, or an `InputError` that begins with what needs it."""
    try:
        import peft
    except ImportError as error:
        raise InputError(f"{needed_by} needs peft. Install it with: pip install 'inform-rm[peft]'") from error
    return peft


def load_adapter_model(
    model: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """A whole reward model from a folder (or Hub id) of adapters: its base is loaded, the adapters are merged into it.

    The base is never quantised here, also where the adapters were trained on a quantised one. The model keeps no trace
    of peft and is in eval mode. The dtype is that of the base, ``"auto"`` the one that the run trained in; the head is
    in float32. The device ``"auto"`` spreads the base over all. The base's revision stands in the adapters' settings.

    Raises:
        InputError: if the folder holds no adapters of an InfoRM model, lacks the head or weights, or its base is
            missing, broken or of another architecture.
    """
    name = str(model)
    if trust_remote_code:
        check_code_is_own(name, revision=revision)
    settings, config, weights = _read(name, revision, trust_remote_code)
    peft = import_peft(f"model: {model} holds adapters; loading it")
    if dtype == "auto":
        dtype = config.dtype or "auto"
    base = _load_base(name, settings, config, dtype, device, trust_remote_code)
    base.score.float()
    adapted = peft.get_peft_model(base, peft.LoraConfig(**{**settings, "inference_mode": True}))
    expected = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    shared = expected.keys() & weights.keys()
    for keys, fault in (
        (expected.keys() - shared, "are missing"),
        (weights.keys() - shared, "have no place"),
        ({key for key in shared if expected[key].shape != weights[key].shape}, "have another shape"),
    ):
        if keys:
            raise InputError(
                f"model: {name} does not fit its base {settings['base_model_name_or_path']}: {len(keys)} adapter "
                f"weights {fault} (first: {min(keys)}). Name the base that it was trained on in adapter_config.json."
            )
    peft.set_peft_model_state_dict(adapted, weights)
    merged: Any = adapted.merge_and_unload()
    if device != "auto":
        merged.to(device)
    return merged.eval()


def complete_adapter_folder(folder: str | Path, model: Any) -> None:
    """Put the ``config.json`` of a `PeftModel`'s InfoRM model beside the adapters that it wrote to `folder`.

    Without a word about quantisation: what the folder gives is base + adapters in full precision. The card that peft
    writes, a form to fill in, is removed.
    """
    config = copy.deepcopy(model.get_base_model().config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)
    (Path(folder) / "README.md").unlink(missing_ok=True)


def _read(name: str, revision: str | None, trust_remote_code: bool) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """Adapter settings, InfoRM config and weights, each checked; an `InputError` names what is wrong."""
    settings = read_object(name, ADAPTER_FILES[0], revision)
    if settings is None:
        raise InputError(f"model: {name} has no {ADAPTER_FILES[0]}; it holds no adapters.")
    config = None
    if find_file(name, "config.json", revision) is not None:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, revision=revision or "main")
    is_ours = settings.get("peft_type") == "LORA" and "score" in (settings.get("modules_to_save") or ())
    if config is None or config.model_type != "inform" or not is_ours:
        why = ", and not one that inform-rm train wrote (LoRA with the head, InfoRM config.json beside it)"
        raise InputError(ADAPTER_REFUSAL.format(name, why))
    if not settings.get("base_model_name_or_path"):
        raise InputError(f"model: {name}/{ADAPTER_FILES[0]} names no base model. Write it to base_model_name_or_path.")
    weights_file = find_file(name, ADAPTER_FILES[1], revision)
    if weights_file is None:
        raise InputError(
            f"model: {name} has no {ADAPTER_FILES[1]}. Only safetensors are read; a pickled adapter "
            "(adapter_model.bin) is refused."
        )
    with reading_weights(f"{name}/{ADAPTER_FILES[1]}"):
        weights = load_file(weights_file)
    if not any(key.startswith(_HEAD_PREFIX) for key in weights):
        raise InputError(
            f"model: {name} holds adapters without the reward head, which would be random. Pass a folder that "
            "inform-rm train wrote; it saves the head with the adapters."
        )
    return settings, config, weights


def _load_base(
    name: str, settings: dict[str, Any], config: Any, dtype: Any, device: Any, trust_remote_code: bool
) -> Any:
    """The model that the adapters were trained on, with the head's settings from `config`."""
    base, revision = settings["base_model_name_or_path"], settings.get("revision")
    wanted = f"model: {name} holds adapters for the base model {base}"
    if os.path.isabs(base) and not Path(base).is_dir():
        raise InputError(
            f"{wanted}, which is not there. Put it back, or write where it is now to base_model_name_or_path in "
            f"{ADAPTER_FILES[0]}."
        )
    hub = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    if trust_remote_code:
        warn_unpinned(base, revision)
    try:
        check_checkpoint(base, revision=revision, trust_remote_code=trust_remote_code)
        found = AutoConfig.from_pretrained(base, **hub)
        is_ours = found.model_type == "inform"
        compared = [(config.get_text_config(), found.get_text_config(), _BACKBONE_SIZES)]
        if is_ours:
            compared.append((config, found, tuple(name for name in HEAD_SETTINGS if name != "beta")))
        other = [
            f"{size} {getattr(theirs, size, None)!r} instead of {getattr(ours, size, None)!r}"
            for ours, theirs, sizes in compared
            for size in sizes
            if getattr(ours, size, None) != getattr(theirs, size, None)
        ]
        if other:
            raise InputError(f"{wanted}, which is another model now: {', '.join(other)}. Put the right one there.")
        loading = {"dtype": dtype, **hub, **({"device_map": "auto"} if device == "auto" else {})}
        if is_ours:
            loaded: Any = InfoRMForSequenceClassification.from_pretrained(base, use_safetensors=True, **loading)
        else:
            head = {setting: getattr(config, setting) for setting in HEAD_SETTINGS}
            own_head = find_reward_head(base, found, revision=revision)
            loaded = load_with_head(base, own_head, **head, **loading)
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers, safetensors and the Hub raise many types for a bad checkpoint
        raise InputError(f"{wanted}, which cannot be loaded: {' '.join(str(error).split())[:400]}") from error
    loaded.config.beta, loaded.config.pad_token_id = config.beta, config.pad_token_id
    return loaded
