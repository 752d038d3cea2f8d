"""Stage 2 of `real_text.py`: the gold reward model, trained on human pairs, and its rewards of everything sampled.

Gold has all layers of the policy. As many models of the proxies' layers are trained on the same pairs: a table says
which reads human preferences better. Files: ``gold/KIND-SEED.json``; of the first gold the folder ``gold/model``, as
the package saves it, and ``gold/rewards.safetensors``, one tensor a part in units of a standard deviation.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inform_rm import InfoRMForSequenceClassification
from inform_rm.util.files import write_json
from real_text_models import Pairs, Variant, rewards_of, start_of, train
from real_text_texts import Rows, Sizes, is_train, read_rows

SCORED = ("pairs", "attack", "other")
SEEDS = (0, 1)  # the first is gold
SETTING = Variant("standard", learning_rate=5e-5, epochs=2, pairs_per_step=32)
UNITS = "units"  # of the raw gold rewards: mean and standard deviation, beside the parts


def human_pairs(folder: Path) -> tuple[Rows, dict[str, Pairs], list[str]]:
    """Rows, pairs by split, and the source of each test pair; rows 2 i and 2 i + 1 are pair i, the preferred first."""
    rows, about = read_rows(folder, "real"), json.loads((folder / "samples" / "real.json").read_text())
    found = {}
    for split in ("train", "test"):
        first = torch.tensor([2 * place for place, each in enumerate(about) if each["split"] == split])
        found[split] = Pairs(first, first + 1)
    return rows, found, [each["source"] for each in about if each["split"] == "test"]


def train_gold(folder: Path, model_folder: Path, layers: int, kind: str, seed: int, device: str) -> None:
    """One model on the human pairs, unless it is there."""
    target = folder / "gold" / f"{kind}-{seed}.json"
    if target.exists():
        return
    rows, pairs, sources = human_pairs(folder)
    model = start_of(model_folder, layers, SETTING, seed, device)
    loss = train(model, SETTING, rows, pairs["train"], seed, device)
    rewards, _ = rewards_of(model, _part(rows, pairs["test"]), device)
    count = len(pairs["test"])
    right = (rewards[:count] > rewards[count:]).tolist()
    by_source = {each: [ok for ok, source in zip(right, sources, strict=True) if source == each]
                 for each in sorted(set(sources))}  # fmt: skip
    if kind == "gold" and seed == SEEDS[0]:
        model.save_pretrained(folder / "gold" / "model")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, {
        "pairs": {split: len(each) for split, each in pairs.items()}, "setting": asdict(SETTING), "layers": layers,
        "loss": loss, "test": sum(right) / count, "right": right,
        "by_source": {each: [sum(own) / len(own), len(own)] for each, own in by_source.items()},
    })  # fmt: skip
    print(kind, seed, f"loss {loss:.3f}, test {sum(right) / count:.3f}", flush=True)


def _part(rows: Rows, pairs: Pairs) -> Rows:
    places = torch.cat([pairs.chosen, pairs.rejected])
    return Rows(*(value[places] for value in vars(rows).values()))


class Gold:
    """The gold model, in units of a standard deviation of its rewards of the policy's training responses."""

    def __init__(self, folder: Path, device: str):
        self.model = InfoRMForSequenceClassification.from_pretrained(folder / "gold" / "model").to(device).eval()
        self.units, self.device = gold_rewards(folder, UNITS), device

    def __call__(self, rows: Rows) -> Tensor:
        """``(N,)`` float64."""
        return (rewards_of(self.model, rows, self.device)[0].double() - self.units[0]) / self.units[1]


def score_with_gold(folder: Path, device: str, sizes: Sizes) -> None:
    """Gold's rewards of all parts, in units of those of the policy's training responses."""
    target = folder / "gold" / "rewards.safetensors"
    if target.exists():
        return
    model = InfoRMForSequenceClassification.from_pretrained(folder / "gold" / "model").to(device).eval()
    found = {}
    for part in SCORED:
        rows = read_rows(folder, part)
        found[part] = rewards_of(model, rows, device)[0].double()
        if part == "pairs":
            own = found[part][is_train(rows, sizes)]
            units = torch.stack([own.mean(), own.std()])
    scaled = {part: (values - units[0]) / units[1] for part, values in found.items()}
    save_file({**scaled, UNITS: units}, target)


def gold_rewards(folder: Path, part: str) -> Tensor:
    """``(N,)`` gold rewards of a part, in the order of its rows; of ``UNITS`` what was subtracted and divided by."""
    return load_file(folder / "gold" / "rewards.safetensors")[part]
