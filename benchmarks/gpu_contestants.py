"""What competes on an accelerator: models, batches, steps. Not a command; `gpu.py` says what it measures."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from gpu_attention import attention_figures, profile, softcap_figures
from torch import Tensor
from transformers import AutoModelForSequenceClassification, LlamaConfig, TrainerCallback

from inform_rm import InfoRMConfig, InfoRMForSequenceClassification
from inform_rm.scoring.packed_flex import flex_inputs
from inform_rm.scoring.packing import pack_sequences, packed_attention_of, packed_batches, use_packed_attention
from inform_rm.training.losses import reward_model_loss

_LLAMA = {"max_position_embeddings": 4096, "pad_token_id": 0}
SHAPES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512},
}  # fmt: skip
# bfloat16 products without sparsity, FLOP/s, from NVIDIA's data sheets.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
PAIRS_A_STEP = 64
Batch = list[tuple[list[int], int]]  # sequences with the length of their prompt; pairs: chosen ones, then rejected ones


@dataclass(frozen=True)
class Setting:
    """Where, with how many tokens a forward pass, how many steps."""

    device: torch.device
    tokens: int
    steps: int

    @property
    def pairs(self) -> int:
        """Pairs of a step."""
        return PAIRS_A_STEP if self.device.type == "cuda" else 8


@dataclass(frozen=True)
class Job:
    """A contestant: what it is called, its run, seconds that it may take, whether it runs on a CPU at all."""

    shape: str
    work: str
    name: str
    run: Callable[[Setting], dict[str, Any]]
    limit: float = 60
    needs_gpu: bool = False


def jobs(shapes: list[str]) -> Iterator[Job]:
    """All contestants, the most wanted first."""
    small, large = shapes[0], shapes[-1]
    heads = [(name, [SHAPES[name][key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")])
             for name in dict.fromkeys(shapes)]  # fmt: skip
    flex: dict[str, Any] = {"kind": "flex"}
    yield Job(small, "attention", "soft cap", softcap_figures)
    yield Job(small, "attention", "FlexAttention, varlen", partial(attention_figures, heads=heads[0][1]))
    yield train(small, "padded, length-grouped, SDPA", kind="padded")
    yield train(small, "packed, FlexAttention", **flex)
    yield train(small, "packed, FlexAttention, compiled layers", limit=110, compiles=True, **flex)
    yield Job(small, "train", "TRL, length-grouped, no checkpointing", partial(trl, shape=small, is_best=True))
    yield Job(small, "train", "TRL, its defaults", partial(trl, shape=small, is_best=False))
    yield Job(small, "train", "RewardTrainer, packed", partial(reward_trainer, shape=small), needs_gpu=True)
    yield train(small, "packed, FlexAttention, linear head", architecture="standard", **flex)
    yield Job(small, "profile", "a training step", partial(profile_steps, shape=small), needs_gpu=True)
    for work, make in (("best of 16", best_of_16), ("gap grid", gap_grid)):
        yield score(small, work, make, "padded, SDPA", kind="padded")
        yield score(small, work, make, "packed, FlexAttention", **flex)
    yield score(small, "best of 16", best_of_16, "packed, FlexAttention, compiled layers", compiles=True, **flex)
    if small != large:
        yield train(large, "packed, FlexAttention", checkpointing=True, **flex)
        yield train(large, "padded, length-grouped, SDPA", checkpointing=True, kind="padded")
        yield train(large, "packed, FlexAttention, compiled layers", limit=110, checkpointing=True, compiles=True,
                    **flex)  # fmt: skip
    yield train(large, "packed, FlexAttention, LoRA", checkpointing=True, wrap=with_lora, **flex)
    yield train(large, "packed, FlexAttention, QLoRA", checkpointing=True, wrap=with_qlora, **flex)
    yield train(small, "packed, FlexAttention, FSDP2", wrap=sharded, **flex)
    for name, sizes in heads[1:]:
        yield Job(name, "attention", "FlexAttention, varlen", partial(attention_figures, heads=sizes))
    yield train(small, "packed, FlexAttention, checkpointing", checkpointing=True, **flex)
    yield score(small, "best of 16", best_of_16, "packed, segment by segment", kind="segments")
    yield train(small, "packed, segment by segment", kind="segments")


def train(shape: str, name: str, *, limit: float = 60, kind: str, **options: Any) -> Job:
    run = partial(measure, shape=shape, make=pairs_of, step=partial(train_step, kind=kind), trains=True, kind=kind)
    return Job(shape, "train", name, partial(run, **options), limit, needs_gpu=kind == "flex")


def score(shape: str, work: str, make: Callable[..., Batch], name: str, *, kind: str, compiles: bool = False) -> Job:
    run = partial(measure, shape=shape, make=make, step=partial(score_step, kind=kind), trains=False, kind=kind)
    return Job(shape, work, name, partial(run, compiles=compiles), needs_gpu=compiles)


def measure(
    setting: Setting, *, shape: str, make: Callable[..., Batch], step: Callable[..., int], trains: bool, kind: str,
    compiles: bool = False, checkpointing: bool = False, architecture: str = "inform",
    wrap: Callable[[Any], Any] = lambda model: model,
) -> dict[str, Any]:  # fmt: skip
    """Median seconds of a step, tokens a second, share of peak."""
    model = make_model(shape, setting.device, trains, architecture)
    config, parameters = model.config, linear_parameters(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if compiles:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    if kind != "padded":
        use_packed_attention(model)
    model = wrap(model)
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=1e-6, fused=setting.device.type == "cuda") if trains else None
    generator = np.random.default_rng(0)
    batches = [make(generator, setting, SHAPES[shape]["vocab_size"]) for _ in range(setting.steps)]
    seconds, computed = [], []
    for batch in batches:
        start = now(setting.device)
        computed.append(step(model, batch, setting, config, optimizer))
        seconds.append(now(setting.device) - start)
    useful = [sum(len(ids) for ids, _ in batch) for batch in batches]
    items = len(batches[0]) // 2 if trains else len(batches[0])
    found = summarise(statistics.median(seconds[2:]), items, statistics.median(useful[2:]), setting)
    done = statistics.median(computed[2:])
    return found | {
        "computed_tokens": int(done), "first_step_seconds": round(seconds[0], 2),
        "all_seconds": [round(value, 4) for value in seconds],
    } | share_of_peak(parameters * done * (6 if trains else 2) / statistics.median(seconds[2:]))  # fmt: skip


def summarise(seconds: float, items: int, useful: float, setting: Setting) -> dict[str, Any]:
    return {
        "seconds": round(seconds, 4), "items_per_second": round(items / seconds, 2),
        "useful_tokens_per_second": round(useful / seconds),
    }  # fmt: skip


def share_of_peak(flops: float) -> dict[str, float]:
    if not torch.cuda.is_available():
        return {}
    peak = next((value for name, value in PEAK.items() if name in torch.cuda.get_device_name()), None)
    return {} if peak is None else {"share_of_peak": round(flops / peak, 3)}


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def make_model(shape: str, device: torch.device, trains: bool, architecture: str = "inform") -> Any:
    config = InfoRMConfig(text_config=LlamaConfig(**SHAPES[shape], **_LLAMA), architecture=architecture)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return InfoRMForSequenceClassification(config).train(trains)
    finally:
        torch.set_default_dtype(torch.float32)


def linear_parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()


def with_lora(model: Any) -> Any:
    """Rank 16 on all linear layers of the backbone; the head is trained, too."""
    import peft

    lora = peft.LoraConfig(r=16, task_type="SEQ_CLS", modules_to_save=["score"], target_modules="all-linear",
                           exclude_modules=r"score(\..*)?")  # fmt: skip
    return peft.get_peft_model(model, lora)


def with_qlora(model: Any) -> Any:
    """The same on 4-bit weights (nf4, double quantisation)."""
    import bitsandbytes as bnb

    for layer in model.model.layers:
        for name, linear in list(layer.named_modules()):
            if isinstance(linear, torch.nn.Linear):
                device = linear.weight.device
                small = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, False, torch.bfloat16, True, "nf4", device="meta"
                )
                small.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4").to(device)
                parent, _, child = name.rpartition(".")
                setattr(layer.get_submodule(parent), child, small)
    model.is_loaded_in_4bit = True  # what peft asks for
    return with_lora(model)


def sharded(model: Any) -> Any:
    """FSDP2 over the one card: what wrapping alone costs."""
    from torch.distributed import HashStore, init_process_group, is_initialized
    from torch.distributed.fsdp import fully_shard

    if not is_initialized():
        init_process_group("nccl", store=HashStore(), rank=0, world_size=1)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


# --- batches


def pairs_of(generator: Any, setting: Setting, vocabulary: int) -> Batch:
    """Pairs with lengths like those of hh-rlhf."""
    chosen, rejected = [], []
    for _ in range(setting.pairs):
        prompt = draw(generator, 4.8, 0.8, 12, 1024, vocabulary)
        for side in (chosen, rejected):
            side.append((prompt + draw(generator, 4.0, 0.9, 2, 512, vocabulary), len(prompt)))
    return chosen + rejected


def best_of_16(generator: Any, setting: Setting, vocabulary: int) -> Batch:
    """Prompts of 300 tokens with 16 responses of 100 each; 8 prompts."""
    return responses_to(generator, 8 if setting.device.type == "cuda" else 1, 300, 16, vocabulary)


def gap_grid(generator: Any, setting: Setting, vocabulary: int) -> Batch:
    """The responses of 8 pairs (100 tokens) under each of 16 prompts (200 tokens)."""
    return responses_to(generator, 16 if setting.device.type == "cuda" else 2, 200, 16, vocabulary)


def responses_to(generator: Any, prompts: int, length: int, responses: int, vocabulary: int) -> Batch:
    batch: Batch = []
    for _ in range(prompts):
        prompt = generator.integers(1, vocabulary, length).tolist()
        batch += [(prompt + generator.integers(1, vocabulary, 100).tolist(), length) for _ in range(responses)]
    return batch


def draw(generator: Any, mean: float, spread: float, least: int, most: int, vocabulary: int) -> list[int]:
    length = int(np.clip(generator.lognormal(mean, spread), least, most))
    return generator.integers(1, vocabulary, length).tolist()


def padded_parts(batch: Batch, tokens: int, group: int) -> list[list[int]]:
    """Places 0, 1, ... of groups of ``group`` rows in passes of the budget, by length; the longest sets the width."""
    number = len(batch) // group
    widths = [max(len(batch[place + number * k][0]) for k in range(group)) for place in range(number)]
    parts: list[list[int]] = [[]]
    for place in sorted(range(number), key=lambda place: -widths[place]):
        if parts[-1] and group * widths[parts[-1][0]] * (len(parts[-1]) + 1) > tokens:
            parts.append([])
        parts[-1].append(place)
    return parts


def padded(sequences: list[list[int]], device: torch.device) -> dict[str, Tensor]:
    width = max(map(len, sequences))
    ids = torch.tensor([[*s, *[0] * (width - len(s))] for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def inputs_of(part: Batch, config: Any, setting: Setting, kind: str) -> dict[str, Any]:
    device = setting.device
    if kind == "padded":
        return padded([ids for ids, _ in part], device)
    row = pack_sequences([ids for ids, _ in part], [length for _, length in part])
    inputs = {"input_ids": row.input_ids.to(device), "position_ids": row.position_ids.to(device),
              "packed_segments": row.segments}  # fmt: skip
    if kind == "flex":
        inputs = flex_inputs(inputs, config, device)
    return {**inputs, "pooled_positions": row.pooled_positions.to(device)}


# --- steps


def train_step(model: Any, batch: Batch, setting: Setting, config: Any, optimizer: Any, *, kind: str) -> int:
    half, computed = len(batch) // 2, 0
    if kind == "padded":
        parts = padded_parts(batch, setting.tokens, 2)
    else:
        sizes = [len(batch[i][0]) + len(batch[i + half][0]) - 2 * batch[i][1] for i in range(half)]
        parts = packed_batches([ids[:length] for ids, length in batch[:half]], sizes, setting.tokens)
    for places in parts:
        part = [batch[i] for i in places] + [batch[i + half] for i in places]
        inputs = inputs_of(part, config, setting, kind)
        output = model(**inputs)
        chosen, rejected = output.logits.float().flatten().chunk(2)
        kl = (None, None) if output.kl is None else output.kl.chunk(2)
        (reward_model_loss(chosen, rejected, *kl) * len(places) / half).backward()
        computed += inputs["input_ids"].numel()
    optimizer.step()
    optimizer.zero_grad()
    return computed


@torch.no_grad()
def score_step(model: Any, batch: Batch, setting: Setting, config: Any, _optimizer: Any, *, kind: str) -> int:
    if kind == "padded":
        parts = padded_parts(batch, setting.tokens, 1)
    else:
        parts = packed_batches([ids[:n] for ids, n in batch], [len(ids) - n for ids, n in batch], setting.tokens)
    computed = 0
    for places in parts:
        inputs = inputs_of([batch[place] for place in places], config, setting, kind)
        model(**inputs)
        computed += inputs["input_ids"].numel()
    return computed


def profile_steps(setting: Setting, shape: str) -> dict[str, Any]:
    model = make_model(shape, setting.device, trains=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    batch = pairs_of(np.random.default_rng(0), setting, SHAPES[shape]["vocab_size"])
    with packed_attention_of(model):
        return profile(lambda: train_step(model, batch, setting, model.config, optimizer, kind="flex"))


# --- trainers


class StepTimes(TrainerCallback):
    """When each step ended."""

    def __init__(self, device: torch.device):
        self.device, self.ends = device, []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(now(self.device))


def trained(trainer: Any, times: StepTimes, pairs: list[Batch], setting: Setting) -> dict[str, Any]:
    """Mean seconds of the steps after the second."""
    start = now(setting.device)
    trainer.train()
    seconds = (times.ends[-1] - times.ends[1]) / (len(times.ends) - 2)
    useful = statistics.mean(sum(len(ids) for ids, _ in batch) for batch in pairs[2:])
    found = summarise(seconds, setting.pairs, useful, setting)
    return found | {"first_step_seconds": round(times.ends[0] - start, 2), "steps": len(times.ends)}


def common_arguments(setting: Setting) -> dict[str, Any]:
    on_gpu = setting.device.type == "cuda"
    return {
        "num_train_epochs": 1, "learning_rate": 1e-6, "report_to": "none", "seed": 0, "save_strategy": "no",
        "logging_strategy": "no", "disable_tqdm": True, "train_sampling_strategy": "sequential", "bf16": on_gpu,
        "use_cpu": not on_gpu,
    }  # fmt: skip


def plain_tokenizer(vocabulary: int) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0} | {f"w{number}": number for number in range(1, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="w2")


def trl(setting: Setting, shape: str, is_best: bool) -> dict[str, Any]:
    """TRL's RewardTrainer, 8 pairs a pass (its default): shuffled and checkpointed, or by length and not."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    generator = np.random.default_rng(0)
    pairs = [pairs_of(generator, setting, SHAPES[shape]["vocab_size"]) for _ in range(setting.steps)]
    sides = [(batch[i][0], batch[i + len(batch) // 2][0]) for batch in pairs for i in range(len(batch) // 2)]
    per_pass = min(8, setting.pairs)
    if is_best:  # what length-grouped sampling makes of a large set: passes of equal lengths, in any order
        sides.sort(key=lambda pair: max(map(len, pair)))
        passes = [sides[start : start + per_pass] for start in range(0, len(sides), per_pass)]
        sides = [pair for number in generator.permutation(len(passes)) for pair in passes[number]]
    config = LlamaConfig(**SHAPES[shape], **_LLAMA, num_labels=1)
    with torch.device(setting.device):
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    times = StepTimes(setting.device)
    with TemporaryDirectory() as folder:
        arguments = RewardConfig(
            folder, max_length=None, per_device_train_batch_size=per_pass,
            gradient_accumulation_steps=setting.pairs // per_pass,
            **({"gradient_checkpointing": False} if is_best else {}), **common_arguments(setting),
        )  # fmt: skip
        trainer = RewardTrainer(
            model=model, args=arguments, processing_class=plain_tokenizer(SHAPES[shape]["vocab_size"]),
            train_dataset=Dataset.from_dict({"chosen_ids": [c for c, _ in sides], "rejected_ids": [r for _, r in sides]}),
            callbacks=[times],
        )  # fmt: skip
        return trained(trainer, times, pairs, setting)


def reward_trainer(setting: Setting, shape: str) -> dict[str, Any]:
    """Ours as ``inform-rm train`` runs it, with the same pairs."""
    from datasets import Dataset

    from inform_rm.training.reward_arguments import RewardTrainingArguments
    from inform_rm.training.trainer import RewardTrainer

    generator = np.random.default_rng(0)
    pairs = [pairs_of(generator, setting, SHAPES[shape]["vocab_size"]) for _ in range(setting.steps)]
    rows = []
    for batch in pairs:
        for (chosen, length), (rejected, _) in zip(*np.array_split(np.array(batch, dtype=object), 2), strict=True):
            rows.append({"chosen_input_ids": chosen, "rejected_input_ids": rejected, "prompt_length": length,
                         "length": max(len(chosen), len(rejected)), "margin": None, "id": str(len(rows))})  # fmt: skip
    times = StepTimes(setting.device)
    with TemporaryDirectory() as folder:
        arguments = RewardTrainingArguments(
            str(Path(folder) / "run"), per_device_train_batch_size=setting.pairs, gradient_accumulation_steps=1,
            kl_warmup_steps=0, tokens_per_batch=setting.tokens, max_length=2048, **common_arguments(setting),
        )  # fmt: skip
        trainer = RewardTrainer(
            model=make_model(shape, setting.device, trains=True), args=arguments, train_dataset=Dataset.from_list(rows),
            processing_class=plain_tokenizer(SHAPES[shape]["vocab_size"]), callbacks=[times],
        )  # fmt: skip
        return trained(trainer, times, pairs, setting) | {"batching": trainer.batching}
