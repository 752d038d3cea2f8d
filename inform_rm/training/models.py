"""The model to train: backbone, quantisation, adapters."""

import copy
import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel

from inform_rm.errors import InputError
from inform_rm.modeling_inform import InfoRMForSequenceClassification
from inform_rm.safety.checkpoints import check_checkpoint
from inform_rm.scoring.adapters import holds_adapters, import_peft
from inform_rm.scoring.packing import engine_line, use_packed_attention, why_not_packed
from inform_rm.scoring.reward_models import checked_max_length, table_length, trained_length
from inform_rm.scoring.value_heads import find_reward_head, load_with_head
from inform_rm.training.checkpoints import is_fsdp_launch
from inform_rm.training.reward_arguments import RewardTrainingArguments

logger = logging.getLogger(__name__)


def check_model(args: RewardTrainingArguments) -> None:
    """Refuse files of a model that could run code or that lie about what they hold, before anything is read."""
    assert args.model is not None
    if holds_adapters(args.model, args.revision):
        raise InputError(
            f"model: {args.model} holds adapters, not a whole model. Write a whole one first: "
            f"inform-rm export --model {args.model} --output FOLDER"
        )
    try:
        check_checkpoint(args.model, revision=args.revision, trust_remote_code=args.trust_remote_code)
    except OSError as error:  # no such repository, or no way to it
        raise InputError(f"model: {args.model} cannot be loaded as a backbone: {str(error)[:400]}") from error


def longest_input(args: RewardTrainingArguments, model: PreTrainedModel | None = None) -> int | None:
    """``max_length``, or the model's own limit where none is given; a log line says so.

    Of a model that is a name it is read from its config, because data are read before the model is loaded; see
    `check_max_length`.
    """
    if args.max_length is not None:
        return args.max_length
    try:
        found = model.config if model is not None else AutoConfig.from_pretrained(
            str(args.model), revision=args.revision, trust_remote_code=args.trust_remote_code
        )  # fmt: skip
        limit = trained_length(found)
    except Exception as error:  # transformers and the Hub raise many types for a bad config
        raise InputError(f"model: {args.model} cannot be loaded as a backbone: {error}") from error
    if limit is not None and PartialState().is_main_process:
        logger.warning("max_length: %d, the model's own limit, as none is given.", limit)
    return limit


def check_max_length(model: PreTrainedModel, max_length: int | None) -> None:
    """Raise `InputError` where pairs of up to ``max_length`` tokens have more positions than the loaded model."""
    if max_length is not None:
        checked_max_length(model, max_length)
    elif (limit := table_length(model)) is not None:
        raise InputError(
            f"max_length: the model has positions for {limit} tokens and its config does not say so. Set max_length "
            "to that or less."
        )


def load_model(args: RewardTrainingArguments) -> PreTrainedModel:
    """The model to train: a fresh head on a backbone, or a reward model to train further.

    ``architecture: standard`` goes on from the head of any reward model that has one row
    (`inform_rm.scoring.value_heads`).

    With ``load_in_4bit`` or ``load_in_8bit`` the linear layers of the backbone are quantised; embeddings, norms and
    the head are not, and the head is in float32.

    Raises:
        InputError: if the model cannot be loaded, is an InfoRM model of another architecture, or cannot be quantised.
    """
    assert args.model is not None
    hub = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    loading: dict[str, Any] = {
        **hub,
        "dtype": args.dtype if args.dtype == "auto" else getattr(torch, args.dtype),
    }
    if args.attn_implementation is not None:
        loading["attn_implementation"] = args.attn_implementation
    try:
        found = AutoConfig.from_pretrained(args.model, **hub)
        if is_quantized(args):
            loading |= _quantized_loading(args, found)
        if found.model_type != "inform":
            model = load_with_head(
                args.model,
                find_reward_head(args.model, found, revision=args.revision),
                latent_dim=args.latent_dim,
                beta=args.beta,
                decoder=args.decoder,
                kl_reduction=args.kl_reduction,
                architecture=args.architecture,
                **loading,
            )
        else:
            head = ("architecture",) if args.architecture == "standard" else (
                "architecture", "latent_dim", "decoder", "kl_reduction"
            )  # fmt: skip
            for name in head:
                if getattr(found, name) != getattr(args, name):
                    raise InputError(
                        f"{name}: {args.model} has {getattr(found, name)!r}, not {getattr(args, name)!r}. "
                        "A trained head keeps its shape: change the setting."
                    )
            model = InfoRMForSequenceClassification.from_pretrained(args.model, use_safetensors=True, **loading)
    except InputError:
        raise
    except Exception as error:  # transformers, safetensors and the Hub raise many types for a bad checkpoint
        raise InputError(f"model: {args.model} cannot be loaded as a backbone: {error}") from error
    if is_quantized(args):
        _prepare_quantized(model)
    return model


def is_quantized(args: RewardTrainingArguments) -> bool:
    """Whether the run trains adapters on a quantised backbone."""
    return args.load_in_4bit or args.load_in_8bit


