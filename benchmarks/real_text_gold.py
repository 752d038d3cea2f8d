"""Stage 2 of `real_text.py`: the gold reward model, trained on human pairs, and its rewards of everything sampled.

All 30 layers; the top one, the final norm and the head are trained. The proxies' layers are trained on the same pairs
with the same setting: a table says which reads human preferences better. Files: ``gold/model.safetensors``,
``gold/rewards.safetensors`` (one tensor a part, in units of a standard deviation) and ``gold/result.json``.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inform_rm.util.files import write_json
from inform_rm.util.intervals import wilson_interval
from real_text_models import Pairs, Prepared, TopLayers, Variant, accuracy, rewards_of, start_of, train, weights_of
from real_text_samples import depths_of, read_part

SCORED = ("real", "pairs", "swapped", "attack", "other")
SEEDS = (0, 1, 2)  # the first is gold
# Of four, the best on validation pairs of an earlier run.
SETTING = Variant("standard", dropout=0.1, learning_rate=3e-4, epochs=6, groups_per_step=16)
UNITS = "units"  # of the raw gold rewards: mean and standard deviation, beside the parts


def human_pairs(lines: list[dict[str, Any]]) -> dict[str, Pairs]:
    """``train`` and ``test``; rows 2 i and 2 i + 1 are the preferred and the other response of pair i."""
    found = {}
    for split in ("train", "test"):
        first = torch.tensor([place for place in range(0, len(lines), 2) if lines[place]["split"] == split])
        found[split] = Pairs(first, first + 1, first)
    return found


def train_gold(folder: Path, model_folder: Path, layers: int) -> None:
    """Train both depths on all seeds, and keep the first of the full model."""
    spans = dict(zip(("gold", "proxy layers"), depths_of(layers)[::-1], strict=True))
    rows, lines = read_part(folder, "real", tuple(span.start for span in spans.values()))
    pairs = human_pairs(lines)
    result: dict[str, Any] = {
        "pairs": {split: len(each.chosen) for split, each in pairs.items()}, "setting": asdict(SETTING)
    }  # fmt: skip
    for name, span in spans.items():
        ready = Prepared(rows.states[span.start], rows.lengths)
        runs = [_trained(model_folder, span, ready, pairs["train"], seed) for seed in SEEDS]
        result[name] = {
            "test": [accuracy(rewards, pairs["test"]) for _, rewards in runs],
            "by_source": {source: [accuracy(rewards, part) for _, rewards in runs]
                          for source, part in _sources(pairs["test"], lines)},
            "right": _right(runs[0][1], pairs["test"]),
        }  # fmt: skip
        result[name]["interval_of_first"] = wilson_interval(sum(result[name]["right"]), len(result[name]["right"]))
        if name == "gold":
            (folder / "gold").mkdir(exist_ok=True)
            save_file(weights_of(runs[0][0].model), folder / "gold" / "model.safetensors")
        print(name, result[name]["test"], result[name]["by_source"], flush=True)
    write_json(folder / "gold" / "result.json", result)


def _trained(model_folder: Path, span: range, rows: Prepared, pairs: Pairs, seed: int) -> tuple[TopLayers, Tensor]:
    model = start_of(model_folder, span, SETTING, seed)
    train(model, SETTING, rows, pairs, seed, lambda loss: None)
    return model, rewards_of(model, rows)[0]


def _right(rewards: Tensor, pairs: Pairs) -> list[bool]:
    return (rewards[pairs.chosen] > rewards[pairs.rejected]).tolist()


def _sources(pairs: Pairs, lines: list[dict[str, Any]]) -> list[tuple[str, Pairs]]:
    sources = [lines[place]["source"] for place in pairs.chosen.tolist()]
    found = []
    for source in sorted(set(sources)):
        own = torch.tensor([each == source for each in sources])
        found.append((source, Pairs(pairs.chosen[own], pairs.rejected[own], pairs.group[own])))
    return found


def load_gold(folder: Path, model_folder: Path, layers: int) -> TopLayers:
    """The kept gold model, on cached states."""
    model = start_of(model_folder, depths_of(layers)[1], SETTING, 0)
    model.model.load_state_dict(load_file(folder / "gold" / "model.safetensors"))
    return model


def score_with_gold(folder: Path, model_folder: Path, layers: int) -> None:
    """Gold rewards of all parts, less the mean and over the standard deviation of the policy's training responses."""
    depth = depths_of(layers)[1].start
    model, found = load_gold(folder, model_folder, layers), {}
    units = torch.tensor([0.0, 1.0])
    for part in SCORED:
        if (folder / "samples" / part).exists():
            rows, lines = read_part(folder, part, (depth,))
            found[part] = rewards_of(model, Prepared(rows.states[depth], rows.lengths))[0].double()
            if part == "pairs":
                own = found[part][torch.tensor([line["split"] == "train" for line in lines])]
                units = torch.stack([own.mean(), own.std()])
    scaled = {part: (values - units[0]) / units[1] for part, values in found.items()}
    save_file({**scaled, UNITS: units}, folder / "gold" / "rewards.safetensors")


def gold_rewards(folder: Path, part: str) -> Tensor:
    """``(N,)`` gold rewards of a part, in the order of its rows; of ``UNITS`` what was subtracted and divided by."""
    return load_file(folder / "gold" / "rewards.safetensors")[part]
