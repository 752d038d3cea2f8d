"""`inform-rm demo`: the main job on the embedded world, from pairs to a report and a Hub folder that loads."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inform_rm.errors import check_whole_number
from inform_rm.eval.accuracy import pairwise_accuracy
from inform_rm.eval.comparison.paired import paired_bootstrap
from inform_rm.eval.decompose import decompose
from inform_rm.eval.detection.detect import detect
from inform_rm.eval.detection.report import DetectionResult
from inform_rm.eval.evaluate import evaluate
from inform_rm.eval.frame import json_lines
from inform_rm.hub.export import export_model
from inform_rm.scoring.scorer import RewardScorer
from inform_rm.training.reward_arguments import RewardTrainingArguments
from inform_rm.training.run import train
from inform_rm.util.files import atomic_write_text, check_output_directory, versions, write_json
from inform_rm.world.backbone import MAX_LENGTH, write_backbone
from inform_rm.world.demo_report import TEST_SETS, console_table, demo_page
from inform_rm.world.policy import attack
from inform_rm.world.stages import Stages
from inform_rm.world.worlds import WorldConfig, make_pairs

ARCHITECTURES = ("standard", "inform")
_AUDIT_KEYS = (
    "num_pairs", "response_decides", "response_decides_interval", "sign_flips", "prompt_sensitivity", "correlations",
)  # fmt: skip
_DETECTION_KEYS = ("csi_normalized", "csi_normalized_null_rank", "mop", "mop_null_rank", "num_responses")
_PAIR_COLUMNS = ("prompt", "chosen", "rejected", "subset", "id")  # the others are the world's, not for a reward model
_ALPHA = 0.05  # with the demo's few reference responses a smaller tail would hold no rank of theirs
# CPU seconds of the default budget; the time left is told from their ratios. Extrapolated from
# a run with 16 steps and a fifth of the pairs, and from 0.16 s a step.
_USUAL_SECONDS = {
    "world": 4, "train standard": 150, "train inform": 150, "evaluate standard": 12, "decompose standard": 22,
    "evaluate inform": 12, "decompose inform": 22, "optimize against both": 35, "export and load elsewhere": 10,
    "report": 15,
}  # fmt: skip
ROUND_TRIP_TOLERANCE = 1e-5  # reward units, float32


@dataclass(frozen=True)
class DemoBudget:
    """How much the demo computes; both architectures get the same.

    World, learning rate and beta come from about twenty single runs on worlds of other seeds and one early run of the
    demo itself, not from a thorough search; the number of steps from the time limit. The values for a pretrained
    backbone (`--backbone`) are ordinary fine-tuning values that were not searched.

    Training makes one pass over as many pairs as the steps need; each test set has ``test_pairs``. The reward gaps of
    ``audited_pairs`` in-distribution pairs are decomposed under ``num_prompts`` prompts each. To each of
    ``attacked_prompts`` the reward models choose the best of ``responses_per_prompt``, a power of two.
    """

    reward_steps: int = 900
    pairs_per_step: int = 16
    learning_rate: float = 1e-3
    pretrained_reward_steps: int = 150
    pretrained_learning_rate: float = 5e-5
    latent_dim: int = 32
    beta: float = 0.01
    test_pairs: int = 500
    audited_pairs: int = 300
    num_prompts: int = 16
    attacked_prompts: int = 64
    responses_per_prompt: int = 128


def demo(
    output: str | Path, backbone: str | None = None, seed: int = 0, budget: DemoBudget | None = None
) -> dict[str, Any]:
    """Train a standard and an InfoRM reward model on a generated world, compare, report, export and load back.

    The folder receives the pairs (`world/`), the backbone, both models with their training logs, the evaluations, the
    exported InfoRM model (`hub-model/`), `report.html` and `result.json`. What an earlier demo left there is replaced.
    Says on standard output how far it is, at the end what came of it and where it lies.

    ``backbone`` is a pretrained model (folder or Hub id) in place of the small one that is trained from scratch; the
    default budget takes under five minutes on two cores without it. Returns the content of `result.json`;
    `RuntimeError` if the exported model does not load, or gives other rewards, in a fresh interpreter.
    """
    check_whole_number("seed", seed, least=0)
    folder = check_output_directory(output)
    for name in ("result.json", "report.html"):
        (folder / name).unlink(missing_ok=True)  # stale results must not stand beside new models
    with Stages(_USUAL_SECONDS) as stages:
        result = _run(folder, backbone, WorldConfig(seed=seed), budget or DemoBudget(), stages)
    print(f"\n{console_table(result)}\n")
    print(f"report:    {folder / 'report.html'}")
    print(f"Hub model: {folder / 'hub-model'} (loads with trust_remote_code=True)")
    return result


def _run(folder: Path, backbone: str | None, world: WorldConfig, budget: DemoBudget, stages: Stages) -> dict[str, Any]:
    stages.start("world")
    seed, steps = world.seed, budget.reward_steps if backbone is None else budget.pretrained_reward_steps
    files, rows = _write_world(folder / "world", world, steps * budget.pairs_per_step, budget.test_pairs)
    if backbone is None:
        write_backbone(folder / "backbone", seed=seed)
    runs = {}
    for name in ARCHITECTURES:
        stages.start(f"train {name}")
        runs[name] = train(_training_arguments(folder, name, backbone, seed, steps, budget))
    scorers, evaluations, audits = _audit_both(folder, files, budget, seed, stages)
    stages.start("optimize against both")
    best_of_n = attack(
        scorers, folder / "best-of-n", num_prompts=budget.attacked_prompts,
        num_responses=budget.responses_per_prompt, seed=seed, progress=False,
    )  # fmt: skip
    detection = _detect_best_of_n(folder, scorers["inform"], best_of_n.responses, seed)
    stages.start("export and load elsewhere")
    hub_folder = folder / "hub-model"
    shutil.rmtree(hub_folder, ignore_errors=True)
    export_model(str(folder / "inform"), str(hub_folder))
    loaded_elsewhere = check_loads_elsewhere(hub_folder, rows["in_distribution"][:8], scorers["inform"])
    stages.start("report")
    rewards = {name: _pair_rewards(found.rows) for name, found in evaluations.items()}
    result = {
        "settings": {"backbone": backbone or "Llama from scratch", "seed": seed, **asdict(budget)},
        "world": asdict(world),
        "versions": versions(),
        "model_parameters": {name: scorer.model.num_parameters() for name, scorer in scorers.items()},
        "train_pairs": runs["inform"]["train_pairs"]["pairs"],
        "data_fingerprints": {item["source"]: item["fingerprint"] for item in evaluations["inform"].data},
        "test_sets": {name: _compare(name, rows[name], rewards) for name in TEST_SETS},
        "decomposition": {
            name: {key: value for key, value in audit.to_dict().items() if key in _AUDIT_KEYS}
            for name, audit in audits.items()
        },
        "best_of_n": {
            name: {"proxy_gain": part["proxy"]["gain"][-1], "gold_gain": part["gold"]["gain"][-1], **part["peak"]}
            for name, part in best_of_n.proxies.items()
        },
        "detection": {key: detection.candidates[0][key] for key in _DETECTION_KEYS} | {"null": detection.null},
        "loaded_elsewhere": loaded_elsewhere,
    }
    page = demo_page(
        {**result, "seconds": stages.seconds()}, rows, rewards,
        logs={name: run["log_history"] for name, run in runs.items()},
        gaps={name: audit.pairs for name, audit in audits.items()},
        curves=best_of_n.to_dict(), points=detection.points,
    )  # fmt: skip
    atomic_write_text(folder / "report.html", page.html())
    result["seconds"] = stages.seconds()
    write_json(folder / "result.json", result)
    return result


def _audit_both(
    folder: Path, files: dict[str, Path], budget: DemoBudget, seed: int, stages: Stages
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Scorer, accuracy and decomposition of each model."""
    scorers, evaluations, audits = {}, {}, {}
    test_files = [files[name] for name in TEST_SETS]
    for name in ARCHITECTURES:
        scorer = scorers[name] = RewardScorer(folder / name)
        stages.start(f"evaluate {name}")
        evaluations[name] = evaluate(scorer, test_files, folder / "evaluation" / name, progress=False)
        stages.start(f"decompose {name}")
        audits[name] = decompose(
            scorer, files["in_distribution"], folder / "decomposition" / name, num_prompts=budget.num_prompts,
            max_pairs=budget.audited_pairs, seed=seed, progress=False,
        )  # fmt: skip
    return scorers, evaluations, audits


