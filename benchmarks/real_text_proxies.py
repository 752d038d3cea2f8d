"""Stages 3 and 4 of `real_text.py`: pairs of the policy's responses labelled by gold, and proxies trained on them.

A run is a variant, a share of flipped labels, a seed and a number of members. A seed draws flips, head and order of
the pairs; members of a run differ in order, dropout and latent noise alone, and start from one head, as WARM needs it.
Files: ``proxies/NAME.json`` with the figures; of the reported seeds ``proxies/NAME.safetensors`` with the weights.
"""

import hashlib
import itertools
import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from inform_rm.training.losses import kl_to_standard_normal
from inform_rm.util.files import write_json
from real_text_gold import gold_rewards
from real_text_models import Pairs, Prepared, Variant, accuracy, averaged, rewards_of, start_of, train, weights_of
from real_text_samples import read_part

SELECTION_SEEDS, REPORT_SEEDS = (0, 1), (10, 11, 12)  # settings are chosen on the first
MEMBERS = 3
NOISE = (0.0, 0.25)
COEFFICIENT = 0.5  # lambda of UWO, for rewards in units of a standard deviation
GATE = {0.0: 0.8, 0.25: 0.7}  # least accuracy on clean held-out pairs, by share of flipped labels
GATED, CLEAR = "all pairs", 0.5  # standard deviations of gold between the responses of a clear pair
KEPT = ("end", "best")  # the last epoch, and the one that was best on validation pairs with as many flips
PARTS = ("pairs", "swapped")


@dataclass(frozen=True)
class Labels:
    """Which pairs of responses are labelled.

    Attributes:
        noise: share of flipped labels, of training and validation pairs.
        least_gap: pairs whose gold rewards differ by less (standard deviations) count as ties and are left out.
        per_prompt: pairs of each training prompt at most; ``None``: all.
    """

    noise: float = 0.25
    least_gap: float = 0.0
    per_prompt: int | None = None


@dataclass(frozen=True)
class Run:
    """One file of results."""

    variant: Variant
    labels: Labels
    seed: int
    members: int = 1

    @property
    def name(self) -> str:
        key = json.dumps(asdict(self), sort_keys=True)
        kind = f"{self.variant.architecture}-{self.labels.noise:g}-{self.seed}-{self.members}"
        return f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"


def standard_candidates() -> list[Variant]:
    """What a careful user would try; every one also with early stopping."""
    plain = Variant("standard")
    settings: list[dict[str, Any]] = [
        {}, {"weight_decay": 1.0}, {"label_smoothing": 0.1}, {"label_smoothing": 0.25}, {"dropout": 0.1},
        {"dropout": 0.3}, {"zero_head": True}, {"weight_decay": 1.0, "label_smoothing": 0.1, "zero_head": True},
    ]  # fmt: skip
    return [replace(plain, **each) for each in settings]


def inform_candidates() -> list[Variant]:
    """As many settings of InfoRM, around what docs/how-to/beta-and-k.md advises for a quarter of wrong labels."""
    grid = ((0.01, 0.1), (0.03, 0.0), (0.03, 0.1), (0.1, 0.0), (0.1, 0.1), (0.3, 0.1))
    return [*(Variant(beta=beta, kl_warmup_steps=warmup) for beta, warmup in grid),
            *(Variant(beta=beta, latent_dim=32) for beta in (0.03, 0.1))]  # fmt: skip


def pairs_of(lines: list[dict[str, Any]], gold: Tensor, split: str, least_gap: float = 0.0) -> Pairs:
    """All pairs of responses to one prompt of a split, the better one by gold first; ties are left out."""
    of_prompt: dict[int, list[int]] = {}
    for row, line in enumerate(lines):
        if line["split"] == split:
            of_prompt.setdefault(line["prompt_number"], []).append(row)
    found = [
        (one, other, prompt) if gold[one] > gold[other] else (other, one, prompt)
        for prompt, rows in of_prompt.items() for one, other in itertools.combinations(rows, 2)
        if abs(float(gold[one] - gold[other])) > least_gap
    ]  # fmt: skip
    return Pairs(*torch.tensor(found).reshape(-1, 3).T.contiguous())


def part_of(pairs: Pairs, kept: Tensor) -> Pairs:
    return Pairs(pairs.chosen[kept], pairs.rejected[kept], pairs.group[kept])


def labelled(pairs: Pairs, labels: Labels, seed: int) -> tuple[Pairs, Tensor]:
    """Pairs with flipped labels, and which are flipped; the seed draws both flips and, if asked, the pairs."""
    generator = torch.Generator().manual_seed(seed + 1000)
    if labels.per_prompt is not None:
        order = torch.randperm(len(pairs.group), generator=generator)
        group = pairs.group[order]
        rank = torch.tensor([int((group[:place] == each).sum()) for place, each in enumerate(group)])
        pairs = part_of(pairs, order[rank < labels.per_prompt].sort().values)
    flipped = torch.rand(len(pairs.group), generator=generator) < labels.noise
    chosen = torch.where(flipped, pairs.rejected, pairs.chosen)
    return Pairs(chosen, torch.where(flipped, pairs.chosen, pairs.rejected), pairs.group), flipped


