"""Why does the gold reward of best-of-n fall? What the models of `overoptimization.py` choose, with and without slips.

    python benchmarks/overoptimization.py --output runs/overoptimization
    python benchmarks/overoptimization_slips.py --models runs/overoptimization

The policy of that benchmark spoils 2 % of its responses (`SlippingPolicy`). For every reward: how many of the chosen
responses are spoilt, and the gold reward's peak and fall when the spoilt responses are taken out before choosing. No
model runs: the rewards are those in ``responses.parquet``. Writes ``slips.md`` into the folder of the models.
"""

import argparse
from pathlib import Path
from typing import Any

from over_seeds import mean_and_interval
from overoptimization import (
    KINDS,
    LABEL_NOISE,
    PROMPTS,
    RESPONSES,
    SEEDS,
    WORD_ACCURACY,
    shown,
)

NS = (1, 16, 64, 256, 896)  # up to what is left of 1,024 responses without the spoilt ones


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("runs/overoptimization"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: 0 1 2 3 4")
    arguments = parser.parse_args()
    from inform_rm.util.files import atomic_write_text

    columns = [f"spoilt, n = {n}" for n in NS] + ["gain, best n", f"gain, n = {NS[-1]}", "fall",
               "without spoilt: gain, best n", f"gain, n = {NS[-1]}", "fall"]  # fmt: skip
    lines = ["| label noise | chosen by | " + " | ".join(columns) + " |", "|" + "---|" * (2 + len(columns))]
    for noise in LABEL_NOISE:
        seeds = [of_one_seed(arguments.models / str(seed) / f"noise-{noise}", seed) for seed in arguments.seeds]
        for kind in KINDS:
            values = [mean_and_interval(list(column)) for column in zip(*(seed[kind] for seed in seeds), strict=True)]
            lines.append(f"| {noise} | {kind} | " + " | ".join(shown(value) for value in values) + " |")
    text = "\n".join(lines) + "\n"
    atomic_write_text(arguments.models / "slips.md", text)
    print(text)


def of_one_seed(case: Path, seed: int) -> dict[str, list[float]]:
    """By kind: the shares of spoilt choices at each of NS, then gains and fall with and without them."""
    import numpy as np
    import pyarrow.parquet as pq

    from inform_rm.eval.best_of_n.simulate import best_of_n_expectation
    from inform_rm.world.worlds import sample_responses

    table = pq.read_table(case / "best-of-n" / "responses.parquet").to_pydict()
    shape = (PROMPTS, RESPONSES)
    prompts = np.array(table["prompt"], dtype=object).reshape(shape)[:, 0]
    unspoilt = [text for prompt in prompts for text in sample_responses(prompt, RESPONSES, seed, WORD_ACCURACY)]
    spoilt = np.array([a != b for a, b in zip(table["response"], unspoilt, strict=True)]).reshape(shape)
    assert 0.01 < spoilt.mean() < 0.03, f"{case}: {spoilt.mean():.1%} spoilt; these are not that policy's responses"
    gold = np.array(table["gold"]).reshape(shape)
    found: dict[str, list[float]] = {}
    for kind in KINDS:
        proxy = np.array(table[f"{kind}-0"]).reshape(shape)
        shares = best_of_n_expectation(proxy, spoilt.astype(float), NS).mean(axis=0)
        found[kind] = [*shares.tolist(), *gains(proxy, gold), *gains(proxy, gold, ~spoilt)]
    return found


def gains(proxy: Any, gold: Any, kept: Any = None) -> list[float]:
    """Gold gain at the best and at the largest of NS, and the fall between them, of the kept responses."""
    import numpy as np

    from inform_rm.eval.best_of_n.simulate import best_of_n_expectation

    curves = []
    for row in range(len(proxy)):
        keep = slice(None) if kept is None else kept[row]
        curve = best_of_n_expectation(proxy[row, keep][None], gold[row, keep][None], NS)[0]
        curves.append(curve - gold[row, keep].mean())
    mean = np.mean(curves, axis=0)
    return [float(mean.max()), float(mean[-1]), float(mean.max() - mean[-1])]


if __name__ == "__main__":
    main()
