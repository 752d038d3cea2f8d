"""Which settings of InfoRM change how far its choices can be trusted? Best-of-n in worlds of other seeds.

    python benchmarks/overoptimization_sweep.py --output runs/overoptimization-sweep

As `overoptimization.py` with 25 % of flipped labels, one model each: a standard model, InfoRM as it comes, and InfoRM
with one setting changed. Two runs at a time, one thread each. Started again, it goes on where it was stopped. Writes
``table.md`` and ``table.json`` into the output folder.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from over_seeds import mean_and_interval
from overoptimization import (
    PROMPTS,
    RESPONSES,
    UPDATES,
    SlippingPolicy,
    shown,
    train_one,
    write_start,
)
from two_at_a_time import run_all

SEEDS = (100, 101, 102, 103, 104)  # not those of overoptimization.py, whose table must not guide a choice
LABEL_NOISE = 0.25
VARIANTS: dict[str, dict[str, Any]] = {
    "standard": {"architecture": "standard"},
    "inform": {},
    "beta 0": {"beta": 0.0},
    "beta 0.001": {"beta": 0.001},
    "beta 0.1": {"beta": 0.1},
    "latent_dim 8": {"latent_dim": 8},
    "latent_dim 128": {"latent_dim": 128},
    "kl_reduction averaged_moments": {"kl_reduction": "averaged_moments"},
    "decoder linear": {"decoder": "linear"},
    "kl_warmup_steps 0": {"kl_warmup_steps": 0.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/overoptimization-sweep"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: 100 to 104")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # one run, in a process of its own
    arguments = parser.parse_args()
    if arguments.one is not None:
        seed, variant = arguments.one.split(":")
        folder = arguments.output / seed
        if variant == "start":
            write_start(folder, int(seed))
        else:
            one_run(folder, int(seed), variant)
        return
    start = time.monotonic()
    command, logs = [__file__, "--output", str(arguments.output)], arguments.output / "logs"
    run_all(command, [f"{seed}:start" for seed in arguments.seeds], logs)
    run_all(command, [f"{seed}:{variant}" for seed in arguments.seeds for variant in VARIANTS], logs)
    write_table(arguments.output, arguments.seeds, minutes=(time.monotonic() - start) / 60)


def one_run(folder: Path, seed: int, variant: str) -> None:
    """Train one variant; accuracy on pairs like those of training, and best-of-n."""
    from inform_rm import evaluate
    from inform_rm.scoring.scorer import RewardScorer
    from inform_rm.util.files import atomic_write_text, write_json
    from inform_rm.world.policy import attack
    from inform_rm.world.worlds import WorldConfig, make_pairs

    run = folder / variant.replace(" ", "-")
    if (run / "measured.json").exists():
        return
    # From the language model: a start saved with a head fixes its latent dimension and decoder.
    settings = {"model": str(folder / "backbone"), "architecture": "inform", **VARIANTS[variant]}
    kind = settings.pop("architecture")
    train_one(folder, kind, f"train-{LABEL_NOISE}.jsonl", UPDATES, 100 * seed, run, **settings)
    scorer = RewardScorer(run)
    pairs = run / "in_distribution.jsonl"
    rows = make_pairs(WorldConfig(seed=seed), "in_distribution", 500)
    atomic_write_text(pairs, "".join(json.dumps(row) + "\n" for row in rows))
    accuracy = evaluate(scorer, pairs, progress=False).accuracy
    result = attack(
        scorer, policy=SlippingPolicy(), num_prompts=PROMPTS, num_responses=RESPONSES, seed=seed,
        progress=False,
    ).proxies["proxy"]  # fmt: skip
    found = {"accuracy": accuracy, "gold": result["gold"], "peak": result["peak"]}
    write_json(run / "measured.json", found)


def write_table(output: Path, seeds: list[int], minutes: float) -> None:
    """One row a variant."""
    from inform_rm.util.files import atomic_write_text, versions, write_json

    lines = ["| variant | accuracy | gold gain, best n | gold gain, n = 1024 | peak KL | fall |", "|" + "---|" * 6]
    table = []
    for variant in VARIANTS:
        parts = [json.loads((output / str(seed) / variant.replace(" ", "-") / "measured.json").read_text())
                 for seed in seeds]  # fmt: skip
        row = {
            "accuracy": [part["accuracy"] for part in parts],
            "best": [max(part["gold"]["gain"]) for part in parts],
            "end": [part["gold"]["gain"][-1] for part in parts],
            "peak_kl": [part["peak"]["kl_nats"] for part in parts],
            "fall": [part["peak"]["fall"] for part in parts],
        }
        table.append({"variant": variant, **row})
        lines.append(
            f"| {variant} | " + " | ".join(shown(mean_and_interval(values)) for values in row.values()) + " |"
        )
    lines += ["", f"Seeds {', '.join(map(str, seeds))}. This call took {minutes:.0f} minutes.", ""]
    write_json(output / "table.json", {"table": table, "seeds": list(seeds), "minutes": minutes,
                                       "versions": versions()})  # fmt: skip
    atomic_write_text(output / "table.md", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
