"""Stages 3 and 4 of `real_text.py`: pairs of the policy's responses labelled by gold, and proxies trained on them.

A run is a variant, a share of flipped labels, a seed and a number of members. A seed draws flips, head and order of the
pairs; members of a run differ in order, dropout and latent noise alone, and start from one head, as WARM needs it.
Files: ``proxies/NAME.json`` with the figures and ``proxies/NAME.safetensors`` with the rewards of every row that
was sampled, and InfoRM's latent means of the responses that best-of-n chooses from; the weights themselves are not
kept.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inform_rm.util.files import write_json
from real_text_gold import gold_rewards
from real_text_models import Pairs, Variant, accuracy, averaged, rewards_of, start_of, train, weights_of
from real_text_policy import Rows
from real_text_samples import read_part

SELECTION_SEEDS, REPORT_SEEDS = (0, 1), (10, 11, 12)
MEMBERS = 3
NOISE = (0.0, 0.25)
COEFFICIENT = 0.5  # lambda of UWO, for rewards in units of a standard deviation
GATE = {0.0: 0.8, 0.25: 0.7}  # least accuracy on clean held-out pairs, by share of flipped labels
GATED = "clear pairs"
KEPT = ("end", "best")  # the last epoch, and the one that was best on validation pairs with as many flips
HELD, PARTS = ("pairs", "swapped"), ("pairs", "swapped", "attack", "other")


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
    """What was sampled of these parts, with gold rewards, as the proxies read it."""

    def __init__(self, folder: Path, depth: int, parts: tuple[str, ...] = PARTS):
        self.folder, self.depth, self.parts = folder, depth, parts
        self.rows: dict[str, Rows] = {}
        self.lines: dict[str, list[dict[str, Any]]] = {}
        for part in parts:
            self.rows[part], self.lines[part] = read_part(folder, part, (depth,))
        self.gold = {part: gold_rewards(folder, part) for part in parts}

    def test_sets(self, least_gap: float) -> dict[str, Pairs]:
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
        again[torch.tensor([line["of_row"] for line in self.lines["swapped"]])] = torch.arange(len(self.gold["swapped"]))
        own = [again[every.chosen], again[every.rejected]]
        other_gaps = self.gold["swapped"][own[0]] - self.gold["swapped"][own[1]]
        turned = (other_gaps < 0) & (gaps > least_gap) & (other_gaps < -least_gap)
        first = part_of(every, turned)
        behind = [len(gold) + each[turned] for each in own]
        swapped = Pairs(torch.cat([first.chosen, behind[1]]), torch.cat([first.rejected, behind[0]]), first.group.repeat(2))
        return {"all pairs": every, "clear pairs": part_of(every, gaps > least_gap),
                "clear, equal length": part_of(every, equal & (gaps > least_gap)), "same words, other prompt": swapped}  # fmt: skip


def do_run(world: World, model_folder: Path, run: Run) -> None:
    """Train the members of a run and write its files, unless they are there."""
    target = world.folder / "proxies" / f"{run.name}.json"
    if target.exists():
        return
    clean = {split: pairs_of(world.lines["pairs"], world.gold["pairs"], split, run.labels.least_gap) for split in ("train", "validation")}
    pairs, flipped = labelled(clean["train"], run.labels, run.seed)
    validation, _ = labelled(clean["validation"], replace(run.labels, per_prompt=None), run.seed + 1)
    rows, snapshots = world.rows["pairs"], []
    figures: dict[str, Any] = {"run": asdict(run), "losses": [], "validation": []}
    start = start_of(model_folder, world.depth, run.variant, run.seed)
    first = weights_of(start)
    for member in range(run.members):
        start.load_state_dict(first)
        best, kept, losses, curve = -1.0, first, [], []

        def at_epoch(epoch: int, loss: float) -> None:
            nonlocal best, kept
            value = accuracy(rewards_of(start, rows, world.depth)[0], validation)
            losses.append(loss)
            curve.append(value)
            if value > best:
                best, kept = value, weights_of(start)

        train(start, run.variant, rows, world.depth, pairs, 100 * run.seed + member, at_epoch)
        snapshots.append({"end": weights_of(start), "best": kept})
        figures["losses"].append(losses)
        figures["validation"].append(curve)
    tensors: dict[str, Tensor] = {}
    for kept_name in KEPT:
        named = {f"member {place}": each[kept_name] for place, each in enumerate(snapshots)}
        if run.members > 1:
            named["WARM"] = averaged(list(named.values()))
        scored = {name: _score(world, start, weights) for name, weights in named.items()}
        if run.members > 1:
            scored["ensemble"] = _ensemble([scored[f"member {place}"] for place in range(run.members)], world)
        for name, found in scored.items():
            both = torch.cat([found["pairs"], found["swapped"]])
            about = {split: accuracy(both, each) for split, each in world.test_sets(run.labels.least_gap).items() if len(each.group)}
            about |= {"validation": accuracy(both, validation), "train": accuracy(both, pairs)}
            if bool(flipped.any()):
                about["flips learnt"] = accuracy(both, part_of(pairs, flipped))
            if "log_variance" in found:
                about["kl_nats"] = float(found["log_variance"])
            figures.setdefault(kept_name, {})[name] = about
            tensors |= {f"{kept_name}.{name}.{part}": value for part, value in found.items() if value.dim()}
    target.parent.mkdir(exist_ok=True)
    save_file({name: value.float().contiguous() for name, value in tensors.items()}, target.with_suffix(".safetensors"))
    write_json(target, figures)


@torch.no_grad()
def _score(world: World, model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rewards of every part, and for InfoRM ``latents.attack``, ``latents.other`` and the mean KL on ``pairs``."""
    from inform_rm.training.losses import kl_to_standard_normal

    model.load_state_dict(weights)
    found: dict[str, Tensor] = {}
    for part in world.parts:
        found[part], latents = rewards_of(model, world.rows[part], world.depth)
        if latents is not None and part in ("attack", "other"):
            found[f"latents.{part}"] = latents
    if model.model.config.architecture == "inform":
        rows = world.rows["pairs"]
        _, mean, log_variance = model(rows.states[world.depth][:256], rows.lengths[:256])
        found["log_variance"] = kl_to_standard_normal(mean, log_variance).mean()
    return found


