"""Load on `inform-rm serve`: latency and throughput of many clients against scoring one row at a time.

    python benchmarks/serving.py --shared DIR --output runs/serving            # about 4 minutes
    python benchmarks/serving.py --shared DIR --output runs/serving --model FOLDER

A server process on the loopback interface scores real rows (hh-rlhf: a prompt with its two responses). Clients wait
for an answer before they send the next request. Each contest runs for a fixed time. Every reward that comes back is
compared with `RewardScorer.score` of its row: what is missing counts as lost, what is another as mixed up. Server and
clients share the machine's cores. "CPU ms a row" is processor time of the scoring process (Linux), which other work on
the machine changes less than the clock's.
"""

import argparse
import asyncio
import gzip
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch

from inform_rm.data.tokenizer import load_tokenizer
from inform_rm.errors import InputError
from inform_rm.scoring.scorer import RewardScorer
from inform_rm.util.files import atomic_write_text, package_version, versions, write_json

BACKBONE = "models/smollm2-135m-first6-v16k"
TOLERANCE = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder of real data/ and models/")
    parser.add_argument("--output", type=Path, default=Path("runs/serving"))
    parser.add_argument("--model", help="reward model (default: a random head on the shared SmolLM2 backbone)")
    parser.add_argument("--rows", type=int, default=256, help="distinct rows, two for each prompt")
    parser.add_argument("--max-tokens", type=int, default=256, help="longer rows are left out")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each contest")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in the server and in the direct contests")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or with_random_head(arguments.shared / BACKBONE, Path(folder))
        scorer = RewardScorer(model)
        rows = read_rows(arguments.shared, scorer, arguments.rows, arguments.max_tokens)
        rewards = scorer.score([prompt for prompt, _ in rows], [response for _, response in rows]).tolist()
        contests = direct_contests(scorer, rows, arguments.seconds)
        del scorer
        process, url = start_server(model, arguments.threads)
        try:
            contests += asyncio.run(served_contests(process, url, rows, rewards, arguments))
        finally:
            process.send_signal(signal.SIGTERM)
            exit_code = process.wait()
    tokens = next(contest.pop("row_tokens") for contest in contests if "row_tokens" in contest)
    result = {
        "contests": contests,
        "rows": {"number": len(rows), "tokens_mean": tokens, "distinct_rewards": len(set(rewards))},
        "server_exit_code": exit_code,
        "settings": {key: str(value) for key, value in vars(arguments).items()},
        "versions": versions() | {name: package_version(name) for name in ("fastapi", "uvicorn", "httpx")},
        "machine": {"cpus": os.cpu_count(), "processor": processor()},
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output / "serving.json", result)
    atomic_write_text(arguments.output / "serving.md", table(result))
    print(table(result))
    lost = sum(contest.get("lost", 0) + contest.get("mixed_up", 0) for contest in contests)
    raise SystemExit(1 if lost or exit_code else 0)


def with_random_head(backbone: Path, folder: Path) -> str:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    tokenizer = load_tokenizer(backbone)
    model = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def read_rows(shared: Path, scorer: RewardScorer, number: int, max_tokens: int) -> list[tuple[str, str]]:
    """Prompts with both responses, in an order in which a prompt's two rows are neighbours."""
    with gzip.open(shared / "data/hh-rlhf/test.jsonl.gz", "rt", encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file]
    random.Random(0).shuffle(pairs)
    rows: list[tuple[str, str]] = []
    for pair in pairs:
        both = [(pair["prompt"], pair["chosen"]), (pair["prompt"], pair["rejected"])]
        try:
            fits = all(len(scorer.encode(*row, "row").input_ids) <= max_tokens for row in both)
        except InputError:
            continue
        if fits and len(rows) < number:
            rows += both
    return rows


def direct_contests(scorer: RewardScorer, rows: list[tuple[str, str]], seconds: float) -> list[dict[str, Any]]:
    latencies, load = [], os.getloadavg()[0]
    started, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        prompt, response = rows[len(latencies) % len(rows)]
        before = time.perf_counter()
        scorer.score([prompt], [response])
        latencies.append(time.perf_counter() - before)
    spent = time.perf_counter() - started, time.process_time() - cpu
    alone = summary("RewardScorer.score, a row a call", latencies, len(latencies), *spent, load)
    alone["row_tokens"] = statistics.mean(len(scorer.encode(*row, "row").input_ids) for row in rows)
    load = os.getloadavg()[0]
    latencies, started, cpu = [], time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        before = time.perf_counter()
        scorer.score([prompt for prompt, _ in rows], [response for _, response in rows])
        latencies.append(time.perf_counter() - before)
    name = f"RewardScorer.score, {len(rows)} rows a call"
    spent = time.perf_counter() - started, time.process_time() - cpu
    return [alone, summary(name, latencies, len(latencies) * len(rows), *spent, load)]


