"""How long processes wait for the slowest one: pairs as they come, and dealt out by cost. Simulated; no model runs.

    python benchmarks/balance.py --shared DIR     # less than a minute

A step of data-parallel training lasts as long as its most costly share. Printed is that cost over the mean cost of a
share, averaged over the steps of an epoch: 1.00 is no waiting. A cost counts tokens (a prompt once for both
responses) and what attention adds in a model of hidden size 2048.
"""

import argparse
import json
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from inform_rm.training.balance import BalancedSampler, pair_costs

PAIRS = 32768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder of real data/ and models/")
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()
    generator = np.random.default_rng(0)
    sources = {"hh-rlhf": real_lengths(arguments.shared, generator), "long-tailed": long_tailed(generator)}
    print(
        "| lengths | processes | as they come | balanced | balanced over 4 accumulated passes |\n|---|---|---|---|---|"
    )
    for name, (prompts, chosen, rejected) in sources.items():
        costs = pair_costs(prompts, (chosen, rejected), hidden_size=2048)
        for processes in (8, 64, 512):
            waits = [
                waiting(costs, rows, arguments.batch_size, processes, accumulated)
                for rows, accumulated in (
                    (range(len(costs)), 1),
                    (BalancedSampler(range(len(costs)), costs, arguments.batch_size, processes), 1),
                    (BalancedSampler(range(len(costs)), costs, arguments.batch_size, processes, 4), 4),
                )
            ]
            print(f"| {name} | {processes} | " + " | ".join(f"{value:.3f}" for value in waits) + " |", flush=True)


def waiting(costs: NDArray[np.float64], rows: object, batch_size: int, processes: int, accumulated: int) -> float:
    order = np.fromiter(rows, dtype=np.int64)  # type: ignore[call-overload]
    a_pass = batch_size * processes
    used = order[: len(order) // (a_pass * accumulated) * a_pass * accumulated]
    shares = costs[used].reshape(-1, processes, batch_size).sum(axis=2)
    return float((shares.max(axis=1) / shares.mean(axis=1)).mean())


def real_lengths(shared: Path, generator: np.random.Generator) -> tuple[NDArray[np.int64], ...]:
    """Tokens of prompts and responses of the first 4,000 pairs, in random order as often as it takes."""
    import gzip

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models/smollm2-135m-first6-v16k")
    with gzip.open(shared / "data/hh-rlhf/train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, 4000)]
    sides = [[row[name] for row in rows] for name in ("prompt", "chosen", "rejected")]
    lengths = [np.array([len(ids) for ids in tokenizer(texts)["input_ids"]]) for texts in sides]
    drawn = generator.integers(0, len(rows), PAIRS)
    return tuple(values[drawn] for values in lengths)


def long_tailed(generator: np.random.Generator) -> tuple[NDArray[np.int64], ...]:
    """Lognormal lengths: medians of 245 and 148 tokens, means about 3 times as large, at most 16,384 and 8,192."""
    prompts = np.clip(generator.lognormal(5.5, 1.5, PAIRS), 4, 16384).astype(np.int64)
    return prompts, *(np.clip(generator.lognormal(5.0, 1.3, PAIRS), 2, 8192).astype(np.int64) for _ in range(2))


if __name__ == "__main__":
    main()
