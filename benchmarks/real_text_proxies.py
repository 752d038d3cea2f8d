"""Stages 3 and 4 of `real_text.py`: pairs of the policy's responses labelled by gold, and proxies trained on them.

A run is a variant, a share of flipped labels, a seed and a number of members. A seed draws flips, head and order of
the pairs; members of a run differ in order, dropout and latent noise alone, and start from one head, as WARM needs it.
Files: ``proxies/NAME.json`` with the figures, ``proxies/NAME.safetensors`` with the weights.
"""

import hashlib
import itertools
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inform_rm.training.losses import kl_to_standard_normal
from inform_rm.util.files import write_json
from real_text_gold import gold_rewards
from real_text_models import Pairs, Prepared, Variant, accuracy, averaged, rewards_of, start_of, train, weights_of
from real_text_samples import concatenated, read_part

REPORT_SEEDS = (10, 11, 12)  # settings were chosen on others
MEMBERS = 3
NOISE = (0.0, 0.25)  # shares of flipped labels, of training and validation pairs
ATTACKED_NOISE = 0.25  # of the proxies that policies are trained against
COEFFICIENT = 0.5  # lambda of UWO, for rewards in units of a standard deviation
GATE = {0.0: 0.8, 0.25: 0.7}  # least accuracy on clean held-out pairs, by share of flipped labels
GATED, CLEAR = "prompt decides", 0.5  # standard deviations of gold between the responses of a clear pair
PARTS = ("pairs", "swapped")


@dataclass(frozen=True)
class Run:
    """One file of results."""

    variant: Variant
    noise: float
    seed: int
    members: int = 1

    @property
    def name(self) -> str:
        key = json.dumps(asdict(self), sort_keys=True)
        kind = f"{self.variant.architecture}-{self.noise:g}-{self.seed}-{self.members}"
        return f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"


def pairs_of(lines: list[dict[str, Any]], gold: Tensor, split: str) -> Pairs:
    """All pairs of responses under one prompt of a split, the better one by gold first."""
    of_prompt: dict[int, list[int]] = {}
    for row, line in enumerate(lines):
        if line["split"] == split:
            of_prompt.setdefault(line["prompt_number"], []).append(row)
    found = [
        (one, other, prompt) if gold[one] > gold[other] else (other, one, prompt)
        for prompt, rows in of_prompt.items() for one, other in itertools.combinations(rows, 2)
    ]  # fmt: skip
    return Pairs(*torch.tensor(found).reshape(-1, 3).T.contiguous())


def part_of(pairs: Pairs, kept: Tensor) -> Pairs:
    return Pairs(pairs.chosen[kept], pairs.rejected[kept], pairs.group[kept])


def labelled(pairs: Pairs, noise: float, seed: int) -> tuple[Pairs, Tensor]:
    """Pairs of which this share is flipped, and which are."""
    flipped = torch.rand(len(pairs.group), generator=torch.Generator().manual_seed(seed + 1000)) < noise
    chosen = torch.where(flipped, pairs.rejected, pairs.chosen)
    return Pairs(chosen, torch.where(flipped, pairs.chosen, pairs.rejected), pairs.group), flipped


class World:
    """The responses that pairs are made of, each under two prompts, with gold rewards, as the proxies read them."""

    def __init__(self, folder: Path, depth: int):
        self.folder = folder
        parts = [read_part(folder, part, (depth,)) for part in PARTS]
        rows = concatenated([part[0] for part in parts])
        self.lines = [line for part in parts for line in part[1]]
        self.ready = Prepared(rows.states[depth], rows.lengths)
        self.gold = torch.cat([gold_rewards(folder, part) for part in PARTS])
        self.own = len(parts[0][1])  # rows before this one are under the prompt that they were written to

    def test_sets(self) -> dict[str, Pairs]:
        """Clean held-out pairs.

        ``all pairs`` of responses written to their prompt, the clear ones of them, and those of equal length. ``prompt
        decides``: adversarial prompts, which is every two of the responses to a prompt and its partner of which gold
        prefers one under the one prompt and the other under the other; both readings are a pair each, so that a reward
        that does not read the prompt has 0.5. ``prompt decides, clear``: by at least `CLEAR` under both.
        """
        gold = self.gold
        every = pairs_of(self.lines[: self.own], gold, "test")
        tokens = torch.tensor([line["tokens"] for line in self.lines])
        equal = tokens[every.chosen] == tokens[every.rejected]
        clear = gold[every.chosen] - gold[every.rejected] > CLEAR
        return {
            "all pairs": every,
            "clear pairs": part_of(every, clear),
            "clear, equal length": part_of(every, equal & clear),
            "prompt decides": turned_pairs(self.lines, gold, "test"),
            "prompt decides, clear": turned_pairs(self.lines, gold, "test", CLEAR),
        }


