"""Speed and memory on one accelerator: padded rows, packed rows segment by segment, packed rows with FlexAttention.

    python benchmarks/gpu.py --output runs/gpu                # a card with 80 GiB, about 5 minutes
    python benchmarks/gpu.py --output runs/gpu --dry-run      # tiny shapes on a CPU: that it runs

Weights are random, of the shapes of Llama 3.2 1B and Llama 3.1 8B, in bfloat16; pairs have lengths drawn from two
lognormal distributions fitted to hh-rlhf (helpful-base). "Useful" tokens are those of the separate sequences without
padding; the share of peak FLOPs counts ``6 (backward too) or 2 x parameters x tokens that were computed``, without
attention. Every row is the median of the steps after the first two.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig

from inform_rm import InfoRMConfig, InfoRMForSequenceClassification
from inform_rm.scoring.packed_flex import flex_inputs
from inform_rm.scoring.packing import pack_sequences, packed_attention_of, packed_batches
from inform_rm.training.losses import reward_model_loss
from inform_rm.util.files import versions, write_json

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
Batch = list[tuple[list[int], int]]  # sequences with the length of their prompt: chosen ones first, then rejected ones


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=None)
    parser.add_argument("--tokens", type=int, default=None, help="tokens of a forward pass")
    parser.add_argument("--only", nargs="+", help="contestants, by a part of JOB NAME")
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    dry = arguments.dry_run or not torch.cuda.is_available()
    device = torch.device("cpu" if dry else "cuda")
    tokens = arguments.tokens or (512 if dry else 16384)
    results: dict[str, Any] = {"device": card(device), "versions": versions(), "tokens_per_batch": tokens, "rows": []}
    for shape in arguments.shapes or (["tiny"] if dry else ["1B", "8B"]):
        for job, contestants in (("train", TRAIN), ("best of 16", SCORE)):
            for name in contestants:
                if arguments.only and not any(part in f"{job} {name}" for part in arguments.only):
                    continue
                if dry and "FlexAttention" in name and job == "train":
                    print(f"{shape} {job} {name}: left out, FlexAttention has no backward pass on a CPU")
                    continue
                row = measure(shape, job, name, device, tokens, 3 if dry else arguments.steps)
                results["rows"].append(row)
                print(json.dumps(row), flush=True)
    write_json(arguments.output / "gpu.json", results)
    (arguments.output / "gpu.md").write_text(table(results), encoding="utf-8")
    print(table(results))


def card(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"name": "CPU (dry run)"}
    return {"name": torch.cuda.get_device_name(), "cuda": torch.version.cuda}


def measure(shape: str, job: str, name: str, device: torch.device, tokens: int, steps: int) -> dict[str, Any]:
    """One contestant: median seconds of a step, tokens, peak memory; an error (out of memory) is a row as well."""
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    row: dict[str, Any] = {"shape": shape, "job": job, "contestant": name}
    model = None
    try:
        model = make_model(shape, device, trains=job == "train")
        run = (TRAIN if job == "train" else SCORE)[name]
        batches = list(
            pairs_of(tokens, steps, SHAPES[shape]["vocab_size"])
            if job == "train"
            else best_of_16(steps, SHAPES[shape]["vocab_size"])
        )
        timed = [timed_step(run, model, batch, tokens, device) for batch in batches]
        row |= summarise(timed, batches, model, job, device)
    except (torch.OutOfMemoryError, NotImplementedError, RuntimeError) as error:
        row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
    del model
    return row


def make_model(shape: str, device: torch.device, trains: bool) -> Any:
    config = InfoRMConfig(text_config=LlamaConfig(**SHAPES[shape], max_position_embeddings=4096, pad_token_id=0))
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = InfoRMForSequenceClassification(config)
        torch.set_default_dtype(torch.float32)
    model.train(trains)
    if trains and shape == "8B":
        model.gradient_checkpointing_enable()
    if trains:
        model.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device.type == "cuda")
    return model


def pairs_of(tokens: int, steps: int, vocabulary: int) -> Iterator[Batch]:
    """Batches of 64 pairs with lengths like those of hh-rlhf."""
    generator = np.random.default_rng(0)
    for _ in range(steps):
        chosen, rejected = [], []
        for _ in range(64 if tokens > 1000 else 8):
            prompt = draw(generator, 4.8, 0.8, 12, 1024, vocabulary)
            for side in (chosen, rejected):
                side.append((prompt + draw(generator, 4.0, 0.9, 2, 512, vocabulary), len(prompt)))
        yield chosen + rejected


def best_of_16(steps: int, vocabulary: int) -> Iterator[Batch]:
    """Eight prompts of 300 tokens with 16 responses of 100."""
    generator = np.random.default_rng(0)
    for _ in range(steps):
        batch: Batch = []
        for _ in range(8 if vocabulary > 1000 else 1):
            prompt = generator.integers(1, vocabulary, 300).tolist()
            batch += [(prompt + generator.integers(1, vocabulary, 100).tolist(), 300) for _ in range(16)]
        yield batch


def draw(generator: Any, mean: float, spread: float, least: int, most: int, vocabulary: int) -> list[int]:
    length = int(np.clip(generator.lognormal(mean, spread), least, most))
    return generator.integers(1, vocabulary, length).tolist()


def timed_step(
    run: Callable[..., int], model: Any, batch: Batch, tokens: int, device: torch.device
) -> tuple[float, int]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    computed = run(model, batch, tokens, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, computed


def rows_of(batch: Batch, tokens: int, is_padded: bool) -> list[list[int]]:
    """Places of the batch's pairs (training: i and i + B go together) in forward passes of the budget."""
    half = len(batch) // 2
    if not is_padded:
        prompts = [ids[:length] for ids, length in batch[:half]]
        sizes = [sum(len(ids) - length for ids, length in (batch[i], batch[i + half])) for i in range(half)]
        return packed_batches(prompts, sizes, tokens)
    order = sorted(range(half), key=lambda i: -max(len(batch[i][0]), len(batch[i + half][0])))
    rows: list[list[int]] = [[]]
    for place in order:  # the longest comes first and sets the width
        first = rows[-1][0] if rows[-1] else place
        width = max(len(batch[first][0]), len(batch[first + half][0]))
        if rows[-1] and 2 * width * (len(rows[-1]) + 1) > tokens:
            rows.append([])
        rows[-1].append(place)
    return rows