class World:
    """The responses that pairs are made of, with gold rewards, as the proxies read them."""

    def __init__(self, folder: Path, model_folder: Path, depth: int):
        self.folder, self.depth = folder, depth
        self.lines: dict[str, list[dict[str, Any]]] = {}
        self.ready: dict[str, Prepared] = {}
        self.gold = {part: gold_rewards(folder, part) for part in PARTS}
        start = start_of(model_folder, depth, Variant("standard"), 0)
        for part in PARTS:
            rows, self.lines[part] = read_part(folder, part, (depth,))
            self.ready[part] = start.prepare(rows, depth)
        checked = torch.tensor([line["split"] == "validation" for line in self.lines["pairs"]]).nonzero()[:, 0]
        self.validation_rows, self.validation = checked, self.ready["pairs"][checked]

    def test_sets(self) -> dict[str, Pairs]:
        """Clean held-out pairs: all, the clear ones, those of equal length, and `swapped`.

        ``same words, other prompt``: pairs of which gold prefers the other response under another prompt, once under
        each of the two prompts, the second ones with rows behind those of ``pairs``. A reward that does not read the
        prompt has 0.5 there.
        """
        lines, gold = self.lines["pairs"], self.gold["pairs"]
        every = pairs_of(lines, gold, "test")
        tokens = torch.tensor([line["tokens"] for line in lines])
        equal = tokens[every.chosen] == tokens[every.rejected]
        gaps = gold[every.chosen] - gold[every.rejected]
        again = torch.full((len(gold),), -1)
        again[torch.tensor([line["of_row"] for line in self.lines["swapped"]])] = torch.arange(
            len(self.gold["swapped"])
        )
        own = [again[every.chosen], again[every.rejected]]
        other_gaps = self.gold["swapped"][own[0]] - self.gold["swapped"][own[1]]
        turned = other_gaps < 0
        first = part_of(every, turned)
        behind = [len(gold) + each[turned] for each in own]
        swapped = Pairs(
            torch.cat([first.chosen, behind[1]]), torch.cat([first.rejected, behind[0]]), first.group.repeat(2)
        )
        clear = gaps > CLEAR
        return {"all pairs": every, "clear pairs": part_of(every, clear),
                "clear, equal length": part_of(every, equal & clear), "same words, other prompt": swapped}  # fmt: skip


def do_run(world: World, model_folder: Path, run: Run, keep_weights: bool) -> None:
    """Train the members of a run and write its files, unless they are there."""
    target = world.folder / "proxies" / f"{run.name}.json"
    if target.exists():
        return
    clean = {
        split: pairs_of(world.lines["pairs"], world.gold["pairs"], split, run.labels.least_gap)
        for split in ("train", "validation")
    }
    pairs, flipped = labelled(clean["train"], run.labels, run.seed)
    validation, _ = labelled(clean["validation"], replace(run.labels, per_prompt=None), run.seed + 1)
    figures: dict[str, Any] = {"run": asdict(run), "losses": [], "curves": []}
    start = start_of(model_folder, world.depth, run.variant, run.seed)
    first, snapshots = weights_of(start), []
    for member in range(run.members):
        start.load_state_dict(first)
        losses, curve, best = [], [], {"value": -1.0, "weights": first}

        def at_epoch(epoch: int, loss: float, losses: Any = losses, curve: Any = curve, best: Any = best) -> None:
            rewards = torch.zeros(len(world.lines["pairs"]))
            rewards[world.validation_rows] = rewards_of(start, world.validation)[0]
            losses.append(loss)
            curve.append(accuracy(rewards, validation))
            if curve[-1] > best["value"]:
                best |= {"value": curve[-1], "weights": weights_of(start)}

        train(start, run.variant, world.ready["pairs"], pairs, 100 * run.seed + member, at_epoch)
        snapshots.append({"end": weights_of(start), "best": best["weights"]})
        figures["losses"].append(losses)
        figures["curves"].append(curve)
    sets = {**world.test_sets(), "validation": validation, "train": pairs, "flips learnt": part_of(pairs, flipped)}
    kept_weights = {}
    for kept in KEPT:
        named = {f"member {place}": each[kept] for place, each in enumerate(snapshots)}
        if run.members > 1:
            named["WARM"] = averaged(list(named.values()))
        scored = {name: _score(world, start, weights) for name, weights in named.items()}
        if run.members > 1:
            scored["ensemble"] = ensemble(
                [scored[f"member {place}"] for place in range(run.members)], _units(world, scored)
            )
        figures[kept] = {
            name: {split: accuracy(rewards, each) for split, each in sets.items() if len(each.group)}
            for name, rewards in scored.items()
        }
        figures[kept]["units"] = _units(world, scored)
        if run.variant.architecture == "inform":
            figures[kept]["kl_nats"] = _kl(start, named["member 0"], world.validation)
        kept_weights |= {f"{kept}.{name}.{part}": value for name, each in named.items() for part, value in each.items()
                         if "embed_tokens" not in part}  # fmt: skip
    target.parent.mkdir(exist_ok=True)
    if keep_weights:
        save_file(
            {name: value.contiguous() for name, value in kept_weights.items()}, target.with_suffix(".safetensors")
        )
    write_json(target, figures)


