"""What the memory of one GPU is made of in a training run; `inform_rm.training.plan` adds it up."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor, nn
from transformers import PretrainedConfig

from inform_rm.configuration_inform import InfoRMConfig
from inform_rm.errors import InputError
from inform_rm.modeling_inform import InfoRMForSequenceClassification
from inform_rm.training.fake_step import PassCounts
from inform_rm.training.half_precision import COMPENSATED_OPTIM
from inform_rm.training.models import add_adapters, is_quantized
from inform_rm.training.reward_arguments import RewardTrainingArguments

GIB = 2**30
_LAUNCHES = Path(__file__).parent / "accelerate_configs"
# Bytes of a weight that bitsandbytes holds: nf4 with its scales, of 64 weights one of 8 bits and of 256 scales one of
# 32 (arXiv:2305.14314, section 3), and LLM.int8, whose scale a row is not counted.
_QUANTIZED_BYTES = {"load_in_4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "load_in_8bit": 1.0}
_EIGHT_BIT_STATES = 2 * (1 + 4 / 256)  # two of 8 bits, and of 256 of each a scale
_STATES_OF_A_WEIGHT = {"adamw_torch": 2, "adamw_torch_fused": 2, "sgd": 0, COMPENSATED_OPTIM: 2}
EIGHT_BIT_OPTIMS = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")


@dataclass(frozen=True)
class Machine:
    """Where a run is to go; `inform_rm.cli.plan` says what the fields are.

    An H100 or H200 has 989 ``tflops`` in bfloat16. One H200 reached a ``utilisation`` of 0.30 on a model of 1B and of
    0.45 on one of 8B with activation checkpointing, of all operations executed (docs/results/performance.md).
    """

    gpus: int = 1
    memory: float = 80.0
    launch: Literal["fsdp2", "ddp"] = "fsdp2"
    tflops: float = 989.0
    utilisation: float = 0.35
    reserve: float = 2.0

    def __post_init__(self) -> None:
        for name in ("gpus", "memory", "tflops", "utilisation"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}: {getattr(self, name)}; expected a number above 0.")
        if self.utilisation > 1:
            raise InputError(f"utilisation: {self.utilisation}; it is a share of the peak, at most 1.")
        if not 0 <= self.reserve < math.inf:
            raise InputError(f"reserve: {self.reserve}; expected GiB, 0 or more.")
        if self.launch not in ("fsdp2", "ddp"):
            raise InputError(f"launch: {self.launch!r}; expected fsdp2 or ddp.")

    @property
    def shards(self) -> bool:
        """Whether the GPUs divide the weights among them."""
        return self.gpus > 1 and self.launch == "fsdp2"

    @property
    def autocasts(self) -> bool:
        """Whether the launch turns mixed precision on, whatever the run's settings say."""
        if self.gpus == 1:
            return False
        launch = yaml.safe_load((_LAUNCHES / f"{self.launch}.yaml").read_text(encoding="utf-8"))
        return bool(launch["mixed_precision"] == "bf16")


def model_on_meta(args: RewardTrainingArguments, config: PretrainedConfig) -> tuple[Any, set[str]]:
    """The model that `load_model` and `add_adapters` would make, and the names of the weights that are quantised."""
    dtype: Any = config.dtype or torch.float32 if args.dtype == "auto" else getattr(torch, args.dtype)
    names = ("architecture", "latent_dim", "decoder", "kl_reduction", "beta")
    inform = InfoRMConfig(copy.deepcopy(config), **{name: getattr(args, name) for name in names})
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model: Any = InfoRMForSequenceClassification(inform).train()
    finally:
        torch.set_default_dtype(usual)
    if checkpoints_activations(args):
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "preserve_rng_state": False})  # the random state is no fake tensor
    linear: dict[int, Tensor] = {}
    if is_quantized(args):
        linear = {
            id(module.weight): module.weight for module in model.model.modules() if isinstance(module, nn.Linear)
        }
        for weight in linear.values():  # what bitsandbytes computes with
            weight.data = weight.data.to(torch.bfloat16 if args.bf16 else dtype)
    if args.lora_r:
        with torch.device("meta"):
            model = add_adapters(model, args)
    return model, {name for name, weight in model.named_parameters() if id(weight) in linear}


def checkpoints_activations(args: RewardTrainingArguments) -> bool:
    """Whether the layers' inner states are computed twice instead of kept."""
    return bool(args.gradient_checkpointing or getattr(args, "activation_checkpointing", False))