def _training_arguments(
    folder: Path, architecture: str, backbone: str | None, seed: int, steps: int, budget: DemoBudget
) -> RewardTrainingArguments:
    is_own = backbone is None
    return RewardTrainingArguments(
        output_dir=str(folder / architecture), overwrite=True, seed=seed,
        model=str(folder / "backbone") if is_own else backbone, max_length=MAX_LENGTH if is_own else None,
        data=(str(folder / "world" / "train.jsonl"),), eval_data=(str(folder / "world" / "validation.jsonl"),),
        architecture=architecture, latent_dim=budget.latent_dim, beta=budget.beta,  # type: ignore[arg-type]
        learning_rate=budget.learning_rate if is_own else budget.pretrained_learning_rate, warmup_steps=0.05,
        per_device_train_batch_size=budget.pairs_per_step, gradient_accumulation_steps=1, max_steps=steps,
        per_device_eval_batch_size=64, eval_steps=0.125, logging_steps=10, save_steps=steps, save_total_limit=1,
    )  # fmt: skip


def _detect_best_of_n(folder: Path, scorer: RewardScorer, responses: dict[str, Any], seed: int) -> DetectionResult:
    """Compare latents of InfoRM's choices with those of the policy's first responses to the same prompts."""
    by_prompt: dict[str, list[tuple[float, str]]] = {}
    for prompt, reward, text in zip(*(responses[name] for name in ("prompt", "inform", "response")), strict=True):
        by_prompt.setdefault(prompt, []).append((reward, text))
    first, best = [], []
    for prompt, found in by_prompt.items():
        # Four responses to each prompt stand for the policy; the best of each quarter of the others for its optimum.
        quarter = (len(found) - 4) // 4
        first += [{"prompt": prompt, "response": text} for _, text in found[:4]]
        for start in range(4, 4 + 4 * quarter, quarter):
            best.append({"prompt": prompt, "response": max(found[start : start + quarter])[1]})
    files = folder / "best-of-n" / "first.jsonl", folder / "best-of-n" / "best.jsonl"
    for path, rows in zip(files, (first, best), strict=True):
        atomic_write_text(path, json_lines(rows))
    return detect(
        scorer, *files, folder / "detection", alpha=_ALPHA, num_splits=50, num_resamples=50, seed=seed, progress=False
    )


