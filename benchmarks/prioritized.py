"""Bradley-Terry, RRM, InfoRM and prioritized training on the generated world, over seeds: who heeds the prompt?

    python benchmarks/prioritized.py --output runs/prioritized

Every seed is a world of its own, with a small language model trained on it from which all reward models start. Two
training sets: ``length`` (the right response is the longer one in 90 % of the pairs) and ``adversarial`` (80 %, and a
fifth of the pairs come as twins whose preference the prompt reverses). Two runs at a time, one thread each. Started
again, it goes on where it was stopped. Writes ``table.md``, ``table.json``, ``planes.png`` and the README's picture
``looks.png`` into the output folder; ``docs/results/prioritized.md`` shows and discusses them.
"""

import argparse
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

from two_at_a_time import run_all

SEEDS = (0, 1, 2, 3, 4)
UPDATES = 300
# An update of prioritized training takes about as long as three others; the table gives the measured ratio.
COMPUTE_FACTOR = 3
PAIRS_PER_UPDATE = 16
TRAIN_PAIRS, TEST_PAIRS, AUDITED_PAIRS = 9600, 1000, 400
LANGUAGE_MODEL_STEPS = 800
WORLDS: dict[str, dict[str, Any]] = {
    "length": {"style_bias": 0.8, "adversarial_share": 0.0},
    "adversarial": {"style_bias": 0.6, "adversarial_share": 0.2},
}
TEST_SETS = ("in_distribution", "bias_reversed", "adversarial_prompt", "unseen_family")
PRIORITIZED = {"objective": "prioritized", "num_prompts": 4}
# Settings, and how many times UPDATES a method is trained; what is longer is also looked at after UPDATES.
METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "bt": ({"architecture": "standard"}, COMPUTE_FACTOR),
    "rrm": ({"architecture": "standard", "augmentation": "rrm"}, COMPUTE_FACTOR),
    "inform": ({"architecture": "inform"}, COMPUTE_FACTOR),
    "prioritized": ({"architecture": "standard", **PRIORITIZED}, 1),
    "inform-prioritized": ({"architecture": "inform", **PRIORITIZED}, 1),
}
RUNS = [("length", method) for method in METHODS] + [("adversarial", "bt"), ("adversarial", "prioritized")]
SETTINGS: dict[str, Any] = {
    "learning_rate": 3e-4, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 30, "latent_dim": 32,
    "beta": 0.01, "per_device_train_batch_size": PAIRS_PER_UPDATE, "gradient_accumulation_steps": 1,
    "logging_steps": 50, "save_steps": UPDATES, "save_total_limit": None, "use_cpu": True,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/prioritized"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: 0 1 2 3 4")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # one run of the table, in a process of its own
    arguments = parser.parse_args()
    if arguments.one is not None:
        seed, name, method = arguments.one.split(":")
        if method == "start":
            write_start(arguments.output / seed, int(seed))
        else:
            one_run(arguments.output / seed, int(seed), name, method)
        return
    start = time.monotonic()
    command = [__file__, "--output", str(arguments.output)]
    run_all(command, [f"{seed}:world:start" for seed in arguments.seeds], arguments.output / "logs")
    runs = [f"{seed}:{name}:{method}" for seed in arguments.seeds for name, method in RUNS]
    run_all(command, runs, arguments.output / "logs")
    minutes = (time.monotonic() - start) / 60
    write_table(arguments.output, arguments.seeds, minutes)
    first = arguments.output / str(arguments.seeds[0])
    pairs = [(name, method) for method in ("bt", "prioritized") for name in WORLDS]
    titles = {(name, method): f"{method}, trained on {name}: {{:.0%}} ranked right" for name, method in pairs}
    write_planes(first, arguments.output / "planes.png", titles, columns=2)
    readme = {("length", "bt"): "ordinary training", ("length", "prioritized"): "prioritized training"}
    write_planes(first, arguments.output / "looks.png", readme, columns=2)


def write_start(folder: Path, seed: int) -> None:
    """The pairs of both training sets and of the test sets, and a language model trained on right responses."""
    from inform_rm.util.files import atomic_write_text
    from inform_rm.world.worlds import WorldConfig, make_pairs

    if (folder / "backbone").exists():
        return
    worlds = {name: WorldConfig(seed=seed, **changes) for name, changes in WORLDS.items()}
    sizes = {"train": TRAIN_PAIRS, **dict.fromkeys(TEST_SETS, TEST_PAIRS)}
    for name, world in worlds.items():
        for split, size in sizes.items():
            lines = [json.dumps(row) + "\n" for row in make_pairs(world, split, size)]
            atomic_write_text(folder / name / f"{split}.jsonl", "".join(lines))
    # Audited where length says nothing about what is right.
    unbiased = WorldConfig(seed=seed, style_bias=0.0, adversarial_share=0.0)
    lines = [json.dumps(row) + "\n" for row in make_pairs(unbiased, "in_distribution", AUDITED_PAIRS)]
    atomic_write_text(folder / "unbiased.jsonl", "".join(lines))

    train_language_model(folder, seed)


