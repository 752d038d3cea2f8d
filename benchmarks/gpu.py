"""Speed and memory on one accelerator: padded rows, packed rows, TRL; training, scoring, the gap grid.

    python benchmarks/gpu.py --output runs/gpu                # a card with 80 GiB, about 8 minutes
    python benchmarks/gpu.py --output runs/gpu --dry-run      # tiny shapes on a CPU: that it runs

Weights are random, of the shapes of Llama 3.2 1B and Llama 3.1 8B, in bfloat16; pairs have lengths drawn from two
lognormal distributions fitted to hh-rlhf (helpful-base). "Useful" tokens are those of the separate sequences without
padding; the share of peak FLOPs counts ``6 (backward too) or 2 x parameters x tokens that were computed``, without
attention. Every row is the median of the steps after the first two (TRL's and the trainer's: their mean).

The most wanted come first; each has a time limit, and what does not fit into ``--budget`` seconds is left out. Rows
are written as they come (``gpu.jsonl``, ``gpu.md``).
"""

import argparse
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from gpu_attention import attention_figures, softcap_figures
from gpu_contestants import (
    SHAPES,
    Setting,
    best_of_16,
    gap_grid,
    measure,
    pairs_of,
    profile_steps,
    score_step,
    sharded,
    train_step,
    with_lora,
    with_qlora,
)
from gpu_trainers import reward_trainer, trl
from inform_rm.util.files import versions

COLUMNS = (
    "items_per_second", "useful_tokens_per_second", "computed_tokens", "peak_gib", "share_of_peak",
    "first_step_seconds",
)  # fmt: skip
_WORTH_A_START = 12  # seconds; with less left of the budget nothing is begun


@dataclass(frozen=True)
class Job:
    """A contestant: what it is called, its run, seconds that it may take, whether it runs on a CPU at all."""

    shape: str
    work: str
    name: str
    run: Callable[[Setting], dict[str, Any]]
    limit: float = 60
    needs_gpu: bool = False