def _score(world: World, model: Any, weights: dict[str, Tensor]) -> Tensor:
    """Rewards of the rows of ``pairs``, then of ``swapped``."""
    model.load_state_dict(weights)
    return torch.cat([rewards_of(model, world.ready[part])[0] for part in PARTS])


@torch.no_grad()
def _kl(model: Any, weights: dict[str, Tensor], rows: Prepared) -> float:
    model.load_state_dict(weights)
    _, mean, log_variance = model.eval()(rows)
    return float(kl_to_standard_normal(mean, log_variance).mean())


def _units(world: World, scored: dict[str, Tensor]) -> dict[str, list[float]]:
    """Mean and standard deviation of each model's rewards of the policy's training responses."""
    own = torch.tensor([line["split"] == "train" for line in world.lines["pairs"]]).nonzero()[:, 0]
    return {name: [float(rewards[own].mean()), float(rewards[own].std())] for name, rewards in scored.items()}


def ensemble(members: list[Tensor], units: dict[str, list[float]]) -> Tensor:
    """UWO: mean less COEFFICIENT times variance of the members' rewards, each in units of its own deviation."""
    scales = [units[f"member {place}"] for place in range(len(members))]
    rewards = torch.stack([(each - mean) / deviation for each, (mean, deviation) in zip(members, scales, strict=True)])
    return rewards.mean(dim=0) - COEFFICIENT * rewards.var(dim=0, correction=0)


def read_run(folder: Path, run: Run) -> dict[str, Any] | None:
    """Figures of a run; ``None`` if it was not done."""
    path = folder / "proxies" / f"{run.name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def choose(folder: Path, candidates: Iterable[Variant]) -> tuple[Variant, str]:
    """Setting and epoch that are right about most validation pairs, mean over the selection seeds, with flips."""
    scores = {}
    for variant in candidates:
        runs = [read_run(folder, Run(variant, Labels(), seed)) for seed in SELECTION_SEEDS]
        if None not in runs:
            for kept in KEPT:
                scores[variant, kept] = sum(run[kept]["member 0"]["validation"] for run in runs if run) / len(runs)
    if not scores:
        raise FileNotFoundError(
            f"{folder / 'proxies'}: no candidate was run on all selection seeds. Run the stage 'search'."
        )
    return max(scores, key=lambda each: scores[each])


def chosen_of(folder: Path) -> dict[str, tuple[Variant, str]]:
    """What the reported seeds are asked about: by name a setting and which epoch is kept."""
    return {
        "standard, as it comes": (Variant("standard"), "end"),
        "standard, chosen": choose(folder, standard_candidates()),
        "InfoRM, as it comes": (Variant(), "end"),
        "InfoRM, chosen": choose(folder, inform_candidates()),
    }


def members_of(name: str, noise: float) -> int:
    """With flipped labels the chosen settings are trained several times, for ensembles and averages."""
    return MEMBERS if "chosen" in name and noise else 1


def incompetent(folder: Path) -> dict[float, list[str]]:
    """By share of flipped labels what is wrong with the chosen single proxies; those without a fault are attacked."""
    faults: dict[float, list[str]] = {noise: [] for noise in NOISE}
    for noise, (name, (variant, _)) in itertools.product(NOISE, chosen_of(folder).items()):
        if "chosen" in name:
            mean = statistics.mean(_gated(folder, name, variant, noise))
            if mean < GATE[noise]:
                faults[noise].append(f"{name}, {noise:.0%} flipped: {mean:.3f} of {GATED} right, needed {GATE[noise]}")
    return faults


def _gated(folder: Path, name: str, variant: Variant, noise: float) -> list[float]:
    kept = chosen_of(folder)[name][1]
    runs = [read_run(folder, Run(variant, Labels(noise), seed, members_of(name, noise))) for seed in REPORT_SEEDS]
    return [run[kept]["member 0"][GATED] for run in runs if run]
