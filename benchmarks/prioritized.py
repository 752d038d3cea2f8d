"""Bradley-Terry, RRM and prioritized training on the generated world, over seeds, at equal updates and equal compute.

    python benchmarks/prioritized.py --output runs/prioritized

All reward models start from one small language model that was trained on right responses of the world of `START_SEED`.
Every seed is a world of its own: in 90 % of its training pairs the right response is the longer one, and no label is
wrong, so that an accuracy reads as a share of what can be learnt. The costs of `PLAN`, which says how long each method
trains, were measured on the world of `START_SEED`. CPU time counts, of one thread: other work on the machine does not.
Started again, the program goes on after the last finished run. Writes ``runs.jsonl``, a line for each run;
``benchmarks/prioritized_report.py`` makes the tables of it.
"""

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from equal_compute import Plan, append_run, read_runs, watch

SEEDS = (0, 1, 2)
START_SEED, LANGUAGE_MODEL_STEPS = 100, 800
PAIRS_PER_UPDATE = 16
TRAIN_PAIRS, AUDITED_PAIRS = 9600, 150
TEST_PAIRS = {"in_distribution": 200, "bias_reversed": 300, "adversarial_prompt": 400, "unseen_family": 300}
WORLD: dict[str, Any] = {"style_bias": 0.8, "adversarial_share": 0.0}
# Best of n: so many responses to each of so many prompts, the same for all models of a seed.
POLICY_PROMPTS, POLICY_RESPONSES = 64, 64
WARM_UP = {"warmup_fraction": 0.05}
METHODS: dict[str, dict[str, Any]] = {
    "bt": {},
    "smallest": {"objective": "prioritized", **WARM_UP},
    "rrm": {"augmentation": "rrm"},
    "smallest-3": {"objective": "prioritized", "num_prompts": 3, **WARM_UP},
}
PLAN = Plan(updates=300, budget=500, costs={"bt": 1.0, "rrm": 1.0, "smallest": 5 / 3, "smallest-3": 8 / 3})
SETTINGS: dict[str, Any] = {
    "architecture": "standard", "learning_rate": 3e-4, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 15,
    "per_device_train_batch_size": PAIRS_PER_UPDATE, "gradient_accumulation_steps": 1, "logging_steps": 50,
    "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/prioritized"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: 0 1 2")
    parser.add_argument("--methods", nargs="+", default=tuple(METHODS), choices=METHODS, help="default: all")
    parser.add_argument("--label-noise", type=float, default=0.0, help="share of flipped training labels; default: 0")
    arguments = parser.parse_args()
    output: Path = arguments.output
    train_language_model(output, START_SEED)
    path = output / "runs.jsonl"
    for seed in arguments.seeds:
        pairs: dict[bool, Any] = {}
        for method in arguments.methods:
            done = {(run["seed"], run["method"], run["label_noise"]) for run in read_runs(path)}
            if (seed, method, arguments.label_noise) in done:
                continue
            is_rrm = "augmentation" in METHODS[method]  # which makes pairs of texts
            if is_rrm not in pairs:
                pairs[is_rrm] = train_pairs(output, seed, arguments.label_noise, encoded=not is_rrm)
            run = one_run(output, seed, method, pairs[is_rrm])
            append_run(path, run | {"label_noise": arguments.label_noise})


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


def train_pairs(output: Path, seed: int, label_noise: float, encoded: bool) -> Any:
    """The training pairs of a world."""
    from inform_rm.data.encoding import encode_pairs
    from inform_rm.data.preferences import load_preferences
    from inform_rm.data.tokenizer import load_tokenizer
    from inform_rm.world.worlds import WorldConfig, make_pairs

    rows = _columns(make_pairs(WorldConfig(seed=seed, **WORLD, label_noise=label_noise), "train", TRAIN_PAIRS))
    if not encoded:
        return rows
    tokenizer = load_tokenizer(output / "backbone")
    return encode_pairs(load_preferences(rows).dataset, tokenizer, max_length=None, keep_text=True).dataset


def one_run(output: Path, seed: int, method: str, pairs: Any) -> dict[str, Any]:
    """Train one model; accuracies on the way, its choices among the policy's responses, its audit."""
    import pyarrow.parquet as pq

    from inform_rm import RewardTrainer, RewardTrainingArguments, decompose, evaluate
    from inform_rm.scoring.scorer import RewardScorer
    from inform_rm.world.worlds import WorldConfig, make_pairs

    world = WorldConfig(seed=seed, **WORLD)
    tests = {split: _columns(make_pairs(world, split, size)) for split, size in TEST_PAIRS.items()}
    run_folder = output / f"run-{seed}-{method}"
    at = PLAN.marks_of(method).values()
    args = RewardTrainingArguments(
        str(run_folder), model=str(output / "backbone"), max_steps=max(at), seed=seed, overwrite=True,
        **SETTINGS | METHODS[method],
    )  # fmt: skip
    marks: list[dict[str, Any]] = []

    def measure() -> dict[str, Any]:
        return {name: evaluate(scorer, rows, progress=False).accuracy for name, rows in tests.items()}

    trainer = RewardTrainer(args=args, train_dataset=pairs, callbacks=[watch(at, measure, marks, f"{seed} {method}")])
    scorer = RewardScorer(trainer.model, trainer.processing_class)
    trainer.train()
    unbiased = WorldConfig(seed=seed, style_bias=0.0, adversarial_share=0.0)
    audited = _columns(make_pairs(unbiased, "in_distribution", AUDITED_PAIRS))
    audit = decompose(scorer, audited, run_folder / "audit", num_prompts=8, progress=False, seed=seed)
    columns = ("prompt_free_gap", "prompt_related_gap", "words_difference")
    table = pq.read_table(run_folder / "audit" / "pairs.parquet").to_pydict()
    shutil.rmtree(run_folder)
    shares = {name: getattr(audit, name) for name in ("accuracy", "response_decides", "prompt_sensitivity")}
    return {
        "seed": seed, "method": method, "marks": marks, "audit": shares,
        "gaps": {name: [round(value, 3) for value in table[name]] for name in columns},
        "policy": policy_rewards(scorer, seed),
        "log": [line for line in trainer.state.log_history if "loss" in line],
    }  # fmt: skip


def policy_rewards(scorer: Any, seed: int) -> list[list[float]]:
    """Rewards of the responses of `policy_responses`, the same for every model of a seed."""
    prompts, responses, _ = policy_responses(seed)
    rewards = [scorer.score([prompt] * len(row), row) for prompt, row in zip(prompts, responses, strict=True)]
    return [[round(value, 5) for value in row.tolist()] for row in rewards]


def policy_responses(seed: int) -> tuple[list[str], list[list[str]], np.ndarray]:
    """Prompts, the policy's responses to each, and their gold rewards ``(prompts, responses)``."""
    from inform_rm.world.policy import WorldGold, WorldPolicy, world_prompts

    prompts = world_prompts(POLICY_PROMPTS, seed)
    responses = [WorldPolicy().sample(prompt, POLICY_RESPONSES, seed) for prompt in prompts]
    gold = [WorldGold().score([prompt] * len(row), row) for prompt, row in zip(prompts, responses, strict=True)]
    return prompts, responses, np.array(gold)


def _columns(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{name: row[name] for name in ("prompt", "chosen", "rejected", "id")} for row in rows]


if __name__ == "__main__":
    main()