class OutOfTime(Exception):
    """A contestant took longer than it may."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=None)
    parser.add_argument("--tokens", type=int, default=None, help="tokens of a forward pass")
    parser.add_argument("--only", nargs="+", help="contestants, by a part of SHAPE JOB NAME")
    parser.add_argument("--without", nargs="+", default=[], help="leave out those")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--budget", type=float, default=480, help="seconds")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.budget
    dry = arguments.dry_run or not torch.cuda.is_available()
    device = torch.device("cpu" if dry else "cuda")
    setting = Setting(device, arguments.tokens or (512 if dry else 16384), 3 if dry else arguments.steps)
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    about = {"device": card(device), "versions": versions(), "tokens_per_batch": setting.tokens}
    log = arguments.output / "gpu.jsonl"
    log.write_text(json.dumps(about) + "\n", encoding="utf-8")
    print(json.dumps(about), flush=True)
    for job in jobs(arguments.shapes or (["tiny"] if dry else ["1B", "8B"])):
        name = f"{job.shape} {job.work} {job.name}"
        wanted = not arguments.only or any(part in name for part in arguments.only)
        if not wanted or any(part in name for part in arguments.without) or (dry and job.needs_gpu):
            continue
        row = {"shape": job.shape, "job": job.work, "contestant": job.name} | hold(job, setting, deadline)
        rows.append(row)
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        (arguments.output / "gpu.md").write_text(table(about, rows), encoding="utf-8")
        print(json.dumps(row), flush=True)
    print(table(about, rows), flush=True)


def jobs(shapes: list[str]) -> Iterator[Job]:
    """All contestants, the most wanted first."""
    small, large = shapes[0], shapes[-1]
    heads = [(name, [SHAPES[name][key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")])
             for name in dict.fromkeys(shapes)]  # fmt: skip
    flex: dict[str, Any] = {"kind": "flex"}
    yield Job(small, "attention", "soft cap", softcap_figures)
    yield train(small, "padded, length-grouped, SDPA", kind="padded")
    yield train(small, "packed, FlexAttention", **flex)
    yield train(small, "packed, FlexAttention, compiled layers", limit=110, compiles=True, **flex)
    yield Job(small, "train", "TRL, length-grouped, no checkpointing", partial(trl, shape=small, is_best=True))
    yield Job(small, "train", "TRL, its defaults", partial(trl, shape=small, is_best=False))
    yield Job(small, "train", "RewardTrainer, packed", partial(reward_trainer, shape=small))
    yield Job(small, "train", "RewardTrainer, packed, torch_compile",
              partial(reward_trainer, shape=small, compiles=True), limit=110, needs_gpu=True)  # fmt: skip
    yield train(small, "packed, FlexAttention, linear head", architecture="standard", **flex)
    yield Job(small, "profile", "a training step", partial(profile_steps, shape=small), needs_gpu=True)
    for work, make in (("best of 16", best_of_16), ("gap grid", gap_grid)):
        yield score(small, work, make, "padded, SDPA", kind="padded")
        yield score(small, work, make, "packed, FlexAttention", **flex)
    yield score(small, "best of 16", best_of_16, "packed, FlexAttention, compiled layers", compiles=True, **flex)
    yield Job(small, "attention", "FlexAttention", partial(attention_figures, heads=heads[0][1]))
    if small != large:
        yield train(large, "packed, FlexAttention", checkpointing=True, **flex)
        yield train(large, "padded, length-grouped, SDPA", checkpointing=True, kind="padded")
        yield train(large, "packed, FlexAttention, compiled layers", limit=110, checkpointing=True, compiles=True,
                    **flex)  # fmt: skip
    yield train(large, "packed, FlexAttention, LoRA", checkpointing=True, wrap=with_lora, **flex)
    yield train(large, "packed, FlexAttention, QLoRA", checkpointing=True, wrap=with_qlora, **flex)
    yield train(small, "packed, FlexAttention, FSDP2", wrap=sharded, **flex)
    for name, sizes in heads[1:]:
        yield Job(name, "attention", "FlexAttention", partial(attention_figures, heads=sizes))
    yield train(small, "packed, FlexAttention, checkpointing", checkpointing=True, **flex)
    yield score(small, "best of 16", best_of_16, "packed, segment by segment", kind="segments")
    yield train(small, "packed, segment by segment", kind="segments")


def train(shape: str, name: str, *, limit: float = 60, kind: str, **options: Any) -> Job:
    run = partial(measure, shape=shape, make=pairs_of, step=partial(train_step, kind=kind), trains=True, kind=kind)
    return Job(shape, "train", name, partial(run, **options), limit, needs_gpu=kind == "flex")


def score(shape: str, work: str, make: Callable[..., Any], name: str, *, kind: str, compiles: bool = False) -> Job:
    run = partial(measure, shape=shape, make=make, step=partial(score_step, kind=kind), trains=False, kind=kind)
    return Job(shape, work, name, partial(run, compiles=compiles), needs_gpu=compiles)


def hold(job: Job, setting: Setting, deadline: float) -> dict[str, Any]:
    """What a contestant measures of itself, or why there is nothing."""
    left = deadline - time.monotonic()
    if left < _WORTH_A_START:
        return {"error": "left out: the budget is spent"}
    start = time.perf_counter()
    torch.manual_seed(0)
    try:
        if setting.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with at_most(min(job.limit, left)):
            found = job.run(setting)
            if setting.device.type == "cuda":
                found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    except OutOfTime:
        found = {"error": f"more than {min(job.limit, left):.0f} s"}
    except Exception as error:  # one contestant's fault is not the others'
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"}
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
        found["left_gib"] = round(torch.cuda.memory_allocated() / 2**30, 2)
    return {**found, "wall_seconds": round(time.perf_counter() - start, 1)}


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the block after so many seconds; a call into compiled code ends first."""

    def stop(_signal: int, _frame: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def card(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"name": "CPU (dry run)"}
    properties = torch.cuda.get_device_properties(0)
    return {"name": properties.name, "gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda}


def table(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{about['device']['name']}, torch {torch.__version__}, {about['tokens_per_batch']} tokens a pass", "",
        "| shape | job | contestant | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (3 + len(COLUMNS)),
    ]  # fmt: skip
    for row in rows:
        cells = [row.get("error") or row.get("figures", "")]
        if not cells[0]:
            cells = [str(row.get(name, "")) for name in COLUMNS]
        lines.append("| " + " | ".join([row["shape"], row["job"], row["contestant"], *cells]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
    # Compilers leave threads behind that would hold the machine.
    sys.stdout.flush()
    os._exit(0)