def padded(sequences: list[list[int]], device: torch.device) -> dict[str, Tensor]:
    width = max(map(len, sequences))
    ids = torch.tensor([[*s, *[0] * (width - len(s))] for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def packed(part: Batch, config: Any, device: torch.device, is_flex: bool) -> dict[str, Any]:
    row = pack_sequences([ids for ids, _ in part], [length for _, length in part])
    inputs = {"input_ids": row.input_ids.to(device), "position_ids": row.position_ids.to(device),
              "packed_segments": row.segments}  # fmt: skip
    if is_flex:
        inputs = flex_inputs(inputs, config, device)
    return {**inputs, "pooled_positions": row.pooled_positions.to(device)}


def train_step(model: Any, batch: Batch, tokens: int, device: torch.device, kind: str) -> int:
    forward = compiled(model) if kind == "compiled" else model
    half, computed = len(batch) // 2, 0
    for places in rows_of(batch, tokens, kind == "padded"):
        part = [batch[i] for i in places] + [batch[i + half] for i in places]
        inputs = (
            padded([ids for ids, _ in part], device)
            if kind == "padded"
            else packed(part, model.config, device, kind != "segments")
        )
        output = forward(**inputs)
        chosen, rejected = output.logits.float().flatten().chunk(2)
        loss = reward_model_loss(chosen, rejected, *output.kl.chunk(2)) * len(places) / half
        loss.backward()
        computed += inputs["input_ids"].numel()
    model.optimizer.step()
    model.optimizer.zero_grad()
    return computed


def score_step(model: Any, batch: Batch, tokens: int, device: torch.device, kind: str) -> int:
    computed = 0
    with torch.no_grad():
        if kind == "padded":
            per_pass = max(1, tokens // 400)
            parts = [batch[start : start + per_pass] for start in range(0, len(batch), per_pass)]
        else:
            places = packed_batches([ids[:n] for ids, n in batch], [len(ids) - n for ids, n in batch], tokens)
            parts = [[batch[i] for i in part] for part in places]
        for part in parts:
            inputs = (
                padded([ids for ids, _ in part], device)
                if kind == "padded"
                else packed(part, model.config, device, kind == "flex")
            )
            model(**inputs)
            computed += inputs["input_ids"].numel()
    return computed


_COMPILED: dict[int, Any] = {}


def compiled(model: Any) -> Any:
    if id(model) not in _COMPILED:
        _COMPILED.clear()
        _COMPILED[id(model)] = torch.compile(model, dynamic=True)
    return _COMPILED[id(model)]


def contestant(step: Callable[..., int], kind: str) -> Callable[..., int]:
    def run(model: Any, batch: Batch, tokens: int, device: torch.device) -> int:
        if kind == "padded":
            return step(model, batch, tokens, device, kind)
        with packed_attention_of(model):
            return step(model, batch, tokens, device, kind)

    return run


TRAIN = {
    "padded, length-grouped, SDPA": contestant(train_step, "padded"),
    "packed, segment by segment": contestant(train_step, "segments"),
    "packed, FlexAttention": contestant(train_step, "flex"),
    "packed, FlexAttention, torch.compile": contestant(train_step, "compiled"),
}
SCORE = {
    "padded, SDPA": contestant(score_step, "padded"),
    "packed, segment by segment": contestant(score_step, "segments"),
    "packed, FlexAttention": contestant(score_step, "flex"),
}


def summarise(
    timed: list[tuple[float, int]], batches: list[Batch], model: Any, job: str, device: torch.device
) -> dict[str, Any]:
    used = list(zip(timed, batches, strict=True))[2:]
    seconds = statistics.median(t for (t, _), _ in used)
    items = len(batches[0]) // 2 if job == "train" else len(batches[0])
    computed = statistics.median(c for (_, c), _ in used)
    useful = statistics.median(sum(len(ids) for ids, _ in batch) for _, batch in used)
    found = {
        "seconds": round(seconds, 4),
        "items_per_second": round(items / seconds, 2),
        "useful_tokens_per_second": round(useful / seconds),
        "computed_tokens": int(computed),
        "first_step_seconds": round(timed[0][0], 2),
    }
    if device.type == "cuda":
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        peak = next((flops for name, flops in PEAK.items() if name in torch.cuda.get_device_name()), None)
        parameters = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
        if peak is not None:
            found["share_of_peak"] = round((6 if job == "train" else 2) * parameters * computed / seconds / peak, 3)
    return found


def table(results: dict[str, Any]) -> str:
    names = (
        "items_per_second",
        "useful_tokens_per_second",
        "computed_tokens",
        "peak_gib",
        "share_of_peak",
        "first_step_seconds",
    )
    lines = [
        f"{results['device']['name']}, torch {torch.__version__}, {results['tokens_per_batch']} tokens a pass", "",
        "| shape | job | contestant | " + " | ".join(names) + " |", "|" + "---|" * (3 + len(names)),
    ]  # fmt: skip
    for row in results["rows"]:
        cells = [row.get("error", "")] if "error" in row else [str(row.get(name, "")) for name in names]
        lines.append("| " + " | ".join([row["shape"], row["job"], row["contestant"], *cells]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
