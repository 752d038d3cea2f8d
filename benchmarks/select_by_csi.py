"""Is the model that CSI chooses the one whose policy has the most gold? K and beta on the words of `mechanism.py`.

    python benchmarks/select_by_csi.py --output runs/select-by-csi       # one core; started again, it goes on

For each seed InfoRM is trained with K in {32, 128} and beta in {0.01, 0.03, 0.1} on 1,000 pairs with a quarter of the
labels flipped, and a policy is optimised against each. Then as `inform-rm select` does (arXiv:2402.09345, App. E.2):
CSI of 256 responses of each policy in the latents of its own model, as a rank among halves of 512 responses of the
base policy, then over the mean of these halves. Gold and KL of a policy are exact. The policies are read off at the
end of the optimisation, and at the measured step whose KL is nearest to 16 nats. A JSON file a seed and K; tables.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from inform_rm.eval.detection.clusters import auto_eps, fit_csi
from inform_rm.eval.detection.outliers import null_rank, split_half_null
from inform_rm.eval.detection.settings import DetectionSettings
from inform_rm.util.files import write_json
from mechanism_models import Proxies, Variant, optimize, train, training_set
from mechanism_world import LENGTH, VOCABULARY, Dials, draw
from over_seeds import mean_and_interval

DIALS, LATENT_DIMS, BETAS = Dials(pairs=1000), (32, 128), (0.01, 0.03, 0.1)
RESPONSES, REFERENCE, SPLITS, EQUAL_KL = 256, 512, 100, 16.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/select-by-csi"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[20, 21, 22, 23])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        for latent_dim in LATENT_DIMS:
            start, file = time.time(), arguments.output / f"{seed}-{latent_dim}.json"
            if not file.exists():
                write_json(file, runs_of(seed, latent_dim))
                print(f"{file.name}: {time.time() - start:.0f} s", flush=True)
    print("\n".join(report([arguments.output / f"{seed}" for seed in arguments.seeds])))


def runs_of(seed: int, latent_dim: int) -> list[dict[str, Any]]:
    """Train and attack one model a beta, and read CSI and gold off at both places of the optimisation."""
    variants = [Variant(beta=beta, latent_dim=latent_dim, kl_warmup_steps=0.1) for beta in BETAS]
    seeds, sets = [seed] * len(variants), [training_set(seed, DIALS)] * len(variants)
    proxies = Proxies(variants, seeds, torch.device("cpu"))
    train(proxies, variants, seeds, sets)
    chosen, rejected = (torch.stack([each.test[side] for each in sets]) for side in (0, 1))
    accuracy = (proxies.score(chosen) > proxies.score(rejected)).float().mean(dim=1).tolist()
    nats = proxies.kl(chosen[:, :512]).tolist()
    curves, policies = optimize(proxies, seeds, sets)
    found = []
    for place, (variant, curve) in enumerate(zip(variants, curves, strict=True)):
        equal = int(np.abs(np.array(curve["kl"]) - EQUAL_KL).argmin())
        world, generator = sets[place].world, torch.Generator().manual_seed(seed + 3_000_000)
        points = {"end": len(curve["kl"]) - 1, "16 nats": equal}
        words = [drawn(world.probabilities, REFERENCE, generator)]
        words += [drawn(policies[place, point].exp(), RESPONSES, generator) for point in points.values()]
        reference, *candidates = (latents(proxies, place, each) for each in words)
        found.append({
            "seed": seed, "latent_dim": latent_dim, "beta": variant.beta, "accuracy": accuracy[place],
            "kl_nats": nats[place], "peak": curve["peak"],
            "points": {
                name: {"gold": curve["gold"][point], "kl": curve["kl"][point], **csi_in_the_null(reference, each)}
                for (name, point), each in zip(points.items(), candidates, strict=True)
            },
        })  # fmt: skip
    return found


def drawn(policy: Tensor, number: int, generator: torch.Generator) -> Tensor:
    return draw(policy, torch.rand(number * LENGTH, generator=generator)).view(number, LENGTH)


@torch.no_grad()
def latents(proxies: Proxies, place: int, words: Tensor) -> np.ndarray:
    """Latent means ``(N, K)`` of one of the models."""
    proxies.model.eval().load_state_dict({name: value[place] for name, value in proxies.weights.items()})
    ids = torch.cat([words, words.new_full((len(words), 1), VOCABULARY + 1)], dim=1)
    return proxies.model(input_ids=ids).latent_mean.double().numpy()


def csi_in_the_null(reference: np.ndarray, candidate: np.ndarray) -> dict[str, float]:
    """CSI of a candidate, its rank among the reference's halves and its ratio to their mean, as `select` has them."""
    settings = DetectionSettings(eps=auto_eps(reference, num_points=len(candidate)))

    def csi(one: np.ndarray, others: np.ndarray) -> float:
        return float(fit_csi(others, settings)(one, 0)[0]["csi_normalized"])

    null, value = split_half_null(reference, csi, num_splits=SPLITS), csi(candidate, reference)
    return {"csi": value, "csi_over_null": value / null.mean(), "null_rank": null_rank(value, null)}


def report(files: list[Path]) -> list[str]:
    """Tables: each setting's means over seeds, and what each way to choose gives."""
    seeds = [
        [run for part in sorted(file.parent.glob(f"{file.name}-*.json")) for run in json.loads(part.read_text())]
        for file in files
    ]
    lines: list[str] = []
    for point in ("end", "16 nats"):
        header = "| K | beta | accuracy | nats | KL of the policy | CSI over null | rank in the null | gold |"
        lines += [f"## {point}", "", header, "|" + "---|" * 8]
        for place in range(len(seeds[0])):
            runs = [seed[place] for seed in seeds]
            values = [[run["accuracy"] for run in runs], [run["kl_nats"] for run in runs]]
            values += [[run["points"][point][key] for run in runs]
                       for key in ("kl", "csi_over_null", "null_rank", "gold")]  # fmt: skip
            shown = " | ".join(f"{np.mean(each):.2f}" for each in values)
            lines.append(f"| {runs[0]['latent_dim']} | {runs[0]['beta']} | {shown} |")
        lines += ["", *choices(seeds, point), ""]
    return lines


def choices(seeds: list[list[dict[str, Any]]], point: str) -> list[str]:
    """Gold of the chosen models, a line a way to choose, and how alike the orders are."""

    def value(run: dict[str, Any], key: str) -> float:
        return run["points"][point][key]

    ways = {
        "by CSI's rank in the null": lambda run: (value(run, "null_rank"), -value(run, "csi_over_null")),
        "by accuracy on clean test pairs": lambda run: run["accuracy"],
        "by gold": lambda run: value(run, "gold"),
    }
    lines = ["| chosen | gold, mean of seeds with 95 % interval | K, beta of each seed |", "|---|---|---|"]
    for name, key in ways.items():
        best = [max(runs, key=key) for runs in seeds]
        lines.append(f"| {name} | {shown_interval([value(run, 'gold') for run in best])} | "
                     + "; ".join(f"{run['latent_dim']}, {run['beta']}" for run in best) + " |")  # fmt: skip
    means = [float(np.mean([value(run, "gold") for run in runs])) for runs in seeds]
    lines.append(f"| at random | {shown_interval(means)} | |")
    order = [
        float(spearmanr([value(run, "csi_over_null") for run in runs], [value(run, "gold") for run in runs])[0])
        for runs in seeds
    ]
    return [*lines, "", f"Rank correlation of CSI over null with gold (-1: orders as gold): {shown_interval(order)}"]


def shown_interval(values: list[float]) -> str:
    mean, low, high = mean_and_interval(values)
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
