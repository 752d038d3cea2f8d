"""Train on rankings and on the pairs made of them, for the same number of tokens, and tabulate accuracy on test pairs.

    python benchmarks/rankings.py --shared DIR --output runs/rankings

Groups are rebuilt from pair files: rows with one prompt, whose comparisons must be those of one ranking with ties.
Two runs at a time, one thread each. Started again, it goes on where it was stopped. Writes ``table.md`` and
``table.json`` into the output folder, after each run what there is; ``docs/results/rankings.md`` shows and discusses
them.
"""

import argparse
import gzip
import json
import math
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

from two_at_a_time import run_all

SEEDS = (0, 1, 2)
BACKBONE = "models/stories260K"
DATA = ("qa-feedback", "oasst-sample")
# What is trained on -> how it is named in the table.
KINDS = {
    "pairs": "pairs in any order",
    "together": "the pairs of a prompt together",
    "all_pairs": "rankings, `all_pairs`",
    "plackett_luce": "rankings, `plackett_luce`",
}
# 17 minutes on two cores with other work beside it.
TOKENS, TOKENS_PER_STEP = 200_000, 5000
MOST_TOKENS = 512  # the backbone's limit; a group with a longer prompt and response is left out
SETTINGS: dict[str, Any] = {
    "latent_dim": 32, "beta": 0.01, "learning_rate": 1e-3, "max_steps": 1, "gradient_accumulation_steps": 1,
    "dtype": "float32", "use_cpu": True, "save_strategy": "no", "logging_steps": 5, "overlong": "error",
    "include_num_input_tokens_seen": True, "batching": "packed",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder of real data/ and models/")
    parser.add_argument("--output", type=Path, default=Path("runs/rankings"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: 0 1 2")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # one run of the table, in a process of its own
    arguments = parser.parse_args()
    if arguments.one is not None:
        one_run(arguments.shared, arguments.output, arguments.one)
        write_table(arguments.output)
        return
    start = time.monotonic()
    write_data(arguments.shared, arguments.output)
    runs = [f"{kind}-{seed}" for seed in arguments.seeds for kind in KINDS]
    command = [__file__, "--shared", str(arguments.shared), "--output", str(arguments.output)]
    run_all(command, runs, arguments.output / "logs")
    write_table(arguments.output)
    print(f"{(time.monotonic() - start) / 60:.1f} minutes\n{(arguments.output / 'table.md').read_text()}")


def groups_of(pairs: list[dict[str, str]], tokenizer: Any) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rankings that say exactly what all comparisons of their prompt say; counts of what was left out, and why."""
    from inform_rm.data.encoding import encode_many

    by_prompt: dict[str, list[dict[str, str]]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair["prompt"], []).append(pair)
    groups, counts = [], Counter[str]()
    for prompt, rows in by_prompt.items():
        wins = {(row["chosen"], row["rejected"]) for row in rows}
        texts = list(dict.fromkeys(text for row in rows for text in (row["chosen"], row["rejected"])))
        worse = {text: sum((text, other) in wins for other in texts) for text in texts}
        better = {text: sum((other, text) in wins for other in texts) for text in texts}
        # In a ranking with ties responses are compared unless they are tied, and the balance decides.
        balance = {text: worse[text] - better[text] for text in texts}
        if any((balance[one] > balance[other]) != ((one, other) in wins) for one in texts for other in texts):
            counts["inconsistent"] += 1
        elif max(len(each.input_ids) for each in encode_many(tokenizer, [prompt] * len(texts), texts)) > MOST_TOKENS:
            counts["too long"] += 1
        else:
            places = sorted(set(balance.values()), reverse=True)
            ranks = [1 + places.index(balance[text]) for text in texts]
            groups.append({"prompt": prompt, "responses": texts, "ranks": ranks})
            counts["used"] += 1
            counts["pairs"] += len(wins)
    return groups, counts


def write_data(shared: Path, output: Path) -> None:
    """Groups and their pairs, for training and for the test; of qa-feedback's prompts the question alone."""
    from inform_rm.data.tokenizer import load_tokenizer, with_plain_template
    from inform_rm.util.files import atomic_write_text, write_json

    tokenizer = with_plain_template(load_tokenizer(shared / BACKBONE), BACKBONE)
    counts = {}
    for part in ("train", "test"):
        groups: list[dict[str, Any]] = []
        for name in DATA:
            with gzip.open(shared / "data" / name / f"{part}.jsonl.gz", "rt", encoding="utf-8") as file:
                rows = [json.loads(line) for line in file]
            for row in rows:
                row["prompt"] = row["prompt"].partition("\n\nContext:")[0]
            found, counts[f"{name} {part}"] = groups_of(rows, tokenizer)
            groups += found
        random.Random(0).shuffle(groups)
        for kind, written in (("groups", groups), ("pairs", [pair for group in groups for pair in pairs_of(group)])):
            atomic_write_text(output / "data" / f"{part}-{kind}.jsonl", "".join(json.dumps(r) + "\n" for r in written))
    write_json(output / "data" / "counts.json", counts)


def pairs_of(group: dict[str, Any]) -> list[dict[str, str]]:
    """The comparisons of a group."""
    both = list(zip(group["responses"], group["ranks"], strict=True))
    return [
        {"prompt": group["prompt"], "chosen": text, "rejected": other}
        for text, rank in both
        for other, other_rank in both
        if rank < other_rank
    ]


def one_run(shared: Path, output: Path, run: str) -> None:
    """Train one model and evaluate it on all test pairs."""
    from inform_rm import RewardTrainer, evaluate
    from inform_rm.scoring.scorer import RewardScorer
    from inform_rm.training.reward_arguments import arguments_from_mapping
    from inform_rm.util.files import write_json

    kind, _, seed = run.rpartition("-")
    result = output / "results" / f"{run}.json"
    if result.exists():
        return
    data = output / "data"
    settings = {
        **SETTINGS, "model": str(shared / BACKBONE), "output_dir": str(output / run), "seed": int(seed),
        "data": str(data / ("train-groups.jsonl" if "_" in kind else "train-pairs.jsonl")),
        "overwrite": True,
    }  # fmt: skip
    if "_" in kind:
        settings["ranking_loss"] = kind
    if kind == "together":
        settings |= {"data": str(ordered(data / "train-groups.jsonl", int(seed), output / f"{run}.jsonl")),
                     "train_sampling_strategy": "sequential"}  # fmt: skip
    probe = RewardTrainer(args=arguments_from_mapping(settings, "rankings.py"))
    size, steps = rows_and_steps(probe)
    trainer = RewardTrainer(
        args=arguments_from_mapping(
            {**settings, "per_device_train_batch_size": size, "max_steps": steps}, "rankings.py"
        )
    )
    trainer.train()
    scorer = RewardScorer(trainer.model, trainer.processing_class)
    found = evaluate(scorer, data / "test-pairs.jsonl", progress=False, overlong="error")
    counts = trainer.train_pairs.counts
    write_json(result, {
        "accuracy": found.accuracy, "interval": found.accuracy_interval, "n": found.num_pairs,
        "longer_wins": found.longer_wins_accuracy, "tokens": int(trainer.state.num_input_tokens_seen),
        "seconds": trainer.train_seconds, "rows_per_step": size, "steps": steps,
        "comparisons": steps * size * counts["pairs"] / counts.get("rows", counts["pairs"]),
        "of_all": steps * size / counts.get("rows", counts["pairs"]),
    })  # fmt: skip


def rows_and_steps(trainer: Any) -> tuple[int, int]:
    """So many rows have `TOKENS_PER_STEP` tokens in a batch on average, and so many such batches `TOKENS`."""
    rows = trainer.train_dataset
    if trainer.args.train_sampling_strategy == "random":
        rows = rows.shuffle(seed=0)
    rows = list(rows.select(range(min(len(rows), 240))))
    tokens, size = 0.0, 0
    while tokens < TOKENS_PER_STEP:
        size += 1
        batches = [trainer.data_collator(rows[at : at + size]) for at in range(0, len(rows) - size + 1, size)]
        tokens = sum(batch["input_ids"].numel() for batch in batches) / len(batches)
    return size, round(TOKENS / tokens)


def ordered(groups: Path, seed: int, path: Path) -> Path:
    """The pairs of all groups, prompts in a random order."""
    rows = [json.loads(line) for line in groups.open(encoding="utf-8")]
    random.Random(seed).shuffle(rows)
    path.write_text("".join(json.dumps(pair) + "\n" for row in rows for pair in pairs_of(row)), encoding="utf-8")
    return path


def write_table(output: Path) -> None:
    """What there is of all runs: accuracy, tokens, seconds."""
    from inform_rm.util.files import atomic_write_text, versions, write_json
    from inform_rm.util.intervals import wilson_interval

    table, lines = {}, [
        "| trained on | accuracy on test pairs (seeds) | 95 % interval | tokens | seconds | rows a step | comparisons "
        "seen | passes over the data |", "|" + "---|" * 8,
    ]  # fmt: skip
    for kind, name in KINDS.items():
        runs = [json.loads(path.read_text()) for path in sorted((output / "results").glob(f"{kind}-*.json"))]
        if not runs:
            continue
        row = {key: [run[key] for run in runs] for key in runs[0]}
        mean = {key: math.fsum(row[key]) / len(runs) for key in row if key != "interval"}
        low, high = wilson_interval(mean["accuracy"] * mean["n"], int(mean["n"]))
        table[kind] = {**row, "mean": mean}
        seeds = ", ".join(f"{value:.3f}" for value in row["accuracy"])
        lines.append(
            f"| {name} | {mean['accuracy']:.3f} ({seeds}) | {low:.3f} to {high:.3f} | {mean['tokens']:,.0f} "
            f"| {mean['seconds']:.0f} | {mean['rows_per_step']:.0f} | {mean['comparisons']:,.0f} "
            f"| {mean['of_all']:.2f} |"
        )
    counts = json.loads((output / "data" / "counts.json").read_text())
    notes = [
        f"{name}: {', '.join(f'{text} {number}' for text, number in part.items())}." for name, part in counts.items()
    ]
    found = next(iter(table.values()))["mean"]
    notes.append(f"Test: {found['n']:.0f} pairs, of which the longer response wins {found['longer_wins']:.3f}.")
    write_json(output / "table.json", {"table": table, "settings": SETTINGS, "tokens": TOKENS, "counts": counts,
                                       "tokens_per_step": TOKENS_PER_STEP, "versions": versions()})  # fmt: skip
    atomic_write_text(output / "table.md", "\n".join([*lines, "", *notes]) + "\n")


if __name__ == "__main__":
    main()
