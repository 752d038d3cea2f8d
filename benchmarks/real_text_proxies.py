"""Stage 3 of `real_text.py`: pairs of the policy's responses labelled by gold, and proxies trained on them.

A prompt gives `per_prompt - 2` of its responses as pairs of their own, and two more against a response that was
written to its partner: so each response is in one pair a prompt, and no two pairs tell of the same.

A run is a variant, a share of flipped labels and a seed, which draws flips, head and order; a member of a run differs
in order and noise of training alone, and starts from the same head, as WARM needs it. Files: ``proxies/NAME.json``
with the figures, ``proxies/NAME.safetensors`` with the weights.
"""

import hashlib
import itertools
import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inform_rm.training.losses import kl_to_standard_normal
from inform_rm.util.files import write_json
from real_text_gold import gold_rewards
from real_text_models import Pairs, Variant, accuracy, averaged, batch, half_products, rewards_of, start_of, train
from real_text_texts import Rows, Sizes, is_train, read_rows, splits_of

SEARCH_SEEDS = (0,)
REPORT_SEEDS = (10, 11, 12)
MEMBERS = 3
NOISE = (0.0, 0.25)  # shares of flipped labels, of training and validation pairs
ATTACKED_NOISE = 0.25
COEFFICIENT = 0.5  # lambda of UWO, for rewards in units of a standard deviation
GATE = {0.0: 0.8, 0.25: 0.7}  # least accuracy on clean held-out pairs, by share of flipped labels
GATED, CLEAR = "prompt decides", 0.5  # standard deviations of gold between the responses of a clear pair
# Searched on noisy validation pairs, as many of either kind.
SEARCHED = {
    "standard": [Variant("standard", epochs=2, **more)
                 for more in ({}, {"attention_dropout": 0.1}, {"label_smoothing": 0.1})],
    "InfoRM": [Variant(beta=beta, epochs=2) for beta in (0.01, 0.03, 0.1)],
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One file of results."""

    variant: Variant
    noise: float
    seed: int
    member: int = 0

    @property
    def name(self) -> str:
        key = json.dumps(asdict(self), sort_keys=True)
        kind = f"{self.variant.architecture}-{self.noise:g}-{self.seed}-{self.member}"
        return f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"


class World:
    """Responses under their own and under their partner's prompt, with gold rewards.

    Rows of prompt p: ``2 * per_prompt`` from ``2 * per_prompt * p`` on, the second half written to its partner.
    """

    def __init__(self, folder: Path, sizes: Sizes):
        self.folder, self.sizes, self.per_prompt, self.splits = folder, sizes, sizes.per_prompt, splits_of(sizes)
        self.rows, self.gold = read_rows(folder, "pairs"), gold_rewards(folder, "pairs")

    def prompts(self, split: str) -> list[int]:
        return [number for number, name in enumerate(self.splits) if name == split]

    def pairs(self, split: str) -> Pairs:
        """The pairs that proxies learn from, the better one by gold first."""
        own, found = self.per_prompt, []
        for number in self.prompts(split):
            first = 2 * own * number
            found += [(first + place, first + place + 1) for place in range(0, own - 2, 2)]
            found += [(first + place, first + own + place) for place in (own - 2, own - 1)]
        return self._by_gold(found)

    def _by_gold(self, found: Iterable[tuple[int, int]]) -> Pairs:
        one, other = torch.tensor(list(found), dtype=torch.long).reshape(-1, 2).T
        better = self.gold[one] > self.gold[other]
        return Pairs(torch.where(better, one, other), torch.where(better, other, one))

    def test_sets(self) -> dict[str, Pairs]:
        """Clean held-out pairs.

        ``all pairs`` of responses written to their prompt, the clear ones of them, and those of equal length. ``prompt
        decides``: adversarial prompts, which is every two of the responses to a prompt and its partner of which gold
        prefers one under the one prompt and the other under the other; both readings are a pair each, so that a reward
        that does not read the prompt has 0.5. ``prompt decides, clear``: by at least `CLEAR` under both.
        """
        own = self.per_prompt
        every = self._by_gold(
            pair for number in self.prompts("test")
            for pair in itertools.combinations(range(2 * own * number, 2 * own * number + own), 2)
        )  # fmt: skip
        tokens = self.rows.responses()
        equal = tokens[every.chosen] == tokens[every.rejected]
        clear = self.gold[every.chosen] - self.gold[every.rejected] > CLEAR
        return {
            "all pairs": every, "clear pairs": every[clear], "clear, equal length": every[equal & clear],
            GATED: self.turned_pairs("test", 0.0), f"{GATED}, clear": self.turned_pairs("test", CLEAR),
        }  # fmt: skip

    def turned_pairs(self, split: str, least_gap: float) -> Pairs:
        """Pairs of responses that gold orders one way under one prompt and the other way under its partner."""
        own, prompts, gold, found = self.per_prompt, self.prompts(split), self.gold.tolist(), []
        for one, other in zip(prompts[::2], prompts[1::2], strict=False):
            first, second = 2 * own * one, 2 * own * other
            # Place t of the first prompt's rows: the same text as place t, halves changed, of the other's.
            twin = [second + (place + own) % (2 * own) for place in range(2 * own)]
            for a, b in itertools.combinations(range(2 * own), 2):
                here = gold[first + a] - gold[first + b]
                there = gold[twin[a]] - gold[twin[b]]
                if here * there < 0 and min(abs(here), abs(there)) > least_gap:
                    found += [(first + a, first + b), (twin[a], twin[b])]
        return self._by_gold(found)


def labelled(pairs: Pairs, noise: float, seed: int) -> tuple[Pairs, Tensor]:
    """Pairs of which this share is flipped, and which are."""
    flipped = torch.rand(len(pairs), generator=torch.Generator().manual_seed(seed + 1000)) < noise
    chosen = torch.where(flipped, pairs.rejected, pairs.chosen)
    return Pairs(chosen, torch.where(flipped, pairs.chosen, pairs.rejected)), flipped


def do_run(world: World, model_folder: Path, layers: int, run: Run, device: str) -> None:
    """Train one proxy and write its files, unless they are there; of a searched one no weights are kept."""
    target = world.folder / "proxies" / f"{run.name}.json"
    if target.exists():
        return
    pairs, flipped = labelled(world.pairs("train"), run.noise, run.seed)
    validation, _ = labelled(world.pairs("validation"), run.noise, run.seed + 1)
    model = start_of(model_folder, layers, run.variant, run.seed, device)
    loss = train(model, run.variant, world.rows, pairs, 100 * run.seed + run.member, device)
    rewards, _ = rewards_of(model, world.rows, device)
    sets = {**world.test_sets(), "validation": validation, "train": pairs, "flips learnt": pairs[flipped]}
    figures: dict[str, Any] = {
        "run": asdict(run), "loss": loss, "units": units_of(world, rewards),
        "accuracy": {name: accuracy(rewards, each) for name, each in sets.items() if len(each)},
        "count": {name: len(each) for name, each in sets.items()},
    }  # fmt: skip
    if run.variant.architecture == "inform":
        figures["kl_nats"] = _kl(model, world.rows, device)
    target.parent.mkdir(parents=True, exist_ok=True)
    if run.seed in REPORT_SEEDS:
        kept = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(kept, target.with_suffix(".safetensors"))
    write_json(target, figures)


@torch.no_grad()
def _kl(model: Any, rows: Rows, device: str) -> float:
    """Mean KL divergence of 256 posteriors from the prior, nats."""
    with half_products(device, training=False):
        output = model(*batch(rows, torch.arange(0, len(rows.lengths), -(-len(rows.lengths) // 256)), device))
    return float(kl_to_standard_normal(output.latent_mean, output.latent_log_variance).mean())


def units_of(world: World, rewards: Tensor) -> list[float]:
    """Mean and standard deviation of a model's rewards of the policy's training responses."""
    own = is_train(world.rows, world.sizes)
    return [float(rewards[own].mean()), float(rewards[own].std())]


def write_warm(world: World, model_folder: Path, layers: int, runs: list[Run], device: str) -> None:
    """WARM of the members of a run: the model of their mean weights, as ``warm-NAME``."""
    target = world.folder / "proxies" / f"warm-{runs[0].name}.json"
    if target.exists():
        return
    model = start_of(model_folder, layers, runs[0].variant, runs[0].seed, device)
    mean = averaged([load_file(world.folder / "proxies" / f"{run.name}.safetensors") for run in runs])
    model.load_state_dict(mean)
    rewards, _ = rewards_of(model, world.rows, device)
    save_file({name: value.contiguous() for name, value in mean.items()}, target.with_suffix(".safetensors"))
    write_json(target, {
        "run": asdict(runs[0]), "units": units_of(world, rewards),
        "accuracy": {name: accuracy(rewards, each) for name, each in world.test_sets().items() if len(each)},
    })  # fmt: skip


def load_run(folder: Path, model_folder: Path, layers: int, run: Run, device: str, warm: bool = False) -> Any:
    """The model of a run, in eval mode."""
    model = start_of(model_folder, layers, run.variant, run.seed, device)
    name = f"warm-{run.name}" if warm else run.name
    model.load_state_dict(load_file(folder / "proxies" / f"{name}.safetensors"))
    return model.eval()


def read_run(folder: Path, name: str) -> dict[str, Any] | None:
    """Figures of a run; ``None`` if it was not done."""
    path = folder / "proxies" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def searched_runs() -> list[Run]:
    variants = [variant for each in SEARCHED.values() for variant in each]
    return [Run(variant, ATTACKED_NOISE, seed) for seed in SEARCH_SEEDS for variant in variants]


def chosen_of(folder: Path) -> dict[str, Variant]:
    """What is asked about: of either kind the best on validation pairs with flips, and InfoRM with the defaults."""
    found = {}
    for kind, variants in SEARCHED.items():
        scores = [statistics.mean(_figures(folder, Run(variant, ATTACKED_NOISE, seed))["accuracy"]["validation"]
                                  for seed in SEARCH_SEEDS) for variant in variants]  # fmt: skip
        found[f"{kind}, chosen"] = variants[scores.index(max(scores))]
    return {**found, "InfoRM, as it comes": Variant(epochs=found["InfoRM, chosen"].epochs)}


def _figures(folder: Path, run: Run) -> dict[str, Any]:
    found = read_run(folder, run.name)
    if found is None:
        raise FileNotFoundError(f"{folder / 'proxies'}: no {run.name}. Run the stage 'search' first.")
    return found


def reported_runs(folder: Path) -> list[Run]:
    """Proxies on the reported seeds, at all shares of flipped labels; with flips several members of the chosen."""
    found = []
    for name, variant in chosen_of(folder).items():
        for noise in NOISE:
            members = MEMBERS if noise and "chosen" in name else 1
            if noise or "chosen" in name:
                found += [Run(variant, noise, seed, member) for member in range(members) for seed in REPORT_SEEDS]
    return sorted(dict.fromkeys(found), key=lambda run: run.member)


def incompetent(folder: Path) -> dict[float, list[str]]:
    """By share of flipped labels what is wrong with the chosen single proxies; those without a fault are attacked."""
    faults: dict[float, list[str]] = {noise: [] for noise in NOISE}
    for noise, (name, variant) in itertools.product(NOISE, chosen_of(folder).items()):
        if "chosen" in name:
            mean = statistics.mean(
                _figures(folder, Run(variant, noise, seed))["accuracy"][GATED] for seed in REPORT_SEEDS
            )
            if mean < GATE[noise]:
                faults[noise].append(f"{name}, {noise:.0%} flipped: {mean:.3f} of {GATED} right, needed {GATE[noise]}")
    return faults