async def served_contests(
    process: subprocess.Popen,
    url: str,
    rows: list[tuple[str, str]],
    rewards: list[float],
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    places = range(len(rows))
    ones = [[place] for place in places]
    twos = [[place, place + 1] for place in places[::2]]
    many = arguments.clients
    contests = [
        ("1 client, a row a request", 1, ones),
        (f"{many} clients, a row a request", many, ones),
        (f"{many} clients, a prompt's 2 rows a request", many, twos),
        (f"1 client, {len(rows)} rows a request", 1, [list(places)]),
    ]
    return [
        await load_test(process, url, f"served, {name}", clients, requests, rows, rewards, arguments.seconds)
        for name, clients, requests in contests
    ]


async def load_test(
    process: subprocess.Popen,
    url: str,
    name: str,
    clients: int,
    requests: list[list[int]],
    rows: list[tuple[str, str]],
    rewards: list[float],
    seconds: float,
) -> dict[str, Any]:
    """Clients that send requests (places of rows) one after the other; each starts at another request."""
    latencies: list[float] = []
    counts = {"sent": 0, "answered": 0, "lost": 0, "mixed_up": 0, "rows": 0}
    load, batches_before = os.getloadavg()[0], await batch_counts(url)
    started, cpu = time.perf_counter(), cpu_seconds(process.pid)

    async def client(number: int) -> None:
        turn = number * len(requests) // clients
        async with httpx.AsyncClient(timeout=600) as connection:
            while time.perf_counter() - started < seconds:
                places = requests[turn % len(requests)]
                turn += 1
                body = {"rows": [{"prompt": rows[place][0], "response": rows[place][1]} for place in places]}
                counts["sent"] += 1
                before = time.perf_counter()
                answer = await connection.post(f"{url}/score", json=body)
                latencies.append(time.perf_counter() - before)
                found = answer.json().get("rewards", []) if answer.status_code == 200 else []
                counts["lost"] += max(0, len(places) - len(found))
                wrong = [abs(a - rewards[place]) > TOLERANCE for a, place in zip(found, places, strict=False)]
                counts["mixed_up"] += sum(wrong)
                counts["answered"] += answer.status_code == 200
                counts["rows"] += len(found)

    await asyncio.gather(*(client(number) for number in range(clients)))
    spent = time.perf_counter() - started, cpu_seconds(process.pid) - cpu
    result = summary(name, latencies, counts["rows"], *spent, load)
    counts["lost"] += counts["sent"] - len(latencies)
    scored, batches = (after - before for after, before in zip(await batch_counts(url), batches_before, strict=True))
    return {**result, **counts, "rows_per_batch": scored / max(1, batches)}


async def batch_counts(url: str) -> tuple[float, float]:
    async with httpx.AsyncClient() as connection:
        text = (await connection.get(f"{url}/metrics")).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return float(values["inform_rm_batch_rows_sum"]), float(values["inform_rm_batch_rows_count"])


def cpu_seconds(process_id: int) -> float:
    """Processor time of all threads of a process so far."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def summary(
    name: str, latencies: list[float], rows: int, seconds: float, cpu_seconds: float, load: float
) -> dict[str, Any]:
    ordered = sorted(latencies)
    places = {share: min(len(ordered) - 1, len(ordered) * share // 100) for share in (50, 95, 99)}
    return {
        "name": name,
        "rows_per_second": rows / seconds,
        "cpu_ms_per_row": 1000 * cpu_seconds / rows,
        **{f"p{share}_ms": 1000 * ordered[place] for share, place in places.items()},
        "requests": len(latencies),
        "seconds": seconds,
        "load_average_before": load,
    }


def start_server(model: str, threads: int) -> tuple[subprocess.Popen, str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "inform_rm.cli", "serve", "--model", model, "--port", "0"],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"at (http://\S+)$", line):
            return process, found[1]
    raise SystemExit("the server did not start")


def table(result: dict[str, Any]) -> str:
    columns = ["", "rows/s", "CPU ms a row", "p50 ms", "p95 ms", "p99 ms", "requests", "rows a batch", "lost",
               "mixed up", "load before"]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for part in result["contests"]:
        cells = [part["name"], *(f"{part[key]:.1f}" for key in ("rows_per_second", "cpu_ms_per_row"))]
        cells += [f"{part[key]:.0f}" for key in ("p50_ms", "p95_ms", "p99_ms", "requests")]
        cells += [f"{part['rows_per_batch']:.1f}" if "rows_per_batch" in part else ""]
        cells += [str(part.get("lost", "")), str(part.get("mixed_up", "")), f"{part['load_average_before']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    rows = result["rows"]
    lines.append(
        f"\n{rows['number']} rows of hh-rlhf, {rows['tokens_mean']:.0f} tokens on average, "
        f"{rows['distinct_rewards']} distinct rewards; server ended with exit code {result['server_exit_code']}."
    )
    return "\n".join(lines) + "\n"


def processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