def turned_pairs(lines: list[dict[str, Any]], gold: Tensor, split: str, least_gap: float = 0.0) -> Pairs:
    """Pairs of responses that gold orders one way under one prompt and the other way under the other."""
    row_of: dict[tuple[int, int], int] = {}  # of a prompt and a response
    prompts_of: dict[int, list[int]] = {}
    texts_of: dict[int, list[int]] = {}
    for row, line in enumerate(lines):
        if line["split"] == split:
            prompt, text = line["prompt_number"], line.get("of_row", row)
            row_of[prompt, text] = row
            prompts_of.setdefault(text, []).append(prompt)
            texts_of.setdefault(prompt, []).append(text)
    found = []
    for prompt, texts in texts_of.items():
        for one, other in itertools.combinations(texts, 2):
            gaps = {each: float(gold[row_of[each, one]] - gold[row_of[each, other]]) for each in prompts_of[one]}
            own = gaps.pop(prompt)
            if any(own * gap < 0 and min(abs(own), abs(gap)) > least_gap for gap in gaps.values()):
                better, worse = (one, other) if own > 0 else (other, one)
                found.append((row_of[prompt, better], row_of[prompt, worse], prompt))
    return Pairs(*torch.tensor(found).reshape(-1, 3).T.contiguous())


def do_run(world: World, model_folder: Path, span: range, run: Run) -> None:
    """Train the members of a run and write its files, unless they are there."""
    target = world.folder / "proxies" / f"{run.name}.json"
    if target.exists():
        return
    pairs, flipped = labelled(pairs_of(world.lines, world.gold, "train"), run.noise, run.seed)
    figures: dict[str, Any] = {"run": asdict(run), "losses": []}
    start = start_of(model_folder, span, run.variant, run.seed)
    first, named = weights_of(start), {}
    for member in range(run.members):
        start.load_state_dict(first)
        losses: list[float] = []
        train(start, run.variant, world.ready, pairs, 100 * run.seed + member, losses.append)
        figures["losses"].append(losses)
        named[f"member {member}"] = weights_of(start)
    if run.members > 1:
        named["WARM"] = averaged(list(named.values()))
    scored = {name: _score(world, start, weights) for name, weights in named.items()}
    if run.members > 1:
        members = [scored[f"member {place}"] for place in range(run.members)]
        scored["ensemble"] = ensemble(members, _units(world, scored))
    sets = {**world.test_sets(), "train": pairs, "flips learnt": part_of(pairs, flipped)}
    for name, rewards in scored.items():
        figures[name] = {split: accuracy(rewards, each) for split, each in sets.items() if len(each.group)}
    figures["units"] = _units(world, scored)
    if run.variant.architecture == "inform":
        figures["kl_nats"] = _kl(start, named["member 0"], world.ready[: world.own])
    kept = {f"{name}.{part}": value.contiguous() for name, each in named.items() for part, value in each.items()
            if "embed_tokens" not in part}  # fmt: skip
    target.parent.mkdir(exist_ok=True)
    save_file(kept, target.with_suffix(".safetensors"))
    write_json(target, figures)


def _score(world: World, model: Any, weights: dict[str, Tensor]) -> Tensor:
    """Rewards of all rows."""
    model.load_state_dict(weights)
    return rewards_of(model, world.ready)[0]


@torch.no_grad()
def _kl(model: Any, weights: dict[str, Tensor], rows: Prepared) -> float:
    model.load_state_dict(weights)
    _, mean, log_variance = model.eval()(rows)
    return float(kl_to_standard_normal(mean, log_variance).mean())


def _units(world: World, scored: dict[str, Tensor]) -> dict[str, list[float]]:
    """Mean and standard deviation of each model's rewards of the policy's training responses."""
    own = torch.tensor([line["split"] == "train" for line in world.lines[: world.own]]).nonzero()[:, 0]
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


def weights_of_run(folder: Path, run: Run) -> dict[str, dict[str, Tensor]]:
    """Weights by member; those of the embeddings, which are not used, are missing."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in load_file(folder / "proxies" / f"{run.name}.safetensors").items():
        member, part = name.split(".", 1)
        found.setdefault(member, {})[part] = value
    return found


def chosen_of() -> dict[str, Variant]:
    """What is asked about; the chosen settings are those of an earlier search, in docs/results/real-text.md."""
    return {
        "standard, chosen": Variant("standard", dropout=0.1),
        "InfoRM, chosen": Variant(beta=0.01),
        "InfoRM, as it comes": Variant(),
    }


def methods_of(noise: float) -> dict[str, tuple[Variant, int, str]]:
    """By name: setting, members of the run and which of its rewards; with flips several members, too."""
    found = {}
    for name, variant in chosen_of().items():
        found[name] = (variant, 1, "member 0")
        if noise and "chosen" in name:
            found |= {f"{name}, {kind}": (variant, MEMBERS, kind) for kind in ("ensemble", "WARM")}
    return found


def incompetent(folder: Path) -> dict[float, list[str]]:
    """By share of flipped labels what is wrong with the chosen single proxies; those without a fault are attacked."""
    faults: dict[float, list[str]] = {noise: [] for noise in NOISE}
    for noise, (name, variant) in itertools.product(NOISE, chosen_of().items()):
        if "chosen" in name:
            runs = [read_run(folder, Run(variant, noise, seed)) for seed in REPORT_SEEDS]
            mean = statistics.mean(run["member 0"][GATED] for run in runs if run)
            if mean < GATE[noise]:
                faults[noise].append(f"{name}, {noise:.0%} flipped: {mean:.3f} of {GATED} right, needed {GATE[noise]}")
    return faults