def _write_world(
    folder: Path, world: WorldConfig, train_pairs: int, test_pairs: int
) -> tuple[dict[str, Path], dict[str, list[dict[str, Any]]]]:
    """Files of pairs by split, and all columns of their rows, which also go to ``with_gold.jsonl``."""
    sizes = {"train": train_pairs, "validation": 200} | dict.fromkeys(TEST_SETS, test_pairs)
    rows = {split: make_pairs(world, split, size) for split, size in sizes.items()}
    files = {split: folder / f"{split}.jsonl" for split in sizes}
    for split, path in files.items():
        atomic_write_text(path, json_lines({name: row[name] for name in _PAIR_COLUMNS} for row in rows[split]))
    atomic_write_text(folder / "with_gold.jsonl", json_lines(row for part in rows.values() for row in part))
    return files, rows


def _pair_rewards(pairs: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Per test set ``(N, 2)``: rewards of the chosen and of the rejected response, in the order of the file."""
    rewards: dict[str, list[tuple[float, float]]] = {name: [] for name in TEST_SETS}
    for row in pairs:
        rewards[row["subset"]].append((row["chosen_reward"], row["rejected_reward"]))
    return {name: np.array(values) for name, values in rewards.items()}


def _compare(test_set: str, rows: list[dict[str, Any]], rewards: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """The statistics of both models on a test set, lengths in words, and the difference in accuracy."""
    pairs = {architecture: rewards[architecture][test_set] for architecture in ARCHITECTURES}
    right = {architecture: 0.5 + 0.5 * np.sign(part @ [1.0, -1.0]) for architecture, part in pairs.items()}
    # Twins share their responses, so they are drawn together.
    block = 2 if test_set == "adversarial_prompt" else 1
    found = paired_bootstrap((right["inform"] - right["standard"]).reshape(-1, block).mean(axis=1))
    lengths = [[len(row[side].split()) for row in rows] for side in ("chosen", "rejected")]
    compared = {name: pairwise_accuracy(part[:, 0], part[:, 1], None, *lengths) for name, part in pairs.items()}
    difference = {"accuracy_difference": found.estimate, "interval": [found.low, found.high]}
    return {**compared, "inform_minus_standard": difference}


# Runs under `python -I`: no PYTHONPATH, no current folder; the package, if it is installed, is made unimportable.
_LOAD_ELSEWHERE = """
import json, sys
sys.modules["inform_rm"] = None
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
request = json.load(sys.stdin)
model = AutoModelForSequenceClassification.from_pretrained(request["folder"], trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(request["folder"], trust_remote_code=True)
rewards, ids_agree = [], True
with torch.no_grad():
    for (prompt, response), ids in zip(request["texts"], request["input_ids"]):
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            ids_agree &= tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"] == ids
        rewards.append(model(input_ids=torch.tensor([ids])).logits.item())
json.dump({"rewards": rewards, "ids_agree": ids_agree, "class": type(model).__module__}, sys.stdout)
"""


def check_loads_elsewhere(folder: str | Path, rows: list[dict[str, Any]], scorer: RewardScorer) -> dict[str, Any]:
    """Load an exported model in a fresh interpreter that cannot import this package, and compare rewards.

    `RuntimeError` if it does not load, or token ids of the pairs in ``rows`` differ, or rewards by more than
    `ROUND_TRIP_TOLERANCE`; else ``num_responses``, ``largest_reward_difference`` and the ``module`` of its class.
    """
    texts = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    input_ids = [scorer.encode(prompt, response, prompt).input_ids for prompt, response in texts]
    request = {"folder": str(Path(folder).resolve()), "texts": texts, "input_ids": input_ids}
    with tempfile.TemporaryDirectory() as modules:
        finished = subprocess.run(
            [sys.executable, "-I", "-c", _LOAD_ELSEWHERE], input=json.dumps(request), capture_output=True, text=True,
            env={**os.environ, "HF_MODULES_CACHE": modules, "HF_HUB_OFFLINE": "1"}, cwd=modules, check=False,
        )  # fmt: skip
    if finished.returncode != 0:
        raise RuntimeError(f"{folder} does not load without the package:\n{finished.stderr[-2000:]}")
    answer = json.loads(finished.stdout.splitlines()[-1])
    difference = float(np.abs(scorer.score_encoded(input_ids).numpy() - np.array(answer["rewards"])).max())
    if difference > ROUND_TRIP_TOLERANCE or not answer["ids_agree"]:
        raise RuntimeError(
            f"{folder} gives other {'rewards' if answer['ids_agree'] else 'token ids'} in a fresh interpreter "
            f"(largest reward difference {difference:.2g}, allowed {ROUND_TRIP_TOLERANCE:g})."
        )
    return {"num_responses": len(texts), "largest_reward_difference": difference, "module": answer["class"]}
