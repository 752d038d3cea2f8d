"""What a training run will need of each GPU, and how long it will take, before anything is downloaded: `plan`.

Weights are counted on the meta device, a forward and backward pass on fake tensors
(`inform_rm.training.fake_step`); the rest is arithmetic that docs/how-to/plan.md writes out. Memory is in GiB.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from inform_rm.errors import InputError
from inform_rm.training.fake_step import PassCounts, count_pass, layers_of
from inform_rm.training.models import is_quantized
from inform_rm.training.plan_memory import (
    EIGHT_BIT_OPTIMS,
    GIB,
    Machine,
    bytes_at_the_end,
    checkpoints_activations,
    dynamic_parts,
    embedding_names,
    model_on_meta,
    static_parts,
    unit_sizes,
)
from inform_rm.training.reward_arguments import RewardTrainingArguments


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a prompt and of a response; as in docs/results/performance.md, near those of hh-rlhf."""

    prompt: int = 160
    response: int = 82

    @property
    def of_pair(self) -> int:
        """The prompt once, and two responses."""
        return self.prompt + 2 * self.response


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        parameters: of backbone, head and adapters.
        trained_parameters: of these, what is trained.
        head_parameters: of these, the reward head.
        gpus: see `Machine`.
        parts: what the peak of one GPU is made of, in GiB.
        total: their sum; ``finish``: what a quantised run needs at its end, when the base is loaded whole; else 0.
        available: memory of a GPU without the reserve.
        pass_tokens: tokens of one forward pass, ``most_tokens`` of the largest that would fit, about.
        pairs_per_step: of all GPUs together.
        seconds_per_step: at the assumed rate.
        steps: of the run, if they are known.
        notes: what the figures leave out.
    """

    parameters: int
    trained_parameters: int
    head_parameters: int
    gpus: int
    parts: dict[str, float]
    finish: float
    available: float
    pass_tokens: int
    most_tokens: int
    pairs_per_step: int
    seconds_per_step: float
    steps: int | None
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> float:
        """The peak of a GPU, GiB."""
        return sum(self.parts.values())

    @property
    def need(self) -> float:
        """The most that a GPU must hold at any time, GiB."""
        return max(self.total, self.finish)

    @property
    def fits(self) -> bool:
        """Whether a GPU has that much."""
        return self.need <= self.available

    @property
    def pairs_per_second(self) -> float:
        """Of all GPUs together."""
        return self.pairs_per_step / self.seconds_per_step

    @property
    def hours(self) -> float | None:
        """Of the whole run."""
        return None if self.steps is None else self.steps * self.seconds_per_step / 3600


@dataclass(frozen=True)
class Advice:
    """Settings that save memory, and the plan with them."""

    settings: dict[str, Any]
    plan: Plan


def plan(
    args: RewardTrainingArguments,
    config: PretrainedConfig,
    machine: Machine,
    lengths: Lengths | None = None,
    pairs: int | None = None,
) -> Plan:
    """Say what a run needs, from its settings and the backbone's config; no weights are read and none are made.

    ``config`` is that of the backbone (or of an InfoRM model), as `read_config` gives it; ``pairs`` are those of
    training, for the time of a run whose ``max_steps`` is not set.

    Raises:
        InputError: settings that such a run or launch refuses, an optimizer that is not known here, or a model without
            layers.
    """
    lengths = lengths or Lengths()
    if machine.gpus > 1 and args.tokens_per_batch is not None:
        raise InputError("tokens_per_batch: works in one process only. Lower per_device_train_batch_size instead.")
    if faults := args.faults_without_adapters():
        raise InputError("Training settings: " + "; ".join(faults) + ".")
    if machine.shards and is_quantized(args):
        raise InputError("load_in_4bit, load_in_8bit: quantised weights do not train under FSDP here. launch: ddp.")
    model, quantized = model_on_meta(args, config)
    weights = dict(model.named_parameters())
    blocks = layers_of(model)
    batch, passes = args.division
    packed = args.batching == "packed"
    limit = args.tokens_per_batch if packed and args.tokens_per_batch else math.inf
    in_pass = int(max(1, min(batch, limit // lengths.of_pair)))
    shape = (in_pass, lengths.of_pair) if packed else (2 * in_pass, lengths.prompt + lengths.response)
    static = static_parts(args, machine, weights, quantized, embedding_names(model))
    sizes = unit_sizes(model, blocks) if machine.shards else None
    head = sum(weight.numel() for weight in model.score.parameters() if weight.requires_grad)  # peft keeps a copy, too
    if machine.shards:
        model.to(torch.bfloat16)  # what FSDP gathers; it keeps float32
    autocast = args.bf16 or args.fp16 or machine.autocasts
    counts = count_pass(model, *shape, autocast=autocast, read=2 if packed and not args.torch_compile else None)
    dynamic = dynamic_parts(counts, sizes)
    if quantized and not sizes:
        largest = max(weights[name].numel() for name in quantized)
        dynamic["working memory"] += 2 * largest / GIB  # one layer's weights at a time in 16 bits
    pass_tokens = shape[0] * shape[1]
    available = machine.memory - machine.reserve
    of_pass = dynamic["kept for the backward pass"] + dynamic["working memory"]
    left = available - sum(static.values()) - sum(dynamic.values()) + of_pass
    seconds, steps = _seconds_per_step(args, machine, counts, lengths, in_pass), _steps(args, machine, pairs)
    return Plan(
        parameters=sum(weight.numel() for weight in weights.values()),
        trained_parameters=sum(weight.numel() for weight in weights.values() if weight.requires_grad),
        head_parameters=head,
        gpus=machine.gpus,
        parts={name: size for name, size in {**static, **dynamic}.items() if size},
        finish=bytes_at_the_end(args, weights, quantized, static) / GIB,
        available=available,
        pass_tokens=pass_tokens,
        most_tokens=max(0, int(pass_tokens * left / of_pass)),
        pairs_per_step=batch * passes * machine.gpus,
        seconds_per_step=seconds,
        steps=steps,
        notes=_notes(args, machine),
    )


def advise(
    args: RewardTrainingArguments, config: PretrainedConfig, machine: Machine, lengths: Lengths | None = None
) -> tuple[list[Advice], Advice | None]:
    """Plan again with each setting that saves memory; then with the first so many of them that it fits.

    Returns:
        Each setting alone, where the plan with it needs less, and the combination; ``None`` if all of them together do
        not make it fit.
    """

    def planned(settings: dict[str, Any]) -> Advice:
        return Advice(settings, plan(*_changed(args, config, machine, settings), lengths))

    now, alone = planned({}), []
    joined, used = now, []
    for settings in _savers(args, machine):
        found = planned(settings)
        if found.plan.need >= now.plan.need:
            continue
        alone.append(found)
        if not joined.plan.fits:
            joined = planned(joined.settings | settings)
            used.append(settings)
    for settings in list(used):  # no more of them than it takes
        fewer = {name: value for other in used if other is not settings for name, value in other.items()}
        if joined.plan.fits and fewer and (found := planned(fewer)).plan.fits:
            joined = found
            used.remove(settings)
    return alone, joined if joined.plan.fits else None


def read_config(name: str, args: RewardTrainingArguments) -> PretrainedConfig:
    """The config of a backbone: a ``config.json``, a folder, or a Hub id, of which only the config is read."""
    revision = None if Path(name).exists() else args.revision
    try:
        found = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
    except Exception as error:  # transformers and the Hub raise many types for a bad config
        raise InputError(
            f"model: the config of {name} cannot be read: {str(error)[:300]} Name its config.json or its folder: "
            "--config FILE."
        ) from error
    config: PretrainedConfig = found.get_text_config()
    return config


def _seconds_per_step(
    args: RewardTrainingArguments, machine: Machine, counts: PassCounts, lengths: Lengths, in_pass: int
) -> float:
    of_pair = counts.flops / in_pass
    if args.objective == "prioritized":  # every pair of the pool under several prompts, without gradient
        tokens = lengths.of_pair if args.batching == "packed" else 2 * (lengths.prompt + lengths.response)
        of_token = counts.forward_flops / in_pass / tokens
        pool = args.drawn_per_pair * args.division[0]
        own = args.weights == "behavior"  # whose own prompt is nobody else's
        prompts = own * lengths.prompt + (args.num_prompts - own) * lengths.prompt / pool
        of_gap = of_token * (prompts + 2 * args.num_prompts * lengths.response)
        of_pair += args.drawn_per_pair * of_gap * (1 - args.warmup_fraction)
    return math.prod(args.division) * of_pair / (machine.tflops * 1e12 * machine.utilisation)


def _steps(args: RewardTrainingArguments, machine: Machine, pairs: int | None) -> int | None:
    if args.max_steps > 0:
        return args.max_steps
    drawn = math.prod(args.division) * machine.gpus * args.drawn_per_pair
    return None if pairs is None else math.ceil(math.ceil(pairs / drawn) * args.num_train_epochs)


def _notes(args: RewardTrainingArguments, machine: Machine) -> list[str]:
    notes = []
    if args.torch_compile:
        notes.append("torch_compile: not counted; it keeps less for the backward pass")
    if machine.gpus > 1:
        notes.append("the time leaves out what the GPUs send each other")
    if args.behavior_model is not None:
        notes.append("behavior_model: neither its weights nor its time are counted")
    return notes


def _savers(args: RewardTrainingArguments, machine: Machine) -> Iterator[dict[str, Any]]:
    """Settings that save memory and are not yet so, those first that change least."""
    (batch, passes), is_full = args.division, not args.lora_r
    if not checkpoints_activations(args):
        yield {"gradient_checkpointing": True}
    if not (args.bf16 or args.fp16 or machine.autocasts):
        yield {"bf16": True}
    if batch > 1:
        smaller = max(1, batch // 4)
        more = math.ceil(passes * batch / smaller)
        yield {"per_device_train_batch_size": smaller, "gradient_accumulation_steps": more}
    if machine.shards:
        yield {"gpus": 2 * machine.gpus}  # each with the batch that it has: twice the pairs a step
    if is_full and getattr(args.optim, "value", args.optim) not in EIGHT_BIT_OPTIMS and not machine.shards:
        yield {"optim": "adamw_bnb_8bit"}
    if is_full or args.dtype == "float32":
        yield {"lora_r": args.lora_r or 16, "dtype": "bfloat16"}
    if not is_quantized(args) and not machine.shards:
        yield {"lora_r": args.lora_r or 16, "dtype": "bfloat16", "load_in_4bit": True}


def _changed(
    args: RewardTrainingArguments, config: PretrainedConfig, machine: Machine, settings: dict[str, Any]
) -> tuple[RewardTrainingArguments, PretrainedConfig, Machine]:
    settings = dict(settings)
    machine = replace(machine, gpus=settings.pop("gpus", machine.gpus))
    args = copy.copy(args)
    for name, value in settings.items():
        setattr(args, name, value)
    return args, config, machine
