"""Stage 2 of `real_text.py`: the gold reward model, trained on human pairs, and its rewards of everything sampled.

All 30 layers; of the top one the query, output and MLP, the final norm and the head are trained. The proxies' six
layers are trained on the same pairs with the same search: a table says which reads human preferences better.
Files: ``gold/model.safetensors``, ``gold/rewards.safetensors`` (one tensor a part, in units of a standard deviation)
and ``gold/result.json``.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inform_rm.util.files import write_json
from inform_rm.util.intervals import wilson_interval
from real_text_models import Pairs, Prepared, TopLayer, Variant, accuracy, rewards_of, start_of, train, weights_of
from real_text_samples import depths_of, read_part

SCORED = ("real", "pairs", "swapped", "attack", "other")
SEEDS = (0, 1, 2)  # the first is gold
PLAIN = Variant("standard", groups_per_step=16, dropout=0.1)
CANDIDATES = [replace(PLAIN, learning_rate=rate, epochs=epochs) for rate in (3e-4, 1e-3) for epochs in (3, 6)]


def human_pairs(lines: list[dict[str, Any]]) -> dict[str, Pairs]:
    """``train``, ``validation`` (a sixth of the training file's pairs) and ``test``."""
    places: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for first in range(0, len(lines), 2):
        split = lines[first]["split"]
        places["validation" if split == "train" and (first // 2) % 6 == 0 else split].append(first)
    return {
        split: Pairs(torch.tensor(found), torch.tensor(found) + 1, torch.tensor(found))
        for split, found in places.items()
    }


def train_gold(folder: Path, model_folder: Path, layers: int) -> None:
    """Choose settings on validation pairs for both depths, train the seeds, and keep the first of the full model."""
    proxy_depth, gold_depth = depths_of(layers)
    rows, lines = read_part(folder, "real", (proxy_depth, gold_depth))
    pairs = human_pairs(lines)
    result: dict[str, Any] = {"pairs": {split: len(each.chosen) for split, each in pairs.items()}}
    for name, depth in (("gold", gold_depth), ("proxy layers", proxy_depth)):
        ready = start_of(model_folder, depth, PLAIN, 0).prepare(rows, depth)
        tried = [
            [each, accuracy(_trained(model_folder, depth, each, ready, pairs["train"], 100)[1], pairs["validation"])]
            for each in CANDIDATES
        ]
        chosen = max(tried, key=lambda each: each[1])[0]
        runs = [_trained(model_folder, depth, chosen, ready, pairs["train"], seed) for seed in SEEDS]
        result[name] = {
            "setting": asdict(chosen), "tried": [[asdict(each), value] for each, value in tried],
            "test": [accuracy(rewards, pairs["test"]) for _, rewards in runs],
            "by_source": {source: [accuracy(rewards, part) for _, rewards in runs]
                          for source, part in _sources(pairs["test"], lines)},
            "right": _right(runs[0][1], pairs["test"]),
        }  # fmt: skip
        result[name]["interval_of_first"] = wilson_interval(sum(result[name]["right"]), len(result[name]["right"]))
        if name == "gold":
            (folder / "gold").mkdir(exist_ok=True)
            save_file(weights_of(runs[0][0].model), folder / "gold" / "model.safetensors")
        print(name, chosen, result[name]["test"], flush=True)
    write_json(folder / "gold" / "result.json", result)


def _trained(
    model_folder: Path, depth: int, variant: Variant, rows: Prepared, pairs: Pairs, seed: int
) -> tuple[TopLayer, Tensor]:
    model = start_of(model_folder, depth, variant, seed)
    train(model, variant, rows, pairs, seed, lambda epoch, loss: None)
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


def load_gold(folder: Path, model_folder: Path, layers: int) -> TopLayer:
    """The kept gold model, on cached states."""
    model = start_of(model_folder, depths_of(layers)[1], PLAIN, 0)
    model.model.load_state_dict(load_file(folder / "gold" / "model.safetensors"))
    return model


def score_with_gold(folder: Path, model_folder: Path, layers: int) -> None:
    """Gold rewards of all parts, less the mean and over the standard deviation of the policy's training responses."""
    depth = depths_of(layers)[1]
    model, found = load_gold(folder, model_folder, layers), {}
    mean, deviation = torch.tensor(0.0), torch.tensor(1.0)
    for part in SCORED:
        if (folder / "samples" / part).exists():
            rows, lines = read_part(folder, part, (depth,))
            found[part] = rewards_of(model, model.prepare(rows, depth))[0].double()
            if part == "pairs":
                own = found[part][torch.tensor([line["split"] == "train" for line in lines])]
                mean, deviation = own.mean(), own.std()
    save_file(
        {part: (values - mean) / deviation for part, values in found.items()}, folder / "gold" / "rewards.safetensors"
    )


def gold_rewards(folder: Path, part: str) -> Tensor:
    """``(N,)`` gold rewards of a part, in the order of its rows."""
    return load_file(folder / "gold" / "rewards.safetensors")[part]
