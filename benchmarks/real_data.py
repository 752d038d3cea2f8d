"""Train standard and InfoRM reward models on real preference pairs with a real small Llama, and tabulate accuracy.

    python benchmarks/real_data.py --shared DIR --output runs/real-data

Two runs at a time, one thread each. Started again, it goes on where it was stopped. Writes ``table.md`` and
``table.json`` into the output folder; ``docs/results/real-data.md`` shows and discusses them.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from two_at_a_time import run_all

SEEDS = (0, 1, 2)
ARCHITECTURES = ("standard", "inform")
BACKBONE = "models/smollm2-135m-first6-v16k"
TEMPLATE = Path(__file__).parent / "chatml.jinja"
# Pairs drawn once (seed 0) from each training file, and from each test file. Sized for 90 minutes on two cores.
TRAIN_PAIRS = {"prompt-swap": 1800, "truthfulqa": 1455, "ukp-convarg1": 150, "hh-rlhf": 60}
TEST_PAIRS = {
    "prompt-swap": 300, "truthfulqa": 200, "ukp-convarg1": 100, "hh-rlhf": 60, "llmbar": 60, "xstest": 50,
    "hhh-alignment": 40, "humanevalpack": 30, "chat-human-judgments": 20, "judgebench": 8,
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "learning_rate": 3e-4, "num_train_epochs": 1, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1,
    "max_length": 512, "overlong": "truncate_prompt", "group_by_length": True, "use_cpu": True, "save_steps": 0.5,
    "beta": 0.01,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder of real data/ and models/")
    parser.add_argument("--output", type=Path, default=Path("runs/real-data"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: 0 1 2")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # one run of the table, in a process of its own
    arguments = parser.parse_args()
    if arguments.one is not None:
        one_run(arguments.shared, arguments.output, arguments.one)
        return
    start = time.monotonic()
    write_training_pairs(arguments.shared, arguments.output)
    runs = [f"{architecture}-{seed}" for seed in arguments.seeds for architecture in ARCHITECTURES]
    runs += ["probe-0", "untrained-0"]

    command = [__file__, "--shared", str(arguments.shared), "--output", str(arguments.output)]
    run_all(command, runs, arguments.output / "logs")
    write_table(arguments.shared, arguments.output, runs, minutes=(time.monotonic() - start) / 60)


def write_training_pairs(shared: Path, output: Path) -> None:
    """The seeded subset of each training file, as files that the training reads."""
    from inform_rm.data.preferences import load_preferences
    from inform_rm.util.files import atomic_write_text

    for name, count in TRAIN_PAIRS.items():
        pairs = (
            load_preferences(shared / "data" / name / "train.jsonl.gz").dataset.shuffle(seed=0).select(range(count))
        )
        kept = ("prompt", "chosen", "rejected", "subset", "id")
        rows = [json.dumps({key: pair[key] for key in kept}) + "\n" for pair in pairs]
        atomic_write_text(output / "data" / f"{name}.jsonl", "".join(rows))


def one_run(shared: Path, output: Path, run: str) -> None:
    """Train one model (unless untrained) and evaluate it on every test set."""
    from transformers import set_seed

    from inform_rm import InfoRMForSequenceClassification, evaluate, train
    from inform_rm.data.tokenizer import load_tokenizer
    from inform_rm.scoring.scorer import RewardScorer
    from inform_rm.training.reward_arguments import arguments_from_mapping

    kind, seed = run.split("-")
    folder = output / run
    missing = [name for name in TEST_PAIRS if not (folder / "eval" / name / "result.json").exists()]
    if not missing:
        return
    if kind not in ARCHITECTURES:
        set_seed(int(seed))
        model = InfoRMForSequenceClassification.from_backbone(
            shared / BACKBONE, architecture="standard", dtype="float32"
        )
        scorer = RewardScorer(model.eval(), load_tokenizer(shared / BACKBONE, chat_template=str(TEMPLATE)))
        if kind == "probe":
            fit_probe(scorer, [output / "data" / f"{name}.jsonl" for name in TRAIN_PAIRS])
    else:
        if not (folder / "train_result.json").exists():
            settings = {
                **SETTINGS,
                "model": str(shared / BACKBONE),
                "data": [str(output / "data" / f"{name}.jsonl") for name in TRAIN_PAIRS],
                "output": str(folder),
                "chat_template": str(TEMPLATE),
                "architecture": kind,
                "seed": int(seed),
            }
            train(arguments_from_mapping(settings, "real_data.py"))
        scorer = RewardScorer(folder)
    for name in missing:
        test = shared / "data" / name / "test.jsonl.gz"
        evaluate(scorer, test, folder / "eval" / name, max_pairs=TEST_PAIRS[name], on_bad_row="skip", progress=False)


def fit_probe(scorer: Any, files: list[Path]) -> None:
    """Give a frozen backbone the linear head that logistic regression finds on differences of its hidden states.

    The strength of the L2 penalty is chosen by 5-fold cross-validation on the same training pairs.
    """
    import numpy as np
    import torch
    from datasets import concatenate_datasets
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.model_selection import KFold

    from inform_rm.data.encoding import encode_pairs
    from inform_rm.data.preferences import load_preferences

    pairs = concatenate_datasets([load_preferences(file).dataset for file in files]).shuffle(seed=0)
    limits = {name: SETTINGS[name] for name in ("max_length", "overlong")}
    encoded = encode_pairs(pairs, scorer.tokenizer, **limits).dataset
    sequences = list(encoded["chosen_input_ids"]) + list(encoded["rejected_input_ids"])
    batches: list[torch.Tensor] = []
    hook = scorer.model.score.register_forward_pre_hook(lambda _, inputs: batches.append(inputs[0]))
    features = torch.empty(len(sequences), scorer.model.score.in_features)
    for rows, _, _ in scorer.iter_scores(sequences):
        features[rows] = batches.pop()
    hook.remove()
    chosen, rejected = features.double().numpy().reshape(2, len(encoded), -1)
    # Each pair enters both ways round, side by side, so that the folds keep them together and no intercept is needed.
    differences = np.stack([chosen - rejected, rejected - chosen], axis=1).reshape(2 * len(encoded), -1)
    labels = np.tile([1, 0], len(encoded))
    probe = LogisticRegressionCV(Cs=np.logspace(-4, 1, 6), cv=KFold(5), fit_intercept=False, max_iter=2000)
    probe.fit(differences, labels)
    print(f"probe: C {probe.C_}, accuracy in cross-validation by C {probe.scores_[1].mean(axis=0)}")
    with torch.no_grad():
        scorer.model.score.weight.copy_(torch.from_numpy(probe.coef_))


def write_table(shared: Path, output: Path, runs: list[str], minutes: float) -> None:
    """Accuracy per test set: mean and range over seeds, and the interval of all seeds' pairs taken as one test."""
    from inform_rm.data.preferences import load_preferences
    from inform_rm.util.files import atomic_write_text, versions, write_json
    from inform_rm.util.intervals import wilson_interval

    results: dict[str, dict[str, Any]] = {
        run: {name: json.loads((output / run / "eval" / name / "result.json").read_text()) for name in TEST_PAIRS}
        for run in runs
    }
    table, lines = {}, ["| test set | n | longer wins | untrained | probe | standard | inform |", "|" + "---|" * 7]
    for name in TEST_PAIRS:
        n = results[runs[0]][name]["num_pairs"]
        evaluated = {json.loads(line)["id"] for line in (output / runs[0] / "eval" / name / "pairs.jsonl").open()}
        test = load_preferences(shared / "data" / name / "test.jsonl.gz", on_bad_row="skip").dataset
        lengths = [len(pair["chosen"]) - len(pair["rejected"]) for pair in test if pair["id"] in evaluated]
        row: dict[str, Any] = {
            "n": n, "longer_wins": sum((d > 0) + 0.5 * (d == 0) for d in lengths) / len(lengths)
        }  # fmt: skip
        cells = [name, str(n), f"{row['longer_wins']:.3f}"]
        for kind in ("untrained", "probe", *ARCHITECTURES):
            values = [results[run][name]["accuracy"] for run in runs if run.startswith(kind)]
            mean = math.fsum(values) / len(values)
            low, high = wilson_interval(round(mean * n * 2) / 2, n)
            row[kind] = {"accuracies": values, "mean": mean, "interval": [low, high]}
            seeds = f" (seeds {', '.join(f'{value:.3f}' for value in values)})" if len(values) > 1 else ""
            cells.append(f"{mean:.3f} [{low:.3f}, {high:.3f}]{seeds}")
        table[name] = row
        lines.append("| " + " | ".join(cells) + " |")
    write_json(output / "table.json", {"table": table, "settings": SETTINGS, "train_pairs": TRAIN_PAIRS,
                                       "minutes": minutes, "versions": versions()})  # fmt: skip
    note = f"This call took {minutes:.0f} minutes. 95 % Wilson intervals of the seeds' mean on n."
    text = "\n".join(lines) + f"\n\n{note}\n"
    atomic_write_text(output / "table.md", text)
    print(text)


if __name__ == "__main__":
    main()
