"""Bradley-Terry, RRM and prioritized training on real pairs with a real small Llama: accuracy and audits.

    python benchmarks/real_prioritized.py --shared DIR --output runs/real-prioritized

Two training sets: ``debates`` (ukp-convarg1, whose longer argument wins more often) and ``swap`` (prompt-swap mixed
into hh-rlhf). Two runs at a time, one thread each. Started again, it goes on where it was stopped. Writes ``table.md``
and ``table.json`` into the output folder; ``docs/results/real-data.md`` shows and discusses them.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from over_seeds import mean_and_interval
from real_data import BACKBONE, TEMPLATE
from two_at_a_time import run_all

SEEDS = (0, 1, 2)
UPDATES, COMPUTE_FACTOR = 40, 3
# Pairs drawn once (seed 0) from each training file and each test file.
TRAINING_SETS = {"debates": {"ukp-convarg1": 1500}, "swap": {"prompt-swap": 1000, "hh-rlhf": 500}}
TEST_PAIRS = {"prompt-swap": 150, "ukp-convarg1": 80, "llmbar": 50, "xstest": 50}
AUDITED_PAIRS = {"ukp-convarg1": 40, "prompt-swap": 40}
PRIORITIZED = {"objective": "prioritized", "num_prompts": 4}
METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "bt": ({"architecture": "standard"}, COMPUTE_FACTOR),
    "rrm": ({"architecture": "standard", "augmentation": "rrm"}, 1),
    "prioritized": ({"architecture": "standard", **PRIORITIZED}, 1),
    "inform-prioritized": ({"architecture": "inform", **PRIORITIZED}, 1),
}
SETTINGS: dict[str, Any] = {
    "learning_rate": 3e-4, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5, "beta": 0.01,
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_length": 160, "overlong": "drop",
    "logging_steps": 10, "save_steps": UPDATES, "save_total_limit": None, "use_cpu": True,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder of real data/ and models/")
    parser.add_argument("--output", type=Path, default=Path("runs/real-prioritized"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: 0 1 2")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # one run of the table, in a process of its own
    arguments = parser.parse_args()
    if arguments.one is not None:
        seed, name, method = arguments.one.split(":")
        one_run(arguments.shared, arguments.output, int(seed), name, method)
        return
    start = time.monotonic()
    command = [__file__, "--shared", str(arguments.shared), "--output", str(arguments.output)]
    runs = [f"{seed}:{name}:{method}" for seed in arguments.seeds for name in TRAINING_SETS for method in METHODS]
    run_all(command, runs, arguments.output / "logs")
    write_table(arguments.output, arguments.seeds, minutes=(time.monotonic() - start) / 60)


def one_run(shared: Path, output: Path, seed: int, name: str, method: str) -> None:
    """Train one model; accuracy after UPDATES and at the end, audits of the model after UPDATES."""
    from inform_rm import decompose, evaluate, train
    from inform_rm.data.preferences import load_preferences
    from inform_rm.scoring.scorer import RewardScorer
    from inform_rm.training.reward_arguments import arguments_from_mapping
    from inform_rm.util.files import atomic_write_text, write_json

    run = output / str(seed) / name / method
    if (run / "measured.json").exists():
        return
    data = []
    for source, count in TRAINING_SETS[name].items():
        pairs = (
            load_preferences(shared / "data" / source / "train.jsonl.gz").dataset.shuffle(seed=0).select(range(count))
        )
        rows = [{key: pair[key] for key in ("prompt", "chosen", "rejected", "subset", "id")} for pair in pairs]
        data.append(run / "data" / f"{source}.jsonl")
        atomic_write_text(data[-1], "".join(json.dumps(row) + "\n" for row in rows))
    changes, times = METHODS[method]
    settings = {
        **SETTINGS, **changes, "model": str(shared / BACKBONE), "chat_template": str(TEMPLATE),
        "data": [str(path) for path in data], "max_steps": times * UPDATES, "seed": seed, "output": str(run),
        "overwrite": True,
    }  # fmt: skip
    trained = train(arguments_from_mapping(settings, "real_prioritized.py"))
    measured: dict[str, Any] = {
        "seconds": trained["train_runtime_seconds"],
        "train_pairs": trained["train_pairs"],
        "log": [line for line in trained["log_history"] if "loss" in line],
    }
    for updates in sorted({UPDATES, times * UPDATES}):
        scorer = RewardScorer(run / "checkpoints" / f"checkpoint-{updates}")
        measured[str(updates)] = {}
        for test, count in TEST_PAIRS.items():
            path = shared / "data" / test / "test.jsonl.gz"
            result = evaluate(scorer, path, max_pairs=count, on_bad_row="skip", progress=False)
            measured[str(updates)][test] = {"accuracy": result.accuracy, "num_pairs": result.num_pairs}
    scorer = RewardScorer(run / "checkpoints" / f"checkpoint-{UPDATES}")
    for test, count in AUDITED_PAIRS.items():
        folder = run / f"audit-{test}"
        shutil.rmtree(folder, ignore_errors=True)
        path = shared / "data" / test / "test.jsonl.gz"
        audit = decompose(scorer, path, folder, num_prompts=6, max_pairs=count, progress=False)
        measured[f"audit {test}"] = {
            "response_decides": audit.response_decides,
            "prompt_sensitivity": audit.prompt_sensitivity,
            "D2 ~ length": audit.correlations["characters"]["prompt_free_gap"],
        }
    shutil.rmtree(run / "checkpoints")
    (run / "model.safetensors").unlink()
    write_json(run / "measured.json", measured)


def write_table(output: Path, seeds: list[int], minutes: float) -> None:
    """Accuracy per test set and audits, means over seeds with every seed's value."""
    from inform_rm.util.files import atomic_write_text, versions, write_json

    audits = [f"audit {test}" for test in AUDITED_PAIRS]
    lines = ["| trained on | method | updates | time | " + " | ".join(TEST_PAIRS) + " |"]
    lines.append("|" + "---|" * (4 + len(TEST_PAIRS)))
    audit_lines = ["| trained on | method | audited on | response decides | prompt sensitivity | D2 ~ length |"]
    audit_lines.append("|" + "---|" * 6)
    table = []
    for name in TRAINING_SETS:
        folders = {method: [output / str(seed) / name / method for seed in seeds] for method in METHODS}
        measured = {
            method: [json.loads((folder / "measured.json").read_text()) for folder in paths]
            for method, paths in folders.items()
        }
        for method, runs in measured.items():
            times = METHODS[method][1]
            for updates in sorted({UPDATES, times * UPDATES}):
                time_ratio, _, _ = mean_and_interval([
                    run["seconds"] / times / (bt["seconds"] / METHODS["bt"][1]) * updates / UPDATES
                    for run, bt in zip(runs, measured["bt"], strict=True)
                ])  # fmt: skip
                values = {test: [run[str(updates)][test]["accuracy"] for run in runs] for test in TEST_PAIRS}
                table.append({"trained_on": name, "method": method, "updates": updates, "time": time_ratio, **values})
                cells = [name, method, str(updates), f"{time_ratio:.1f}", *map(_cell, values.values())]
                lines.append("| " + " | ".join(cells) + " |")
            for audit in audits:
                shares = {key: [run[audit][key] for run in runs] for key in runs[0][audit]}
                table.append({"trained_on": name, "method": method, "audit": audit, **shares})
                cells = [name, method, audit.removeprefix("audit "), *map(_cell, shares.values())]
                audit_lines.append("| " + " | ".join(cells) + " |")
    note = f"Mean over seeds (each seed). This call took {minutes:.0f} minutes."
    text = "\n".join([*lines, "", *audit_lines, "", note, ""])
    write_json(output / "table.json", {"table": table, "seeds": list(seeds), "settings": SETTINGS, "methods": METHODS,
                                       "training_sets": TRAINING_SETS, "minutes": minutes,
                                       "versions": versions()})  # fmt: skip
    atomic_write_text(output / "table.md", text)
    print(text)


def _cell(values: list[float]) -> str:
    return f"{sum(values) / len(values):.3f} ({', '.join(f'{value:.2f}' for value in values)})"


if __name__ == "__main__":
    main()