def embedding_names(model: nn.Module) -> set[str]:
    """Names of the weights that are looked up."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {name for name, weight in model.named_parameters() if id(weight) in embeddings}


def static_parts(
    args: RewardTrainingArguments,
    machine: Machine,
    weights: dict[str, nn.Parameter],
    quantized: set[str],
    embeddings: set[str],
) -> dict[str, float]:
    """What is there all the time, GiB of one GPU."""
    trained = {name: weight for name, weight in weights.items() if weight.requires_grad}

    def held(weight: Tensor) -> int:  # under FSDP2 Accelerate makes trained weights float32
        return 4 if machine.shards and weight.requires_grad else weight.element_size()

    small = next((size for name, size in _QUANTIZED_BYTES.items() if getattr(args, name)), 0.0)
    sizes = {
        "weights": sum(
            weight.numel() * (small if name in quantized else held(weight)) for name, weight in weights.items()
        ),
        "gradients": sum(weight.numel() * held(weight) for weight in trained.values()),
        "optimizer": sum(
            weight.numel() * _state_bytes(args, held(weight), name in embeddings) for name, weight in trained.items()
        ),
    }  # fmt: skip
    if machine.gpus > 1 and not machine.shards:
        sizes["gradients in the buckets of DDP"] = sizes["gradients"]
    share = machine.gpus if machine.shards else 1
    return {name: size / share / GIB for name, size in sizes.items()}


def _state_bytes(args: RewardTrainingArguments, item: int, is_embedding: bool) -> float:
    """Bytes of the optimizer's state of one weight of ``item`` bytes."""
    optim = getattr(args.optim, "value", args.optim)
    if optim in EIGHT_BIT_OPTIMS:
        return 8 if is_embedding else _EIGHT_BIT_STATES  # transformers keeps the states of embeddings in 32 bits
    if optim not in _STATES_OF_A_WEIGHT:
        known = ", ".join((*_STATES_OF_A_WEIGHT, *EIGHT_BIT_OPTIMS))
        raise InputError(f"optim: what {optim!r} keeps of a weight is not known here. Plan with one of {known}.")
    compensation = item if optim == COMPENSATED_OPTIM and item < 4 else 0
    return _STATES_OF_A_WEIGHT[optim] * item + compensation


def unit_sizes(model: nn.Module, blocks: nn.ModuleList) -> dict[str, int]:
    """Weights of the largest block and of all that is in none, which FSDP2 gathers whole; so many are trained."""

    def numbers(weights: Any) -> tuple[int, int]:
        weights = list(weights)
        trained = sum(weight.numel() for weight in weights if weight.requires_grad)
        return sum(weight.numel() for weight in weights), trained

    everything, all_trained = numbers(model.parameters())
    of_blocks = [numbers(block.parameters()) for block in blocks]
    block, block_trained = max(of_blocks)
    return {
        "block": block,
        "trained in block": block_trained,
        "root": everything - sum(number for number, _ in of_blocks),
        "trained in root": all_trained - sum(number for _, number in of_blocks),
    }


def dynamic_parts(counts: PassCounts, sizes: dict[str, int] | None) -> dict[str, float]:
    """What comes and goes within a pass, GiB of one GPU."""
    gathered: dict[str, float] = {}
    in_layers, in_embedding = counts.layers_bytes, counts.embedding_bytes
    if sizes is not None:
        # In bfloat16: a block, the next one, and what is in no block, until the end of the backward pass. The
        # gradients of a block are whole, and once more in the buffer of the reduction; so are then those of the rest.
        gathered["gathered weights"] = 2 * (2 * sizes["block"] + sizes["root"]) / GIB
        in_layers += 4 * sizes["trained in block"]
        in_embedding += 4 * sizes["trained in root"]
    return {
        "kept for the backward pass": counts.kept_bytes / GIB,
        "working memory": (max(in_layers, in_embedding) - counts.kept_bytes) / GIB,
        **gathered,
    }


def bytes_at_the_end(
    args: RewardTrainingArguments, weights: dict[str, nn.Parameter], quantized: set[str], static: dict[str, float]
) -> float:
    """Of a quantised run: the base whole, beside what was trained (`inform_rm.training.run`)."""
    if not quantized:
        return 0.0
    item = 4 if args.dtype == "float32" else 2
    return sum(static.values()) * GIB + sum(weight.numel() * item for weight in weights.values())
