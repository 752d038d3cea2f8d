"""What a KL penalty saves and costs: gold reward of policies against the coefficient (arXiv:2402.09345, Fig. 6).

    python benchmarks/mechanism.py --output runs/mechanism --parts kept --keep
    python benchmarks/mechanism_penalty.py --output runs/mechanism

Policies of independent words maximise ``mean reward - penalty * KL`` against the kept reward models of
`mechanism.py`. Rewards are in standard deviations over 1,024 responses of the base policy, so that one coefficient
means the same for all models; KL and its gradient are exact. Each model's best coefficient is chosen by gold on the
selection seeds, which no user could do (the best case for a penalty). Writes ``penalty.json``, ``penalty.md`` and
``penalty.png``.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechanism import REPORT_SEEDS, SELECTION_SEEDS, kept_file, kept_variants
from mechanism_models import Proxies, policy_slope
from mechanism_world import CONTENT, LENGTH, Dials, draw, draw_responses, expected_gold, make_world, policy_kl
from over_seeds import mean_and_interval

PENALTIES = (0.0, 0.005, 0.01, 0.02, 0.05)  # reward in standard deviations a nat
STEPS, RESPONSES, RATE = 200, 64, 0.05
MODELS = [name for name in kept_variants() if "0.01" not in name]  # a beta of 0.01 binds nothing: as standard
COLOURS = ("#D55E00", "#E69F00", "#0072B2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/mechanism"))
    output = parser.parse_args().output
    torch.set_num_threads(1)
    path = output / "penalty.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    done = {(row["model"], row["seed"]) for row in rows}
    for seed in [*REPORT_SEEDS, *SELECTION_SEEDS]:
        for name in MODELS:
            variant, state = kept_variants()[name]
            file = kept_file(output, (variant, seed, Dials()), state)
            if (name, seed) not in done and file.exists():
                rows += penalized(name, variant, seed, file)
                path.write_text(json.dumps(rows), encoding="utf-8")
    lines = report(rows)
    (output / "penalty.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (output / "penalty.png").write_bytes(penalty_png(rows))
    print("\n".join(lines))


def penalized(name: str, variant: Any, seed: int, file: Path) -> list[dict[str, Any]]:
    """Policies against one model, all coefficients at once."""
    from safetensors.torch import load_file

    proxies = Proxies([variant], [seed], torch.device("cpu"))
    kept = {part.removeprefix("weights."): value[None] for part, value in load_file(file).items()}
    proxies.weights = {part: kept[part] for part in proxies.weights}
    world = make_world(seed, Dials())._replace(generator=torch.Generator().manual_seed(seed + 4_000_000))
    spread = proxies.score(draw_responses(world, 1024)[None]).std()

    def reward(words: Tensor) -> Tensor:
        return (proxies.score(words.flatten(0, 1)[None]) / spread).view(words.shape[:2])

    policies = maximize(reward, world.probabilities, torch.tensor(PENALTIES), world.generator)
    kl, gold = policy_kl(policies, world.probabilities), expected_gold(policies, world.worth)
    return [
        {"model": name, "seed": seed, "penalty": penalty, "kl": float(kl[place]), "gold": float(gold[place]),
         "neutral": float(policies[place, CONTENT:].sum())}
        for place, penalty in enumerate(PENALTIES)
    ]  # fmt: skip


def maximize(
    reward: Callable[[Tensor], Tensor], base: Tensor, penalties: Tensor, generator: torch.Generator, steps: int = STEPS
) -> Tensor:
    """Policies of independent words that maximise ``mean reward - penalty * KL(policy, base)``, by REINFORCE and Adam.

    Args:
        reward: of words ``(P, N, L)``, ``(P, N)``.
        base: ``(V,)`` probabilities.
        penalties: ``(P,)``.
        generator: of the draws; all policies share them.
        steps: of Adam.

    Returns:
        ``(P, V)`` probabilities.
    """
    logits = torch.where(base > 0, base.clamp(min=1e-30).log(), -1e4).expand(len(penalties), -1).clone()
    log_base = logits.log_softmax(dim=-1)
    optimizer = torch.optim.Adam([logits], lr=RATE)
    for _ in range(steps):
        policy, log_policy = logits.softmax(dim=-1), logits.log_softmax(dim=-1)
        uniform = torch.rand(RESPONSES * LENGTH, generator=generator).expand(len(penalties), -1)
        words = draw(policy, uniform).view(len(penalties), RESPONSES, LENGTH)
        rewards = reward(words)
        # Each word's KL enters once a place; its gradient with respect to the logits is exact.
        ratio = log_policy - log_base
        kl_slope = LENGTH * policy * (ratio - (policy * ratio).sum(dim=-1, keepdim=True))
        logits.grad = policy_slope(policy, words, rewards - rewards.mean(dim=1, keepdim=True))
        logits.grad += penalties[:, None] * kl_slope
        optimizer.step()
    return logits.softmax(dim=-1)


def values_of(rows: list[dict[str, Any]], name: str, penalty: float, seeds: Iterable[int], key: str) -> list[float]:
    """One number a seed, in the order of the seeds that are there."""
    found = {row["seed"]: row[key] for row in rows if row["model"] == name and row["penalty"] == penalty}
    return [found[seed] for seed in seeds if seed in found]


def models_of(rows: list[dict[str, Any]]) -> list[str]:
    """Models that both kinds of seeds have."""
    seeds = {name: {row["seed"] for row in rows if row["model"] == name} for name in MODELS}
    return [name for name in MODELS if all(seeds[name] & set(each) for each in (SELECTION_SEEDS, REPORT_SEEDS))]


def best_penalty(rows: list[dict[str, Any]], name: str) -> float:
    return max(PENALTIES, key=lambda each: np.mean(values_of(rows, name, each, SELECTION_SEEDS, "gold")))


def report(rows: list[dict[str, Any]]) -> list[str]:
    """Gold by coefficient on the reported seeds; then differences to the standard models at their best."""
    names = models_of(rows)
    lines = [
        "| model | " + " | ".join(f"{penalty:g}" for penalty in PENALTIES) + " | KL at these |",
        "|---" * (len(PENALTIES) + 2) + "|",
    ]
    for name in names:
        best, cells = best_penalty(rows, name), []
        for penalty in PENALTIES:
            mean, low, _ = mean_and_interval(values_of(rows, name, penalty, REPORT_SEEDS, "gold"))
            mark = "**" if penalty == best else ""
            cells.append(f"{mark}{mean:.1f} ± {mean - low:.1f}{mark}")
        nats = [np.mean(values_of(rows, name, penalty, REPORT_SEEDS, "kl")) for penalty in PENALTIES]
        lines.append(f"| {name} | " + " | ".join(cells) + " | " + ", ".join(f"{each:.0f}" for each in nats) + " |")
    lines += [
        "",
        "| InfoRM less standard | no penalty | each at its best | InfoRM without, standard at its best |",
        "|---|---|---|---|",
    ]
    for name in [each for each in names if each.startswith("InfoRM")]:
        for other in [each for each in names if not each.startswith("InfoRM")]:
            best, rival = best_penalty(rows, name), best_penalty(rows, other)
            pairs = ((0.0, 0.0), (best, rival), (0.0, rival))
            cells = " | ".join(difference(rows, (name, own), (other, its)) for own, its in pairs)
            lines.append(f"| {name}; {other} | {cells} |")
    return lines


def difference(rows: list[dict[str, Any]], one: tuple[str, float], other: tuple[str, float]) -> str:
    """Gold of one model and coefficient less that of another, paired by reported seed."""
    own, its = (values_of(rows, name, penalty, REPORT_SEEDS, "gold") for name, penalty in (one, other))
    mean, low, _ = mean_and_interval([a - b for a, b in zip(own, its, strict=True)])
    return f"{mean:+.1f} ± {mean - low:.1f}"


def penalty_png(rows: list[dict[str, Any]]) -> bytes:
    """Gold against KL, one line a model, one point a coefficient; bars are 95 % intervals of gold over seeds."""
    from matplotlib.figure import Figure

    from inform_rm.util.page import figure_png

    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    by_penalty, by_kl = figure.subplots(1, 2, sharey=True)
    for name in models_of(rows):
        colour = COLOURS[MODELS.index(name)]
        gold = [mean_and_interval(values_of(rows, name, penalty, REPORT_SEEDS, "gold")) for penalty in PENALTIES]
        means, bars = [each[0] for each in gold], [each[0] - each[1] for each in gold]
        nats = [np.mean(values_of(rows, name, penalty, REPORT_SEEDS, "kl")) for penalty in PENALTIES]
        style: dict[str, Any] = {"color": colour, "marker": "o", "ms": 4, "capsize": 2, "linewidth": 1.2}
        by_penalty.errorbar(range(len(PENALTIES)), means, yerr=bars, label=name, **style)
        by_kl.errorbar(nats, means, yerr=bars, **style)
    by_penalty.set_xticks(range(len(PENALTIES)), [f"{penalty:g}" for penalty in PENALTIES])
    by_penalty.set_xlabel("KL penalty, standard deviations of the reward a nat")
    by_kl.set_xlabel("KL from the base policy, nats")
    by_penalty.set_ylabel("gold reward at the end")
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    return figure_png(figure)


if __name__ == "__main__":
    main()
