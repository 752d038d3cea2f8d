"""Which way of using bfloat16 trains: the loss of four runs on the same batches, for docs/results/bfloat16.md.

    python benchmarks/bfloat16.py --model DIR/models/smollm2-135m-first6-v16k --data DIR/data/blimp \
        --output runs/bfloat16

Float32; float32 weights under autocast; bfloat16 weights with torch's AdamW; bfloat16 weights with ``stable_adamw``,
which needs the extra ``bf16``. All start from the same weights and head and see the same pairs in the same order. Then
each model is tested in float32, as saved and with the backbone's weights rounded to bfloat16. Writes ``table.md``
and ``table.json``; finished runs are not repeated. Half an hour and more on one core without bfloat16 instructions,
nearly all of it for the last three runs.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from inform_rm import InfoRMForSequenceClassification, train
from inform_rm.data.preferences import load_preferences
from inform_rm.data.tokenizer import load_tokenizer
from inform_rm.scoring.reward_models import load_reward_model
from inform_rm.scoring.scorer import RewardScorer
from inform_rm.training.reward_arguments import arguments_from_mapping
from inform_rm.util.files import atomic_write_text, write_json

RUNS: dict[str, dict[str, Any]] = {
    "dtype: float32": {},
    "dtype: float32, bf16: true": {"bf16": True},
    "dtype: bfloat16": {"dtype": "bfloat16"},
    "dtype: bfloat16, optim: stable_adamw": {"dtype": "bfloat16", "optim": "stable_adamw"},
}
# One pass over the 200 pairs of one of blimp's paradigms, at the default learning rate of 5e-6.
SETTINGS: dict[str, Any] = {
    "architecture": "standard", "chat_template": "plain", "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1, "max_steps": 50, "logging_steps": 1, "save_steps": 50, "use_cpu": True,
}  # fmt: skip
SUBSET = "blimp-sentential_negation_npi_licensor_present"
SMOOTHED = 10  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="backbone")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl.gz and test.jsonl.gz")
    parser.add_argument("--subset", default=SUBSET, help=f"the pairs to use (default: {SUBSET})")
    parser.add_argument("--output", type=Path, default=Path("runs/bfloat16"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for part in ("train", "test"):
        write_subset(arguments.data / f"{part}.jsonl.gz", arguments.subset, arguments.output / f"{part}.jsonl")
    rows = [one_run(arguments, name) for name in RUNS]
    write_json(arguments.output / "table.json", rows)
    atomic_write_text(arguments.output / "table.md", table(rows))
    print(table(rows))


def write_subset(source: Path, subset: str, path: Path) -> None:
    pairs = load_preferences(source).dataset
    kept = [pair for pair in pairs if pair["subset"] == subset]
    names = ("prompt", "chosen", "rejected")
    atomic_write_text(path, "".join(json.dumps({name: pair[name] for name in names}) + "\n" for pair in kept))


def one_run(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Train unless that is done, and say what came of it."""
    folder = arguments.output / "".join(letter if letter.isalnum() else "-" for letter in name)
    settings = {**SETTINGS, **RUNS[name], "model": str(arguments.model), "data": str(arguments.output / "train.jsonl")}
    if not (folder / "train_result.json").exists():
        train(arguments_from_mapping({**settings, "output": str(folder)}, "bfloat16.py"))
    result = json.loads((folder / "train_result.json").read_text())
    model = load_reward_model(folder, dtype="float32", device="cpu")
    as_saved = tested(model, arguments.output)
    with torch.no_grad():
        for weight in model.model.parameters():
            weight.copy_(weight.bfloat16())
    return {
        "run": name,
        "loss": [line["loss"] for line in result["log_history"] if "loss" in line],
        "as_saved": as_saved,
        "rounded": tested(model, arguments.output),
        "changed_weights": changed_share(arguments.model, folder),
        "seconds": result["train_runtime_seconds"],
        "versions": result["versions"],
    }


def tested(model: Any, folder: Path) -> dict[str, Any]:
    """Bradley-Terry loss on the pairs that were learnt from, accuracy on the others, computed in float32."""
    found = {}
    scorer = RewardScorer(model, load_tokenizer(folder / "dtype--float32"))
    for part in ("train", "test"):
        pairs = load_preferences(folder / f"{part}.jsonl").dataset
        gaps = scorer.score(pairs["prompt"], pairs["chosen"]) - scorer.score(pairs["prompt"], pairs["rejected"])
        found |= {
            f"{part}_loss": -torch.nn.functional.logsigmoid(gaps).mean().item(),
            f"{part}_accuracy": (gaps > 0).double().mean().item(),
            f"{part}_pairs": len(gaps),
        }
    return found


def changed_share(model: Path, folder: Path) -> float:
    """Share of the weights in the backbone's layers that training changed, as the folder holds them."""
    trained = load_reward_model(folder, dtype="auto", device="cpu")
    start = InfoRMForSequenceClassification.from_backbone(model, architecture="standard", dtype=trained.dtype)
    before, after = start.model.layers.state_dict(), trained.model.layers.state_dict()
    return sum(int((after[key] != before[key]).sum()) for key in after) / sum(
        value.numel() for value in after.values()
    )


def table(rows: list[dict[str, Any]]) -> str:
    first = rows[0]["as_saved"]
    lines = [
        f"| run | loss seen in training, last {SMOOTHED} steps | loss on the {first['train_pairs']} pairs | the same, "
        f"weights rounded to bfloat16 | accuracy on {first['test_pairs']} held-out pairs | the same, rounded | "
        "weights of the layers changed | seconds |",
        "|" + "---|" * 8,
    ]
    for row in rows:
        seen = sum(row["loss"][-SMOOTHED:]) / SMOOTHED
        saved, rounded = row["as_saved"], row["rounded"]
        lines.append(
            f"| `{row['run']}` | {seen:.3f} | {saved['train_loss']:.3f} | {rounded['train_loss']:.3f} | "
            f"{saved['test_accuracy']:.3f} | {rounded['test_accuracy']:.3f} | {100 * row['changed_weights']:.1f} % | "
            f"{row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