def train_language_model(folder: Path, seed: int) -> None:
    """``folder/backbone``: the world's small Llama, trained on right responses to prompts of the training families."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments

    from inform_rm.data.encoding import encode
    from inform_rm.data.tokenizer import load_tokenizer
    from inform_rm.world.backbone import write_backbone
    from inform_rm.world.worlds import WorldConfig, sample_prompts, sample_responses

    if (folder / "backbone").exists():
        return
    write_backbone(folder / "untrained", seed=seed)
    tokenizer = load_tokenizer(folder / "untrained")
    model = AutoModelForCausalLM.from_pretrained(folder / "untrained")
    prompts = sample_prompts(WorldConfig(seed=seed), LANGUAGE_MODEL_STEPS * PAIRS_PER_UPDATE, seed=1)
    texts = Dataset.from_list([
        {"input_ids": encode(tokenizer, prompt, sample_responses(prompt, 1, row, word_accuracy=1.0)[0]).input_ids}
        for row, prompt in enumerate(prompts)
    ])  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(folder / "language-model"), max_steps=LANGUAGE_MODEL_STEPS, learning_rate=1e-3,
        per_device_train_batch_size=PAIRS_PER_UPDATE, warmup_steps=50, logging_steps=100, save_strategy="no",
        report_to="none", use_cpu=True, seed=seed, dataloader_pin_memory=False,
    )  # fmt: skip
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    Trainer(model=model, args=arguments, train_dataset=texts, data_collator=collate).train()
    tokenizer.save_pretrained(folder / "unfinished")
    model.save_pretrained(folder / "unfinished")
    os.replace(folder / "unfinished", folder / "backbone")


def one_run(folder: Path, seed: int, name: str, method: str) -> None:
    """Train one model; accuracy after UPDATES and at the end, and the audit of the model after UPDATES."""
    from inform_rm import decompose, evaluate, train
    from inform_rm.scoring.scorer import RewardScorer
    from inform_rm.training.reward_arguments import arguments_from_mapping
    from inform_rm.util.files import write_json

    run = folder / name / method
    if (run / "measured.json").exists():
        return
    changes, times = METHODS[method]
    shutil.rmtree(run / "audit", ignore_errors=True)
    settings = {
        **SETTINGS, **changes, "model": str(folder / "backbone"), "data": [str(folder / name / "train.jsonl")],
        "max_steps": times * UPDATES, "seed": seed, "output": str(run), "overwrite": True,
    }  # fmt: skip
    trained = train(arguments_from_mapping(settings, "prioritized.py"))
    measured: dict[str, Any] = {
        "seconds": trained["train_runtime_seconds"],
        "log": [line for line in trained["log_history"] if "loss" in line],
    }
    for updates in range(UPDATES, times * UPDATES + 1, max(UPDATES, (times - 1) * UPDATES)):
        scorer = RewardScorer(run / "checkpoints" / f"checkpoint-{updates}")
        result = evaluate(scorer, [folder / name / f"{split}.jsonl" for split in TEST_SETS], progress=False)
        measured[str(updates)] = {split: part["accuracy"] for split, part in (result.subsets or {}).items()}
        if updates == UPDATES:
            audit = decompose(scorer, folder / "unbiased.jsonl", run / "audit", progress=False, seed=seed)
            measured["audit"] = {
                key: getattr(audit, key) for key in ("accuracy", "response_decides", "prompt_sensitivity")
            }
            measured["audit"] |= rank_correlations(folder / "unbiased.jsonl", run / "audit" / "pairs.parquet")
    shutil.rmtree(run / "checkpoints")
    write_json(run / "measured.json", measured)


def rank_correlations(pairs: Path, table: Path) -> dict[str, float]:
    """Spearman correlation of both gaps with the difference in length and with what is right, the gold r1 gap."""
    import pyarrow.parquet as pq
    from scipy.stats import spearmanr

    gold = {row["id"]: row for row in map(json.loads, pairs.read_text().splitlines())}
    columns = pq.read_table(table).to_pydict()
    right = [gold[name]["gold_r1_chosen"] - gold[name]["gold_r1_rejected"] for name in columns["id"]]
    length = columns["words_difference"]
    return {
        f"{gap} ~ {name}": float(spearmanr(columns[column], values).statistic)
        for gap, column in (("D2", "prompt_free_gap"), ("D1", "prompt_related_gap"))
        for name, values in (("length", length), ("right", right))
    }


def mean_and_interval(values: list[float]) -> tuple[float, float, float]:
    """Mean over seeds and its 95 % interval from Student's t."""
    from scipy.stats import t

    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    half = float(t.ppf(0.975, len(values) - 1)) * error
    return mean, mean - half, mean + half


