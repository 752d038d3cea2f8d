"""Loading any sequence-classification reward model safely, and telling two of them apart."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

import inform_rm
from inform_rm.errors import InputError
from inform_rm.safety.checkpoints import check_checkpoint, warn_unpinned
from inform_rm.scoring.adapters import holds_adapters, load_adapter_model
from inform_rm.scoring.value_heads import RewardHead, find_reward_head, load_with_head, other_head_weights

logger = logging.getLogger(__name__)

# What the classifiers of transformers for decoders call their heads.
_OWN_HEADS = ("score", "classifier", "logits_proj")
_POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings")  # what transformers calls them
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def load_reward_model(
    model: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a reward model with one output from a folder or the Hub, in eval mode.

    Only safetensors are read. Folders of InfoRM models load without remote code. What the checkpoint claims is checked
    first (`inform_rm.safety.checkpoints`). Adapters that `inform_rm.training` wrote are merged into their base
    (`inform_rm.scoring.adapters`). Where the config tells of no head with one output but the weights hold one
    (OpenRLHF, TRL, LLaMA-Factory), the model is backbone and head as ``architecture: standard``
    (`inform_rm.scoring.value_heads`).

    Args:
        model: folder or Hub id of a sequence-classification model with ``num_labels == 1``, or of a decoder with a
            head of one row among its weights or in ``value_head.safetensors``.
        dtype: ``None`` is float32 on a CPU (bfloat16 is slower there and coarser) and the checkpoint's own elsewhere.
        device: ``None`` is the GPU if there is one, else the CPU; ``"auto"`` spreads a large model over all devices.
        trust_remote_code: run model code from the checkpoint. Off unless asked.
        revision: branch, tag or commit of a Hub model.

    Raises:
        InputError: if there is no such model, it is not a reward model with one output, its weights are pickled,
            incomplete or broken, it needs remote code that was not allowed, or it holds adapters whose base is not
            there.
    """
    if trust_remote_code:
        warn_unpinned(str(model), revision)
    if str(model).strip() and holds_adapters(model, revision):
        inform_rm.register_auto_classes()
        target, chosen = _device_and_dtype(device, dtype)
        return load_adapter_model(
            model, dtype=chosen, device=target, trust_remote_code=trust_remote_code, revision=revision
        )
    return _load(model, AutoModelForSequenceClassification, dtype, device, trust_remote_code, revision)


