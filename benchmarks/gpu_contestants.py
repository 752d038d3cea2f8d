"""What competes on an accelerator: models, batches, steps. Not a command; `gpu.py` says what it measures."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig

from gpu_attention import profile
from inform_rm import InfoRMConfig, InfoRMForSequenceClassification
from inform_rm.scoring.packed_flex import flex_inputs
from inform_rm.scoring.packing import pack_sequences, packed_attention_of, packed_batches, use_packed_attention
from inform_rm.training.losses import reward_model_loss

LLAMA = {"max_position_embeddings": 4096, "pad_token_id": 0}
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
Batch = list[
    tuple[list[int], int]
]  # sequences with the length of their prompt; pairs: chosen ones, then rejected ones


@dataclass(frozen=True)
class Setting:
    """Where, with how many tokens a forward pass, how many steps."""

    device: torch.device
    tokens: int
    steps: int

    @property
    def pairs(self) -> int:
        """Pairs of a step."""
        return PAIRS_A_STEP if self.device.type == "cuda" else 4

    @property
    def shorter(self) -> int:
        """What all lengths are divided by."""
        return 1 if self.device.type == "cuda" else 8


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
    config = InfoRMConfig(text_config=LlamaConfig(**SHAPES[shape], **LLAMA), architecture=architecture)
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
    fully_shard(model.score)  # in float32: a group has one dtype
    return fully_shard(model)


# --- batches


def pairs_of(generator: Any, setting: Setting, vocabulary: int) -> Batch:
    """Pairs with lengths like those of hh-rlhf."""
    chosen, rejected = [], []
    for _ in range(setting.pairs):
        prompt = draw(generator, 4.8, 0.8, 1024 // setting.shorter, vocabulary)
        for side in (chosen, rejected):
            side.append((prompt + draw(generator, 4.0, 0.9, 512 // setting.shorter, vocabulary), len(prompt)))
    return chosen + rejected


def best_of_16(generator: Any, setting: Setting, vocabulary: int) -> Batch:
    """Prompts of 300 tokens with 16 responses of 100 each; 8 prompts."""
    return responses_to(generator, setting, 8, 300, vocabulary)


def gap_grid(generator: Any, setting: Setting, vocabulary: int) -> Batch:
    """The responses of 8 pairs (100 tokens) under each of 16 prompts (200 tokens)."""
    return responses_to(generator, setting, 16, 200, vocabulary)


def responses_to(generator: Any, setting: Setting, prompts: int, length: int, vocabulary: int) -> Batch:
    length, response = length // setting.shorter, 100 // setting.shorter
    batch: Batch = []
    for _ in range(prompts // setting.shorter):
        prompt = generator.integers(1, vocabulary, length).tolist()
        batch += [(prompt + generator.integers(1, vocabulary, response).tolist(), length) for _ in range(16)]
    return batch


def draw(generator: Any, mean: float, spread: float, most: int, vocabulary: int) -> list[int]:
    length = int(np.clip(generator.lognormal(mean, spread), 2, most))
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