def write_table(output: Path, seeds: list[int], minutes: float) -> None:
    """Accuracy at equal updates and at equal compute, differences to BT, and the audits."""
    from inform_rm.util.files import atomic_write_text, versions, write_json

    measured = {
        (name, method): [json.loads((output / str(seed) / name / method / "measured.json").read_text())
                         for seed in seeds]
        for name, method in RUNS
    }  # fmt: skip
    results: list[dict[str, Any]] = []
    lines = [
        "| trained on | method | updates | time | " + " | ".join(TEST_SETS) + " |",
        "|" + "---|" * (4 + len(TEST_SETS)),
    ]
    for (name, method), runs in measured.items():
        for updates in sorted(int(key) for key in runs[0] if key.isdigit()):
            accuracy = {split: [run[str(updates)][split] for run in runs] for split in TEST_SETS}
            plain = measured[name, "bt"]
            # Of the same length in time: what costs more per update is set against BT of more updates.
            same = str(METHODS["bt"][1] * UPDATES if METHODS[method][1] == 1 or updates > UPDATES else updates)
            ratio = [
                run["seconds"] / METHODS[method][1] / (bt["seconds"] / METHODS["bt"][1]) * updates / UPDATES
                for run, bt in zip(runs, plain, strict=True)
            ]
            row: dict[str, Any] = {
                "trained_on": name,
                "method": method,
                "updates": updates,
                "time": mean_and_interval(ratio),
            }
            cells = [name, method, str(updates), f"{row['time'][0]:.1f}"]
            for split in TEST_SETS:
                against = {
                    kind: [own - bt[key][split] for own, bt in zip(accuracy[split], plain, strict=True)]
                    for kind, key in (("equal_updates", str(updates)), ("equal_compute", same))
                }
                row[split] = {
                    "accuracies": accuracy[split], "mean": mean_and_interval(accuracy[split]),
                    **{f"minus_bt_{kind}": mean_and_interval(values) for kind, values in against.items()},
                }  # fmt: skip
                mean, low, high = row[split]["mean"]
                cells.append(f"{mean:.3f} [{low:.3f}, {high:.3f}]")
            results.append(row)
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| trained on | method, minus bt | at equal | " + " | ".join(TEST_SETS) + " |", "|" + "---|" * 7]
    for row in results:
        if row["method"] == "bt":
            continue
        for kind in ("updates", "compute") if METHODS[row["method"]][1] == 1 else ("updates",):
            cells = [row["trained_on"], f"{row['method']}, {row['updates']} updates", kind]
            for split in TEST_SETS:
                mean, low, high = row[split][f"minus_bt_equal_{kind}"]
                cells.append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
            lines.append("| " + " | ".join(cells) + " |")
    names = [key for key in next(iter(measured.values()))[0]["audit"]]
    lines += [
        "",
        f"| audit after {UPDATES} updates | method | " + " | ".join(names) + " |",
        "|" + "---|" * (2 + len(names)),
    ]
    audits = []
    for (name, method), runs in measured.items():
        audit = {key: mean_and_interval([run["audit"][key] for run in runs]) for key in names}
        audits.append({"trained_on": name, "method": method, **audit})
        cells = [f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in audit.values()]
        lines.append("| " + " | ".join([name, method, *cells]) + " |")
    note = f"{len(seeds)} seeds; means with 95 % intervals (Student's t). This call took {minutes:.0f} minutes."
    lines += ["", note, ""]
    settings = {"settings": SETTINGS, "worlds": WORLDS, "methods": METHODS, "train_pairs": TRAIN_PAIRS,
                "test_pairs": TEST_PAIRS, "audited_pairs": AUDITED_PAIRS}  # fmt: skip
    write_json(output / "table.json", {"accuracy": results, "audits": audits, "seeds": list(seeds), **settings,
                                       "minutes": minutes, "versions": versions()})  # fmt: skip
    atomic_write_text(output / "table.md", "\n".join(lines))
    print("\n".join(lines))


def write_planes(folder: Path, path: Path, runs: dict[tuple[str, str], str], columns: int) -> None:
    """D1 against D2 as in arXiv:2504.06020, Fig. 4: a panel for each training set and method, by its title."""
    import numpy as np
    import pyarrow.parquet as pq
    from matplotlib.figure import Figure

    from inform_rm.eval.decompose_report import draw_plane
    from inform_rm.util.files import atomic_write_bytes
    from inform_rm.util.page import figure_png

    rows = len(runs) // columns
    figure = Figure(figsize=(5.25 * columns, 4.75 * rows), layout="constrained")
    panels = figure.subplots(rows, columns)
    for axes, ((name, method), title) in zip(panels.flat, runs.items(), strict=True):
        table = pq.read_table(folder / name / method / "audit" / "pairs.parquet").to_pydict()
        free, related = np.array(table["prompt_free_gap"]), np.array(table["prompt_related_gap"])
        draw_plane(axes, 1.05 * max(np.abs(free).max(), np.abs(related).max()))
        points = axes.scatter(free, related, c=table["words_difference"], cmap="coolwarm", s=10, vmin=-30, vmax=30)
        axes.set_title(title.format(np.mean(free + related > 0)))
    shrink = 0.9 if rows == 1 else 0.5
    figure.colorbar(points, ax=figure.axes, label="words, chosen - rejected", shrink=shrink, extend="both")
    atomic_write_bytes(path, figure_png(figure))


if __name__ == "__main__":
    main()
