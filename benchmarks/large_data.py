"""`check-data`, encoding and the start of a training run on many generated pairs: rows a second, memory, seconds.

    python benchmarks/large_data.py --shared DIR --output runs/large-data

Pairs are drawn from the demo's world (`inform_rm.world.worlds`), so they are short: about 50 tokens a side. Each
number comes from a process of its own; the pairs are made once and kept in the output folder.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from contest import cpu_name, packages

TEMPLATE = Path(__file__).parent / "chatml.jinja"
BACKBONE = "models/smollm2-135m-first6-v16k"
ENCODE = """
import sys, time
from accelerate import PartialState
from inform_rm.data.tokenizer import load_tokenizer
from inform_rm.training.reward_arguments import RewardTrainingArguments
from inform_rm.training.data import load_training_pairs
state = PartialState(cpu=True)
config = RewardTrainingArguments(model=sys.argv[1], data=(sys.argv[2],), output_dir="unused", max_length=512)
tokenizer = load_tokenizer(sys.argv[1], chat_template=sys.argv[3])
start = time.perf_counter()
pairs = load_training_pairs(config, config.data, None, tokenizer, "data", config.max_length)
print("SECONDS", time.perf_counter() - start, len(pairs.dataset))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder of real models/")
    parser.add_argument("--output", type=Path, default=Path("runs/large-data"))
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--start-pairs", type=int, default=100_000, help="pairs of the run whose start is timed")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    # A cache of its own: nothing of an earlier call is found in it.
    os.environ["HF_DATASETS_CACHE"] = str(output / "cache" / str(time.time_ns()))
    many, fewer = (generated(output, count) for count in (arguments.pairs, arguments.start_pairs))
    model = str(arguments.shared / BACKBONE)
    results: dict[str, Any] = {}

    def report(name: str, seconds: float, peak_mib: int, pairs: int | None = None) -> None:
        results[name] = {"seconds": seconds, "peak_mib": peak_mib}
        if pairs:
            results[name] |= {"pairs": pairs, "pairs_per_second": pairs / seconds}
        print(name, results[name], flush=True)

    tokenizer = ["--tokenizer", model, "--chat-template", str(TEMPLATE)]
    for name, options in (("check-data", []), ("check-data with the tokenizer", tokenizer)):
        command = ["-m", "inform_rm.cli", "check-data", "--data", str(many), *options]
        seconds, peak, _ = run(command, output / "check-data.log")
        report(name, seconds, peak, arguments.pairs)
    for name in ("reading and encoding", "the same from the cache"):
        seconds, peak, text = run(["-c", ENCODE, model, str(many), str(TEMPLATE)], output / "encode.log")
        inside = next(line.split() for line in text.splitlines() if line.startswith("SECONDS"))
        report(name, float(inside[1]), peak, int(inside[2]))
    for name in ("train, first step, nothing cached", "train, first step, pairs cached"):
        seconds, peak = first_step(model, fewer, output)
        report(name, seconds, peak)

    from inform_rm.util.files import versions, write_json

    write_json(output / "large-data.json", {"cpu": cpu_name(), "versions": versions(), "results": results})
    print(f"{cpu_name()}; {packages(versions())}")


def generated(output: Path, count: int) -> Path:
    """A file of ``count`` pairs of the world."""
    from inform_rm.world.worlds import WorldConfig, make_pairs

    path = output / f"pairs-{count}.jsonl"
    if not path.exists():
        part = path.with_suffix(".part")
        with part.open("w", encoding="utf-8") as file:
            for seed, start in enumerate(range(0, count, 10_000)):
                for row in make_pairs(WorldConfig(seed=seed), "train", min(10_000, count - start)):
                    kept = {name: row[name] for name in ("prompt", "chosen", "rejected")}
                    file.write(json.dumps(kept, ensure_ascii=False) + "\n")
        part.rename(path)
    return path


def run(command: list[str], log: Path) -> tuple[float, int, str]:
    """Seconds, peak memory in MiB and standard output of a Python process."""
    start = time.perf_counter()
    with log.open("w+") as file:
        process = subprocess.Popen([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        file.seek(0)
        text = file.read()
    if status:
        raise SystemExit(f"{' '.join(command[:6])} failed:\n{text[-3000:]}")
    return seconds, usage.ru_maxrss // 1024, text


def first_step(model: str, data: Path, output: Path) -> tuple[float, int]:
    """Seconds from the start of ``inform-rm train`` to its first line of metrics, and its peak memory until then."""
    folder = output / f"run-{time.time_ns()}"
    command = [
        "-m", "inform_rm.cli", "train", "--model", model, "--data", str(data), "--output", str(folder),
        "--max_steps", "1", "--logging_steps", "1", "--per_device_train_batch_size", "8", "--use_cpu", "true",
        "--max_length", "512", "--chat_template", str(TEMPLATE),
    ]  # fmt: skip
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-u", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    seconds = None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if seconds is None and "'loss'" in line:
            seconds = time.perf_counter() - start
    _, status, usage = os.wait4(process.pid, 0)
    if status or seconds is None:
        raise SystemExit("train failed:\n" + "".join(lines)[-3000:])
    return seconds, usage.ru_maxrss // 1024


if __name__ == "__main__":
    main()
