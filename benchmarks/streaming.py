"""Streaming of many pairs: memory over time, pairs a second, seconds to the first batch and past a resume position.

    python benchmarks/streaming.py --shared DIR --output runs/streaming

Pairs are drawn from the demo's world (`inform_rm.world.worlds`), several prompts and responses joined to a realistic
length, and lie in a folder of 20 Parquet files. Each measurement has a process of its own, which iterates and encodes
without training; its resident memory is sampled, with what its workers do not share with it.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from contest import cpu_name, packages

TEMPLATE = Path(__file__).parent / "chatml.jinja"
BACKBONE = "models/smollm2-135m-first6-v16k"
FILES = 20
ITERATE = """
import itertools, json, resource, sys, time
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
start = time.perf_counter()
from inform_rm.data.tokenizer import load_tokenizer
from inform_rm.training.stream_sources import open_stream
from inform_rm.training.streaming import EncodedStream
from inform_rm.training.collators import PackedPairCollator
from inform_rm.util.files import write_json
model, data, template = sys.argv[1:4]
pairs, workers, skipped, processes = map(int, sys.argv[4:])
tokenizer = load_tokenizer(model, chat_template=template)
loaded = time.perf_counter()
source = open_stream([data], seed=0, shuffle_buffer=10_000)
opened = time.perf_counter()
args = SimpleNamespace(train_batch_size=8, process_index=0, world_size=processes, dataloader_num_workers=workers,
                       dataloader_pin_memory=False, dataloader_prefetch_factor=None)
stream = EncodedStream(source, tokenizer, args, max_length=1024)
if skipped:
    folder = Path(mkdtemp())
    write_json(folder / "stream_0.json", {"batches": skipped // 8, "places": [[0, 0, skipped - 1]], "counts": {}})
    stream.load(folder)
loader = iter(stream.loader(PackedPairCollator(2048)))
tokens, first = 0, None
for batch in itertools.islice(loader, max(1, pairs // 8 // processes)):
    stream.take(batch)
    first = first or time.perf_counter()
    tokens += batch["input_ids"].shape[1]
count = stream.counts.pairs
end = time.perf_counter()
del loader  # ends the workers, whose time counts then
cpu = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print("MEASURED", json.dumps({"pairs": count, "import_and_tokenizer_seconds": loaded - start,
      "open_seconds": opened - loaded, "first_batch_seconds": first - opened,
      "pairs_per_second": (count - 8) / (end - first) if count > 8 else None, "tokens_per_pair": tokens / count,
      "cpu_seconds": cpu, "passes": stream.counts.passes}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder of real models/")
    parser.add_argument("--output", type=Path, default=Path("runs/streaming"))
    parser.add_argument("--pairs", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument(
        "--processes", type=int, default=1,
        help="be the first of so many: all rows are read, and the share of one process is encoded",
    )  # fmt: skip
    parser.add_argument("--skip", type=int, default=500_000, help="pairs before the resume position that is timed")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    model = str(arguments.shared / BACKBONE)
    results: dict[str, Any] = {}
    curves = {}
    for count in arguments.pairs:
        data = generated(output, count)
        for workers in arguments.workers:
            name = f"{count} pairs, {workers} workers"
            results[name], curves[name] = measured(model, data, count, workers, 0, arguments.processes)
            print(name, results[name], flush=True)
    most = max(arguments.pairs)
    skipped = min(arguments.skip, most // 2)
    if skipped:
        name = f"first batch after {skipped} of {most} pairs"
        results[name], _ = measured(model, generated(output, most), 8, 0, skipped, 1)
        print(name, results[name], flush=True)

    from inform_rm.util.files import versions, write_json

    report = {"cpu": cpu_name(), "versions": versions(), "processes": arguments.processes, "results": results,
              "curves": curves}  # fmt: skip
    write_json(output / "streaming.json", report)
    plot(curves, output / "memory.png")
    print(f"{cpu_name()}; {packages(versions())}")


def generated(output: Path, count: int) -> Path:
    """A folder of Parquet files with ``count`` pairs of the world."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from inform_rm.world.worlds import WorldConfig, make_pairs

    folder = output / f"pairs-{count}"
    if not folder.exists():
        part = folder.with_suffix(".part")
        part.mkdir(exist_ok=True)
        # Longer texts than the world's own: a dialogue of four of its prompts, two to five of its responses as one.
        rows = [
            {name: row[name] for name in ("prompt", "chosen", "rejected")}
            for row in make_pairs(WorldConfig(seed=0), "train", 20_000)
        ]
        for file in range(FILES):
            numbers = range(count * file // FILES, count * (file + 1) // FILES)
            writer = None
            for start in range(numbers.start, numbers.stop, 5000):
                table = pa.Table.from_pylist(
                    [joined(rows, number) for number in range(start, min(start + 5000, numbers.stop))]
                )
                writer = writer or pq.ParquetWriter(part / f"train-{file:05d}-of-{FILES:05d}.parquet", table.schema)
                writer.write_table(table)
            if writer is not None:
                writer.close()
        part.rename(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 2**20:.0f} MiB on disk", flush=True)
    return folder


def joined(rows: list[dict[str, str]], number: int) -> dict[str, str]:
    """Pair ``number``: several rows of the world as one, and a number that no other pair has."""
    taken = [rows[(number * 7 + step * 4999 + number // 20_000 * 31) % len(rows)] for step in range(5)]
    sides = {side: "\n\n".join(row[side] for row in taken[: 2 + number % 4]) for side in ("chosen", "rejected")}
    return {"prompt": f"Order {number}. " + " ".join(row["prompt"] for row in taken[:4]), **sides}


def measured(model: str, data: Path, *numbers: int) -> tuple[dict[str, Any], list]:
    """What the process printed with its peak memory in MiB, and its memory over time: ``[seconds, MiB]``."""
    command = [sys.executable, "-c", ITERATE, model, str(data), str(TEMPLATE), *map(str, numbers)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines: list[str] = []
    reading = threading.Thread(target=lambda: lines.extend(process.stdout or ()))
    reading.start()
    curve = []
    while process.poll() is None:
        if mib := memory_mib(process.pid):
            curve.append([round(time.perf_counter() - start, 2), round(mib, 1)])
        time.sleep(min(2.0, 0.2 + (time.perf_counter() - start) / 50))
    reading.join()
    told = [json.loads(line.removeprefix("MEASURED ")) for line in lines if line.startswith("MEASURED ")]
    if process.returncode or not told:
        raise SystemExit("failed:\n" + "".join(lines)[-3000:])
    return {**told[0], "peak_mib": max(mib for _, mib in curve)}, curve


def memory_mib(pid: int, started: bool = False) -> float:
    """Resident memory of a process, and of those that it started what they do not share with it."""
    try:
        if started:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total = sum(
                int(line.split()[1]) for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:"))
            )
        else:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            total = sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it ended meanwhile
        return 0.0
    return total / 1024 + sum(memory_mib(int(child), started=True) for child in children)


def plot(curves: dict[str, list], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from inform_rm.util.colors import SERIES

    figure, axes = plt.subplots(figsize=(7, 4))
    for number, (name, curve) in enumerate(curves.items()):
        end, color = curve[-1][0], SERIES[number]
        axes.plot([seconds / end * 100 for seconds, _ in curve], [mib for _, mib in curve], color=color, label=name)
    axes.set(xlabel="share of the run's time (%)", ylabel="memory, all processes (MiB)", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