def _ensemble(members: list[dict[str, Tensor]], world: World) -> dict[str, Tensor]:
    """UWO: mean less COEFFICIENT times variance of the members' rewards, each in units of its own deviation."""
    own = torch.tensor([line["split"] == "train" for line in world.lines["pairs"]])
    scales = [(each["pairs"][own].mean(), each["pairs"][own].std()) for each in members]
    found = {}
    for part in world.parts:
        rewards = torch.stack([(each[part] - mean) / deviation for each, (mean, deviation) in zip(members, scales, strict=True)])
        found[part] = rewards.mean(dim=0) - COEFFICIENT * rewards.var(dim=0, correction=0)
    return found


def read_run(folder: Path, run: Run) -> dict[str, Any] | None:
    """Figures of a run; ``None`` if it was not done."""
    path = folder / "proxies" / f"{run.name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def rewards_of_run(folder: Path, run: Run) -> dict[str, Tensor]:
    return load_file(folder / "proxies" / f"{run.name}.safetensors")


def choose(folder: Path, candidates: Iterable[Variant], labels: Labels) -> tuple[Variant, str]:
    """Setting and epoch that are right about most validation pairs, mean over the selection seeds."""
    scores = {}
    for variant in candidates:
        runs = [read_run(folder, Run(variant, labels, seed)) for seed in SELECTION_SEEDS]
        if None not in runs:
            for kept in KEPT:
                scores[variant, kept] = sum(run[kept]["member 0"]["validation"] for run in runs if run) / len(runs)
    if not scores:
        raise FileNotFoundError(f"{folder / 'proxies'}: no candidate was run on all selection seeds. Run the stage 'search'.")
    return max(scores, key=lambda each: scores[each])


def chosen_of(folder: Path, labels: Labels) -> dict[str, tuple[Variant, str]]:
    """What the reported seeds are asked about: by name a setting and which epoch is kept."""
    return {
        "standard, as it comes": (Variant("standard"), "end"),
        "standard, chosen": choose(folder, standard_candidates(), labels),
        "InfoRM, as it comes": (Variant(), "end"),
        "InfoRM, chosen": choose(folder, inform_candidates(), labels),
    }


def competent(folder: Path, labels: Labels) -> list[str]:
    """What is wrong with the chosen proxies of the reported seeds; nothing if they may be attacked."""
    faults = []
    for name, (variant, kept) in chosen_of(folder, labels).items():
        if "chosen" in name:
            runs = [read_run(folder, Run(variant, labels, seed, MEMBERS)) for seed in REPORT_SEEDS]
            values = [run[kept]["member 0"][GATED] for run in runs if run]
            mean = sum(values) / len(values)
            if mean < GATE[labels.noise]:
                faults.append(f"{name}, {labels.noise:.0%} flipped: {mean:.3f} of {GATED}, needed {GATE[labels.noise]}")
    return faults