def load_causal_lm(
    model: str | Path,
    *,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model as safely as `load_reward_model` loads a reward model; see there."""
    if trust_remote_code:
        warn_unpinned(str(model), revision)
    return _load(model, AutoModelForCausalLM, None, device, trust_remote_code, revision)


def _load(
    model: str | Path,
    auto_class: Any,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    trust_remote_code: bool,
    revision: str | None,
) -> PreTrainedModel:
    inform_rm.register_auto_classes()
    name = str(model)
    folder = Path(model)
    if not name.strip():
        raise InputError("model: got an empty name. Pass a folder or a Hub id.")
    if not folder.is_dir() and (folder.exists() or name.startswith((".", "/", "~"))):
        raise InputError(f"model: {name} is not a folder. Pass the folder that holds config.json, or a Hub id.")
    target, dtype = _device_and_dtype(device, dtype)
    hub = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    try:
        check_checkpoint(name, revision=revision, trust_remote_code=trust_remote_code, auto_class=auto_class)
        if folder.is_dir():
            _check_folder(folder)
        config = AutoConfig.from_pretrained(name, **hub)
        wants_head = auto_class is AutoModelForSequenceClassification
        head = _head_to_load_with(config, name, revision) if wants_head else None
        if not hasattr(config, "pad_token_id"):
            config.pad_token_id = None  # some configs of transformers have none, and its classifiers ask for it
        # Weights of other shapes are refused below, by name.
        options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True, **hub}
        if target == "auto":
            options["device_map"] = "auto"
        if getattr(config.get_text_config(), "attn_logit_softcapping", None):
            options["attn_implementation"] = "eager"  # Gemma 2: earlier versions of transformers leave its cap out
        if head is not None:
            loaded, loading = load_with_head(name, head, architecture="standard", **options)
        else:
            loaded, loading = auto_class.from_pretrained(name, config=config, use_safetensors=True, **options)
    except (InputError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # transformers raises whatever a wrong value in a config happens to lead to
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        where = "" if folder.is_dir() else "there is no such folder, and as a Hub id: "
        raise InputError(f"model: cannot load {name}: {where}{reason}{_advice(error)}") from error
    _check_loading(loading, name)
    if target != "auto":
        loaded.to(target)
    return loaded.eval()


def trained_length(config: PreTrainedConfig) -> int | None:
    """Most tokens that a model was made for, as its config says; ``None`` where it does not."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None


def table_length(model: torch.nn.Module) -> int | None:
    """Most tokens for which a model has positions, where it looks them up in a table; ``None`` where it computes them.

    Learned positions (GPT-2, OPT, ...) are an embedding, which may keep its first rows for something else; some rotary
    models (GPT-J, CodeGen) hold a table of angles.
    """
    sizes = []
    for name, table in [*model.named_modules(), *model.named_buffers()]:
        if name.rpartition(".")[2] not in _POSITION_TABLES:
            continue
        if isinstance(table, torch.nn.Embedding):
            reserved = 0 if table.padding_idx is None else table.padding_idx + 1
            sizes.append(table.num_embeddings - int(getattr(table, "offset", reserved)))
        elif isinstance(table, torch.Tensor) and table.dim() == 2:
            sizes.append(len(table))
    return min(sizes, default=None)


def checked_max_length(model: Any, max_length: int | None) -> int | None:
    """Longest input in tokens: ``max_length`` if it is given, else the model's own limit (``None``: it has none).

    Raises:
        InputError: the model has no positions for so many tokens.
    """
    trained, table = trained_length(model.config), table_length(model)
    if max_length is None:
        return min((limit for limit in (trained, table) if limit is not None), default=None)
    if table is not None and max_length > table:
        raise InputError(
            f"max_length: {max_length}, but the model has positions for {table} tokens and no more. Lower max_length "
            "to that, or leave it out."
        )
    if trained is not None and max_length > trained:
        logger.warning("max_length: %d; the model's config says that it was made for %d tokens.", max_length, trained)
    return max_length


def fingerprint_model(model: torch.nn.Module) -> str:
    """SHA-256 over the names, shapes, types and bytes of every weight: equal models, equal text on every machine."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        if not isinstance(value, torch.Tensor):
            digest.update(f"{key} {value!r}".encode())
            continue
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """SHA-256 over all that decides token ids: vocabulary, merges, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    if backend is not None:  # what the last call asked for is not what the tokenizer is
        parts = {key: value for key, value in parts.items() if key not in ("padding", "truncation")}
    specials = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    text = json.dumps([parts, specials, tokenizer.chat_template], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise InputError(f"model: {folder} has no config.json. Pass the folder that save_pretrained or train wrote.")
    if any(folder.glob("*.safetensors")):
        return
    pickles = [path.name for path in folder.iterdir() if path.suffix in _PICKLES and path.name != "training_args.bin"]
    if pickles:
        raise InputError(
            f"model: {folder} holds only pickled weights ({min(pickles)}); reading a pickle can run any code. "
            "Convert it to safetensors where you trust it: model.save_pretrained(folder)."
        )
    raise InputError(f"model: {folder} has no *.safetensors file. Pass a folder that holds the weights.")


def _head_to_load_with(config: PreTrainedConfig, name: str, revision: str | None) -> RewardHead | None:
    """The head among the weights that the model's own class would not read; None if that class reads its head."""
    if config.is_encoder_decoder:
        raise InputError(
            f"model: {name} is an encoder-decoder model ({config.model_type}): no last token of prompt and response "
            "to read a reward at. Pass a reward model on a decoder."
        )
    own_code = "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {})
    if config.model_type == "inform" or (own_code and config.num_labels == 1):
        return None
    head = find_reward_head(name, config, revision=revision)
    if config.num_labels == 1 and (head is None or (head.file is None and head.prefix in _OWN_HEADS)):
        return None
    if head is not None:
        if getattr(config, "normalize_reward", False):  # OpenRLHF, in evaluation: (reward - mean) / std
            text = "%s: its config asks for rewards with mean %s taken off, divided by %s; they are given as they are."
            logger.warning(text, name, getattr(config, "mean", None), getattr(config, "std", None))
        return head
    architectures = ", ".join(getattr(config, "architectures", None) or ["not stated"])
    others = other_head_weights(name, revision=revision)
    if "SequenceClassification" in architectures:
        advice = "Classifiers with several classes give no single reward; choose a model trained with num_labels=1."
    elif others:
        advice = f"It holds {others[0]}, which is no head that is read here: one linear layer with one row."
    else:
        advice = "This is not a reward model: it has no trained reward head. Train one from it (inform-rm train)."
    raise InputError(
        f"model: {name} has num_labels={config.num_labels} (architectures: {architectures}); a reward model has "
        f"num_labels=1. {advice}"
    )


def _check_loading(loading: dict[str, Any], name: str) -> None:
    """Refuse a model some of whose weights were drawn at random because the checkpoint does not hold them."""
    absent = sorted(str(key) for key in loading["missing_keys"])
    absent += sorted(str(key[0] if isinstance(key, tuple) else key) for key in loading["mismatched_keys"])
    if absent:
        shown = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
        raise InputError(
            f"model: {name} is not complete: {len(absent)} weights are not in its checkpoint and would "
            f"be random ({shown}). Pass a trained model of this kind; a reward model is trained by inform-rm train."
        )
    unexpected = sorted(str(key) for key in loading["unexpected_keys"])
    if unexpected:
        logger.warning(
            "%s holds %d weights that its class does not use, such as %s.", name, len(unexpected), unexpected[0]
        )


def _device_and_dtype(
    device: str | torch.device | None, dtype: str | torch.dtype | None
) -> tuple[str, str | torch.dtype]:
    """Both as `load_reward_model` takes them, checked, with its defaults."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif str(device) != "auto":
        try:
            kind = torch.device(device).type
        except RuntimeError as error:
            expected = "'cpu', 'cuda', 'cuda:1' or 'auto'"
            raise InputError(f"device: {device!r} is not a device; expected {expected}.") from error
        if kind == "cuda" and not torch.cuda.is_available():
            raise InputError(f"device: {device!r} asks for a GPU, but torch finds none here. Use 'cpu'.")
    target = str(device)
    if dtype is None:
        return target, torch.float32 if target == "cpu" else "auto"
    if not isinstance(dtype, str) or dtype == "auto":
        return target, dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype: {dtype!r} is not a float type; expected 'float32', 'bfloat16', 'float16' or 'auto'.")
    return target, found


def _advice(error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return " Read its code, then allow it with trust_remote_code and a pinned revision."
    if isinstance(error, SafetensorError):
        return " The weight file is incomplete or broken: copy or download it again."
    if "safetensors" in text:
        return " Only safetensors are read; a pickled model is refused."
    return ""
