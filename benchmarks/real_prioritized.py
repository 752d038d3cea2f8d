"""Bradley-Terry, RRM and prioritized training on real pairs, over seeds, at equal updates and equal compute.

    python benchmarks/real_prioritized.py --shared DIR --output runs/real-prioritized

Trained on a mix: of most pairs (ukp-convarg1, debates) the response alone decides, and the longer one wins three of
four times; of the others (prompt-swap) only the prompt decides, as the same two replies come under two prompts with
opposite preference. One subset of prompt-swap is left out of training. A seed draws training pairs, test pairs, the
head and the order of the data.

`PLAN` says how long each method trains. CPU time counts, of one thread: other work on the machine does not. Started
again, the program goes on after the last finished run. Writes ``runs.jsonl``, a line for each run, and ``table.md``
into the output folder; ``docs/results/real-data.md`` shows and discusses it.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from equal_compute import Plan, accuracies, append_run, audits, by_method, differences, read_runs, watch
from real_data import BACKBONE, TEMPLATE

SEEDS = (0, 1, 2)
PLAN = Plan(updates=120, budget=180, costs={"bt": 1.0, "smallest": 1.5, "rrm": 1.0})
METHODS: dict[str, dict[str, Any]] = {
    "bt": {},
    "smallest": {"objective": "prioritized"},
    "rrm": {"augmentation": "rrm"},
}
SEEN = ("swap-piqa", "swap-gsm8k", "swap-hh-helpful")  # subsets of prompt-swap that are trained on
UNSEEN = ("swap-truthfulqa",)
TRAIN_PAIRS = {"debates": 1800, "swap": 1200}
TEST_PAIRS = {"swap": 200, "swap, unseen": 100, "debates, longer wins": 80, "debates, shorter wins": 80}
AUDITED_PAIRS = {"swap": 40, "debates, longer wins": 40}
SETTINGS: dict[str, Any] = {
    "architecture": "standard", "learning_rate": 3e-4, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10,
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_length": 128, "overlong": "drop",
    "logging_steps": 20, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip
Rows = list[dict[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder of real data/ and models/")
    parser.add_argument("--output", type=Path, default=Path("runs/real-prioritized"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: 0 1 2")
    parser.add_argument("--methods", nargs="+", default=tuple(METHODS), choices=METHODS, help="default: all")
    arguments = parser.parse_args()
    path = arguments.output / "runs.jsonl"
    for seed in arguments.seeds:
        for method in arguments.methods:
            if (seed, method) not in {(run["seed"], run["method"]) for run in read_runs(path)}:
                append_run(path, one_run(arguments.shared, arguments.output, seed, method))
    write_table(path)


def one_run(shared: Path, output: Path, seed: int, method: str) -> dict[str, Any]:
    """Train one model; accuracies on the way, its audit at the end."""
    from inform_rm import RewardTrainer, RewardTrainingArguments, decompose, evaluate
    from inform_rm.scoring.scorer import RewardScorer

    def measure() -> dict[str, Any]:
        found = {name: evaluate(scorer, rows, progress=False) for name, rows in tests.items()}
        subsets = {name: part["accuracy"] for name, part in (found["swap"].subsets or {}).items()}
        return {name: result.accuracy for name, result in found.items()} | {"subsets": subsets}

    pairs, tests = draw_pairs(shared, seed)
    run_folder = output / f"run-{seed}-{method}"
    at = PLAN.marks_of(method).values()
    args = RewardTrainingArguments(
        str(run_folder), model=str(shared / BACKBONE), chat_template=str(TEMPLATE), max_steps=max(at), seed=seed,
        overwrite=True, **SETTINGS | METHODS[method],
    )  # fmt: skip
    marks: list[dict[str, Any]] = []
    callbacks = [watch(at, measure, marks, f"{seed} {method}")]
    trainer = RewardTrainer(args=args, train_dataset=pairs, callbacks=callbacks)
    scorer = RewardScorer(trainer.model, trainer.processing_class)
    trainer.train()
    audit = {}
    for name, count in AUDITED_PAIRS.items():
        result = decompose(scorer, tests[name][:count], num_prompts=4, progress=False, seed=seed)
        audit[f"{name}: response decides"] = result.response_decides
        audit[f"{name}: prompt sensitivity"] = result.prompt_sensitivity
        audit[f"{name}: D2 ~ length"] = result.correlations["characters"]["prompt_free_gap"]
    shutil.rmtree(run_folder)
    log = [line for line in trainer.state.log_history if "loss" in line]
    return {"seed": seed, "method": method, "marks": marks, "audit": audit, "log": log}


def draw_pairs(shared: Path, seed: int) -> tuple[Rows, dict[str, Rows]]:
    """Training pairs, and test pairs by the name of the test."""
    generator = np.random.default_rng(seed)
    debates, swap = (pairs_that_fit(shared, name, "train") for name in ("ukp-convarg1", "prompt-swap"))
    seen = [pair for pair in swap if pair["subset"] in SEEN]
    train = drawn(debates, TRAIN_PAIRS["debates"], generator) + drawn_twins(seen, TRAIN_PAIRS["swap"], generator)
    debates, swap = (pairs_that_fit(shared, name, "test") for name in ("ukp-convarg1", "prompt-swap"))
    tests: dict[str, Rows] = {}
    for name, subsets in (("swap", SEEN), ("swap, unseen", UNSEEN)):
        tests[name] = drawn_twins([pair for pair in swap if pair["subset"] in subsets], TEST_PAIRS[name], generator)
    for name, sign in (("debates, longer wins", 1), ("debates, shorter wins", -1)):
        own = [pair for pair in debates if sign * (len(pair["chosen"]) - len(pair["rejected"])) > 0]
        tests[name] = drawn(own, TEST_PAIRS[name], generator)
    return train, tests


def pairs_that_fit(shared: Path, name: str, split: str) -> Rows:
    """The pairs of a file within the ``max_length`` of training."""
    from inform_rm.data.encoding import encode_pairs
    from inform_rm.data.preferences import load_preferences
    from inform_rm.data.tokenizer import load_tokenizer

    pairs = load_preferences(shared / "data" / name / f"{split}.jsonl.gz").dataset
    tokenizer = load_tokenizer(shared / BACKBONE, chat_template=str(TEMPLATE))
    limits = {key: SETTINGS[key] for key in ("max_length", "overlong")}
    encoded = encode_pairs(pairs, tokenizer, **limits, keep_text=True).dataset
    return encoded.select_columns(["prompt", "chosen", "rejected", "subset", "id"]).to_list()


def drawn(rows: Rows, count: int, generator: np.random.Generator) -> Rows:
    return [rows[place] for place in generator.choice(len(rows), count, replace=False)]


def drawn_twins(rows: Rows, count: int, generator: np.random.Generator) -> Rows:
    """Both pairs of ``count / 2`` twins, so that a reward that ignores the prompt ranks exactly half of them right."""
    twins: dict[str, Rows] = {}
    for pair in rows:
        twins.setdefault(pair["id"].rpartition("/")[0], []).append(pair)
    whole = [both for both in twins.values() if len(both) == 2]
    return [pair for place in generator.choice(len(whole), count // 2, replace=False) for pair in whole[place]]


def write_table(path: Path) -> None:
    """Tables over seeds, beside the runs."""
    runs = by_method(read_runs(path), tuple(METHODS))
    tests = tuple(TEST_PAIRS)
    names = tuple(runs["bt"][0]["audit"])
    text = "\n\n".join([accuracies(runs, PLAN, tests), differences(runs, PLAN, tests), audits(runs, names)]) + "\n"
    (path.parent / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
