"""Policies trained with DPO on pairs that the reward models of `benchmarks/prioritized.py` labelled, judged by gold.

    python benchmarks/prioritized.py --output runs/prioritized
    python benchmarks/prioritized_dpo.py --runs runs/prioritized

Start: the world's small language model, trained on responses of the world's policy. Pairs: that policy's responses to
the prompts of `prioritized.policy_responses`, two and two, the better one by a model's reward first. Judged by the
world's exact gold reward on other prompts. Beside the reward models, gold itself labels pairs, which is the most that
labels can do. Goes on after the last finished run when it is started again. Writes ``dpo.jsonl``, a line for each
policy, and ``dpo.md`` beside the runs. ``--search`` tries learning rates with gold's labels on `START_SEED`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from over_seeds import mean_and_interval, table
from prioritized import METHODS, PAIRS_PER_UPDATE, POLICY_PROMPTS, START_SEED, policy_responses, train_language_model

WORD_ACCURACY = 0.6  # of the world's policy
JUDGED_PROMPTS, JUDGED_RESPONSES, NEW_TOKENS = 64, 8, 80
LEARNING_RATES, LEARNING_RATE, BETA = (1e-5, 3e-5, 1e-4), 3e-5, 0.1
START, GOLD = "start", "gold"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/prioritized"))
    parser.add_argument("--search", action="store_true", help="try learning rates on the seed of the start alone")
    arguments = parser.parse_args()
    folder: Path = arguments.runs
    train_language_model(folder, START_SEED, "policy", WORD_ACCURACY)
    if arguments.search:
        gold = policy_responses(START_SEED)[2]
        print(f"start: {judged(folder / 'policy', START_SEED).mean():.3f}", flush=True)
        for rate in LEARNING_RATES:
            found = trained_policy(folder, START_SEED, gold, rate)
            print(f"learning rate {rate:g}: gold {found.mean():.3f}", flush=True)
        return
    path = folder / "dpo.jsonl"
    runs = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    clean = [run for run in runs if run["method"] in METHODS and not run["label_noise"]]
    rewards = {(run["seed"], run["method"]): np.array(run["policy"]) for run in clean}
    for seed in sorted({seed for seed, _ in rewards}):
        rewards |= {(seed, GOLD): policy_responses(seed)[2], (seed, START): np.zeros(0)}
    for (seed, method), labels in sorted(rewards.items(), key=lambda item: item[0]):
        if (seed, method) in read(path):
            continue
        gold = judged(folder / "policy", seed) if method == START else trained_policy(folder, seed, labels)
        print(f"{seed} {method}: gold {gold.mean():.3f}", flush=True)
        with path.open("a") as file:
            file.write(json.dumps({"seed": seed, "method": method, "gold": gold.tolist()}) + "\n")
    text = report(read(path))
    (folder / "dpo.md").write_text(text)
    print(text)


def read(path: Path) -> dict[tuple[int, str], np.ndarray]:
    """(seed, method) -> gold ``(prompts, responses)``."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {(run["seed"], run["method"]): np.array(run["gold"]) for run in map(json.loads, lines)}


def relabelled(seed: int, rewards: np.ndarray) -> list[dict[str, Any]]:
    """Each two neighbouring responses to a prompt as a pair, the better one by ``(prompts, responses)`` rewards first.

    Ties are left out: gold has some, where the two responses do equally well.
    """
    prompts, responses, _ = policy_responses(seed)
    pairs = []
    for prompt, texts, own in zip(prompts, responses, rewards, strict=True):
        for first in range(0, len(texts) - 1, 2):
            better, worse = (first, first + 1) if own[first] > own[first + 1] else (first + 1, first)
            if own[better] > own[worse]:
                messages = {"prompt": prompt, "chosen": texts[better], "rejected": texts[worse]}
                role = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
                pairs.append({key: [{"role": role[key], "content": text}] for key, text in messages.items()})
    return pairs


def trained_policy(folder: Path, seed: int, rewards: np.ndarray, learning_rate: float = LEARNING_RATE) -> np.ndarray:
    """Gold of a policy that DPO made of the start with one pass over the `relabelled` pairs."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from inform_rm.data.tokenizer import load_tokenizer

    args = trl.DPOConfig(
        str(folder / "dpo"), num_train_epochs=1, learning_rate=learning_rate, beta=BETA, seed=seed,
        per_device_train_batch_size=PAIRS_PER_UPDATE, lr_scheduler_type="constant_with_warmup", warmup_steps=10,
        logging_steps=50, save_strategy="no", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "policy", dtype="float32"),
        args=args,
        train_dataset=Dataset.from_list(relabelled(seed, rewards)),
        processing_class=load_tokenizer(folder / "policy"),
    )
    trainer.train()
    return judged(trainer.model, seed, folder / "policy")


def judged(policy: Any, seed: int, tokenizer: Path | None = None) -> np.ndarray:
    """Gold ``(prompts, responses)`` of a policy's responses to prompts that no pair has."""
    from transformers import AutoModelForCausalLM

    from inform_rm.data.tokenizer import load_tokenizer
    from inform_rm.eval.best_of_n.policies import CausalLMPolicy
    from inform_rm.world.policy import WorldGold, world_prompts

    if isinstance(policy, Path):
        policy, tokenizer = AutoModelForCausalLM.from_pretrained(policy, dtype="float32"), policy
    writer = CausalLMPolicy(policy.eval(), load_tokenizer(tokenizer), max_new_tokens=NEW_TOKENS)
    prompts = world_prompts(POLICY_PROMPTS + JUDGED_PROMPTS, seed)[POLICY_PROMPTS:]
    responses = [writer.sample(prompt, JUDGED_RESPONSES, seed) for prompt in prompts]
    return np.array(
        [WorldGold().score([prompt] * len(row), row) for prompt, row in zip(prompts, responses, strict=True)]
    )


def win_rate(own: np.ndarray, other: np.ndarray) -> float:
    """How often a response of one policy has more gold than one of the other to the same prompt; a tie is half."""
    beats = (own[:, :, None] > other[:, None, :]) + 0.5 * (own[:, :, None] == other[:, None, :])
    return float(beats.mean())


def report(gold: dict[tuple[int, str], np.ndarray]) -> str:
    """Mean gold and win rate against the policy of ``bt``, over the seeds that have both."""
    rows = []
    for method in dict.fromkeys(method for _, method in gold):
        seeds = [seed for seed, own in gold if own == method and (seed, "bt") in gold]
        means = [float(gold[seed, method].mean()) for seed in seeds]
        wins = [win_rate(gold[seed, method], gold[seed, "bt"]) for seed in seeds]
        rows.append([method, str(len(seeds)), _interval(means), "" if method == "bt" else _interval(wins)])
    return "\n".join(table(["labels of", "seeds", "gold", "win rate against bt"], rows)) + "\n"


def _interval(values: list[float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*mean_and_interval(values))


if __name__ == "__main__":
    main()