def choose_batching(model: Any, args: RewardTrainingArguments) -> str:
    """Packed rows where they are asked for and give the model's own rewards; one log line says what runs and why."""
    reason: str | None
    if args.batching == "padded":
        reason = "asked for"
    elif args.n_gpu > 1:
        reason = "one process drives several GPUs; start it with accelerate launch"
    elif args.neftune_noise_alpha:
        reason = "the noise of neftune_noise_alpha depends on a row's length"
    elif args.torch_compile and args.device.type == "cpu":
        reason = "packed rows do not compile on a CPU (torch 2.13's inductor fails)"
    elif model.config.model_type != "inform":
        reason = f"the model is a {type(model).__name__}, whose forward takes no packed rows"
    else:
        reason = why_not_packed(model)
    level = logging.INFO if reason is None or args.batching == "padded" else logging.WARNING
    autocast = ", autocast to bfloat16" if args.bf16 else ""
    logger.log(level, "Training on %s.", engine_line(model, reason, args.device) + autocast)
    if reason is None:
        use_packed_attention(model)
    return "packed" if reason is None else "padded"


def add_adapters(model: PreTrainedModel, args: RewardTrainingArguments, peft_config: Any = None) -> Any:
    """LoRA on every linear layer of the backbone; the head is trained and saved whole, in float32.

    peft's `prepare_model_for_kbit_training` is not needed for a quantised backbone: peft freezes what is no adapter,
    the Trainer turns checkpointing on where it is asked for, without re-entrance, and the head is float32 already.
    What would be left is embeddings and norms in float32, which `dtype` says.

    A `LoraConfig` as ``peft_config`` takes the place of the settings; what it leaves open is as above.
    """
    peft = import_peft("lora_r: LoRA")
    model.score.float()
    if peft_config is None:
        names = ("lora_alpha", "lora_dropout", "use_dora", "use_rslora")
        lora = peft.LoraConfig(r=args.lora_r, **{name: getattr(args, name) for name in names})
    elif isinstance(peft_config, peft.LoraConfig):
        lora = copy.deepcopy(peft_config)
    else:
        raise InputError(f"peft_config: got a {type(peft_config).__name__}; expected a LoraConfig.")
    lora.task_type = "SEQ_CLS"
    lora.modules_to_save = sorted({*(lora.modules_to_save or []), "score"})
    if lora.target_modules is None:
        lora.target_modules, lora.exclude_modules = "all-linear", r"score(\..*)?"
    # A branch of the Hub moves on: the adapters belong to the commit that was loaded.
    lora.revision = getattr(model.config.get_text_config(), "_commit_hash", None) or args.revision
    adapted = peft.get_peft_model(model, lora)
    # Absolute: the adapters are loaded from any working directory.
    name = str(args.model)
    adapted.peft_config["default"].base_model_name_or_path = str(Path(name).resolve()) if Path(name).is_dir() else name
    return adapted


def _quantized_loading(args: RewardTrainingArguments, found: Any) -> dict[str, Any]:
    """Keywords of ``from_pretrained``: nf4 with double quantisation, or LLM.int8; never for the head."""
    setting = "load_in_4bit" if args.load_in_4bit else "load_in_8bit"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"{setting} needs bitsandbytes. Install it with: pip install 'inform-rm[quant]'")
    if is_fsdp_launch():
        raise InputError(
            f"{setting}: quantised weights under FSDP were never tried here. Launch with DDP, or leave {setting} out."
        )
    if getattr(found, "quantization_config", None) is not None:
        raise InputError(f"{setting}: {args.model} is quantised already. Name the model in full precision.")
    dtype = found.get_text_config().dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    quantization = BitsAndBytesConfig(
        load_in_4bit=args.load_in_4bit,
        load_in_8bit=args.load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if args.bf16 else (dtype or torch.float32),
        llm_int8_skip_modules=["score"],
    )
    device = torch.device("cpu") if args.use_cpu else PartialState().device
    if args.load_in_8bit and args.use_dora and device.type == "cpu":
        raise InputError(
            "use_dora: on a CPU peft 0.21 loses the scales of 8-bit weights under DoRA. Use load_in_4bit or LoRA."
        )
    return {"quantization_config": quantization, "device_map": {"": device}}


def _prepare_quantized(model: Any) -> None:
    """Check that the backbone is quantised, and keep bitsandbytes from breaking the training."""
    layers = [module for module in model.model.modules() if _is_bitsandbytes(module)]
    if not layers:
        raise InputError("model: none of its layers can be quantised. Leave load_in_4bit and load_in_8bit out.")
    for layer in layers:
        # On a CPU with AVX512-BF16 the first pass in eval mode would repack 4-bit weights for a kernel that rounds to
        # bfloat16 and hands no gradient back: after an evaluation, training would go on with wrong gradients.
        layer.support_avx512bf16_for_cpu = False
    model.score.float()
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast)


def _is_no_cast(record: logging.LogRecord) -> bool:
    """False for what is said at each layer and step: that LLM.int8 rounds its inputs to float16."""
    return not record.getMessage().startswith("MatMul8bitLt: inputs will be cast from")


def _is_bitsandbytes(module: nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes") or any(
        type(parameter).__module__.startswith("bitsandbytes") for parameter in module.parameters(recurse=False)
    )
