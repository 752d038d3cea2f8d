"""`inform-rm demo`: the main job on the embedded world, from pairs to a report and a Hub folder that loads."""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from inform_rm.errors import InputError
from inform_rm.eval.accuracy import pairwise_accuracy
from inform_rm.eval.best_of_n.simulate import SimulationSettings
from inform_rm.eval.decompose import decompose
from inform_rm.eval.detection.detect import detect
from inform_rm.eval.detection.settings import DetectionSettings
from inform_rm.eval.evaluate import evaluate
from inform_rm.hub.export import export_model
from inform_rm.scoring.scorer import RewardScorer
from inform_rm.training.reward_arguments import RewardTrainingArguments
from inform_rm.training.run import train
from inform_rm.util.files import atomic_write_text, check_output_directory, versions, write_json
from inform_rm.world.demo_report import TEST_SETS, console_table, write_demo_report
from inform_rm.world.policy import attack
from inform_rm.world.worlds import WorldConfig, make_pairs

ARCHITECTURES = ("standard", "inform")
_AUDIT_KEYS = (
    "num_pairs", "response_decides", "response_decides_interval", "sign_flips", "prompt_sensitivity", "correlations",
)  # fmt: skip
_DETECTION_KEYS = ("csi_normalized", "csi_normalized_null_rank", "mop", "mop_null_rank", "num_responses")
_ALPHA = 0.05  # with the demo's few reference responses a smaller tail would hold no rank of theirs
ROUND_TRIP_TOLERANCE = 1e-5  # reward units, float32; DESIGN section 4


@dataclass(frozen=True)
class DemoBudget:
    """How much the demo computes; both architectures get the same.

    World, learning rate and beta come from about twenty single runs on worlds of other seeds and one early run of the
    demo itself, not from a thorough search; the number of steps from the time limit. The values for a pretrained
    backbone (`--backbone`) are ordinary fine-tuning values that were not searched.

    Attributes:
        reward_steps: steps of a reward model; training makes one pass over as many pairs as they need.
        pairs_per_step: pairs in an update.
        learning_rate: peak learning rate of a reward model on the backbone from scratch.
        pretrained_reward_steps: `reward_steps` with a pretrained backbone.
        pretrained_learning_rate: `learning_rate` with a pretrained backbone.
        latent_dim: K of InfoRM.
        beta: weight of InfoRM's KL term.
        test_pairs: pairs in each test set.
        audited_pairs: in-distribution pairs whose reward gaps are decomposed.
        num_prompts: prompts for each of them.
        attacked_prompts: prompts to which the reward models choose the best of many responses.
        responses_per_prompt: responses to choose from, a power of two.
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

    Args:
        output: folder for all of it.
        backbone: pretrained model (folder or Hub id) in place of the small one that is trained from scratch.
        seed: seed of the world, the backbone and the training.
        budget: how much to compute; the default takes under five minutes on two cores without `backbone`.

    Returns:
        The content of `result.json`.

    Raises:
        InputError: on an unwritable output folder, a backbone that cannot be loaded, or a bad seed.
        RuntimeError: if the exported model does not load, or gives other rewards, in a fresh interpreter.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed: {seed!r}; expected a whole number of at least 0.")
    budget = budget or DemoBudget()
    folder = check_output_directory(output)
    for name in ("result.json", "report.html"):
        (folder / name).unlink(missing_ok=True)  # stale results must not stand beside new models
    clock = _Clock()
    world = WorldConfig(seed=seed)

    clock.start("world")
    steps = budget.reward_steps if backbone is None else budget.pretrained_reward_steps
    files = _write_world(folder / "world", world, steps * budget.pairs_per_step, budget.test_pairs)

    if backbone is None:
        from inform_rm.world.backbone import write_backbone

        backbone_name = str(folder / "backbone")
        write_backbone(backbone_name, seed=seed)
    else:
        backbone_name = backbone

    runs, evaluations, audits = {}, {}, {}
    for architecture in ARCHITECTURES:
        clock.start(f"train {architecture}")
        runs[architecture] = train(
            RewardTrainingArguments(
                model=backbone_name,
                data=(str(files["train"]),),
                eval_data=(str(files["validation"]),),
                output_dir=str(folder / architecture),
                architecture=architecture,  # type: ignore[arg-type]
                latent_dim=budget.latent_dim,
                beta=budget.beta,
                learning_rate=budget.learning_rate if backbone is None else budget.pretrained_learning_rate,
                max_steps=steps,
                per_device_train_batch_size=budget.pairs_per_step,
                per_device_eval_batch_size=64,
                gradient_accumulation_steps=1,
                warmup_steps=0.05,
                logging_steps=10,
                eval_steps=0.125,
                save_steps=steps,
                save_total_limit=1,
                seed=seed,
                overwrite=True,
            )
        )
    scorers = {}
    for architecture in ARCHITECTURES:
        clock.start(f"evaluate {architecture}")
        scorers[architecture] = RewardScorer(folder / architecture)
        evaluations[architecture] = evaluate(
            scorers[architecture],
            [files[name] for name in TEST_SETS],
            folder / "evaluation" / architecture,
            progress=False,
        )
        clock.start(f"decompose {architecture}")
        audits[architecture] = decompose(
            scorers[architecture],
            files["in_distribution"],
            folder / "decomposition" / architecture,
            num_prompts=budget.num_prompts,
            max_pairs=budget.audited_pairs,
            seed=seed,
            progress=False,
        )
    clock.start("optimize against both")
    curves = attack(
        scorers,
        folder / "best-of-n",
        settings=SimulationSettings(budget.attacked_prompts, budget.responses_per_prompt, seed=seed),
        progress=False,
    ).to_dict()
    detection = _detect_best_of_n(folder, scorers["inform"], seed)
    rows = {name: _read_jsonl(files[name]) for name in TEST_SETS}
    rewards = {architecture: _pair_rewards(folder / "evaluation" / architecture) for architecture in ARCHITECTURES}

    clock.start("export and load elsewhere")
    hub_folder = folder / "hub-model"
    _remove_folder(hub_folder)
    export_model(str(folder / "inform"), str(hub_folder))
    loaded_elsewhere = check_loads_elsewhere(hub_folder, rows["in_distribution"][:8], scorers["inform"])

    clock.start("report")
    result = {
        "settings": {"backbone": backbone or "Llama from scratch", "seed": seed, **asdict(budget)},
        "world": asdict(world),
        "versions": versions(),
        "model_parameters": {name: scorer.model.num_parameters() for name, scorer in scorers.items()},
        "train_pairs": runs["inform"]["train_pairs"]["pairs"],
        "data_fingerprints": {item["source"]: item["fingerprint"] for item in evaluations["inform"].data},
        "test_sets": _compare(rows, rewards),
        "decomposition": {
            name: {key: value for key, value in audit.to_dict().items() if key in _AUDIT_KEYS}
            for name, audit in audits.items()
        },
        "best_of_n": {
            name: {"proxy_gain": part["proxy"]["gain"][-1], "gold_gain": part["gold"]["gain"][-1], **part["peak"]}
            for name, part in curves["proxies"].items()
        },
        "detection": {key: detection["candidates"][0][key] for key in _DETECTION_KEYS} | {"null": detection["null"]},
        "loaded_elsewhere": loaded_elsewhere,
    }
    latents = _latents(scorers["inform"], rows["in_distribution"])
    result["seconds"] = clock.seconds()
    logs = {architecture: run["log_history"] for architecture, run in runs.items()}
    gaps = {
        name: pq.read_table(folder / "decomposition" / name / "pairs.parquet").to_pydict() for name in ARCHITECTURES
    }
    points = pq.read_table(folder / "detection" / "responses.parquet").to_pydict()
    write_demo_report(folder / "report.html", result, rows, rewards, logs, latents, gaps, curves, points)
    result["seconds"] = clock.seconds()
    write_json(folder / "result.json", result)
    print(console_table(result))
    print(f"\nreport: {folder / 'report.html'}\nmodel:  {hub_folder}  (loads with trust_remote_code=True)")
    return result


def _detect_best_of_n(folder: Path, scorer: RewardScorer, seed: int) -> dict[str, Any]:
    """Compare latents of InfoRM's choices with those of the policy's first responses to the same prompts."""
    table = pq.read_table(folder / "best-of-n" / "responses.parquet").to_pydict()
    by_prompt: dict[str, list[tuple[float, str]]] = {}
    for prompt, reward, text in zip(table["prompt"], table["inform"], table["response"], strict=True):
        by_prompt.setdefault(prompt, []).append((reward, text))
    files = {"reference": folder / "best-of-n" / "first.jsonl", "candidate": folder / "best-of-n" / "best.jsonl"}
    lines: dict[str, list[str]] = {name: [] for name in files}
    for prompt, found in by_prompt.items():
        # Four responses to each prompt stand for the policy; the best of each quarter of the others for its optimum.
        quarter = (len(found) - 4) // 4
        best = [max(found[4 + part * quarter : 4 + (part + 1) * quarter])[1] for part in range(4)]
        for name, texts in (("reference", [text for _, text in found[:4]]), ("candidate", best)):
            lines[name] += [json.dumps({"prompt": prompt, "response": text}) + "\n" for text in texts]
    for name, path in files.items():
        atomic_write_text(path, "".join(lines[name]))
    return detect(
        scorer,
        files["reference"],
        files["candidate"],
        folder / "detection",
        settings=DetectionSettings(alpha=_ALPHA, num_splits=50, num_resamples=50, seed=seed),
        progress=False,
    ).to_dict()


class _Clock:
    """Wall-clock seconds of each stage, announced as it starts."""

    def __init__(self) -> None:
        self._starts: list[tuple[str, float]] = []

    def start(self, stage: str) -> None:
        self._starts.append((stage, time.perf_counter()))
        print(f"[{time.perf_counter() - self._starts[0][1]:5.0f} s] {stage}", flush=True)

    def seconds(self) -> dict[str, float]:
        ends = [start for _, start in self._starts[1:]] + [time.perf_counter()]
        return {stage: round(end - start, 1) for (stage, start), end in zip(self._starts, ends, strict=True)}


def _write_world(folder: Path, world: WorldConfig, train_pairs: int, test_pairs: int) -> dict[str, Path]:
    files = {}
    sizes = {"train": train_pairs, "validation": 200} | dict.fromkeys(TEST_SETS, test_pairs)
    for split, size in sizes.items():
        files[split] = folder / f"{split}.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in make_pairs(world, split, size)]
        atomic_write_text(files[split], "".join(lines))
    return files


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _pair_rewards(folder: Path) -> dict[str, np.ndarray]:
    """Per test set ``(N, 2)``: rewards of the chosen and of the rejected response, in the order of the file."""
    rewards: dict[str, list[tuple[float, float]]] = {name: [] for name in TEST_SETS}
    for row in _read_jsonl(folder / "pairs.jsonl"):
        rewards[row["subset"]].append((row["chosen_reward"], row["rejected_reward"]))
    return {name: np.array(values) for name, values in rewards.items()}


def _compare(
    rows: dict[str, list[dict[str, Any]]], rewards: dict[str, dict[str, np.ndarray]]
) -> dict[str, dict[str, Any]]:
    """Per test set the statistics of both models and of the rule "longer wins", and the difference in accuracy."""
    compared: dict[str, dict[str, Any]] = {}
    for name in TEST_SETS:
        chosen_lengths, rejected_lengths = (
            [len(row[side].split()) for row in rows[name]] for side in ("chosen", "rejected")
        )
        part: dict[str, Any] = {}
        for architecture in ARCHITECTURES:
            chosen, rejected = rewards[architecture][name].T
            part[architecture] = pairwise_accuracy(chosen, rejected, None, chosen_lengths, rejected_lengths)
        part["longer_wins"] = pairwise_accuracy(chosen_lengths, rejected_lengths)
        right = {
            architecture: 0.5 + 0.5 * np.sign(rewards[architecture][name] @ [1.0, -1.0])
            for architecture in ARCHITECTURES
        }
        difference = right["inform"] - right["standard"]
        part["inform_minus_standard"] = {
            "accuracy_difference": float(difference.mean()),
            # Twins share their responses, so they are drawn together.
            "interval": list(paired_bootstrap_interval(difference, 2 if name == "adversarial_prompt" else 1)),
        }
        compared[name] = part
    return compared


def paired_bootstrap_interval(differences: np.ndarray, block: int = 1, draws: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of paired differences, with a fixed seed.

    Args:
        differences: ``(N,)`` one per pair.
        block: rows in a row that are drawn together because they depend on each other; N is a multiple of it.
        draws: bootstrap samples.
    """
    means = np.asarray(differences, dtype=np.float64).reshape(-1, block).mean(axis=1)
    rng = np.random.default_rng(0)
    samples = means[rng.integers(len(means), size=(draws, len(means)))].mean(axis=1)
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(low), float(high)


def _latents(scorer: RewardScorer, rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Latent means and KL per dimension ``(2 N, K)`` of chosen, then rejected responses; their gold r1 ``(2 N,)``."""
    import torch

    means, kls = [], []
    for side in ("chosen", "rejected"):
        for row in rows:
            ids = torch.tensor([scorer.encode(row["prompt"], row[side], row["id"]).input_ids])
            with torch.no_grad():
                out = scorer.model(input_ids=ids.to(scorer.model.device), use_cache=False)
            mean, log_variance = out.latent_mean[0].float().cpu(), out.latent_log_variance[0].float().cpu()
            means.append(mean.numpy())
            kls.append((0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)).numpy())
    gold = [row[f"gold_r1_{side}"] for side in ("chosen", "rejected") for row in rows]
    return {"mean": np.array(means), "kl_nats": np.array(kls), "gold_r1": np.array(gold)}


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
    for messages, ids in zip(request["messages"], request["input_ids"]):
        if tokenizer.chat_template:
            ids_agree &= tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"] == ids
        rewards.append(model(input_ids=torch.tensor([ids])).logits.item())
json.dump({"rewards": rewards, "ids_agree": ids_agree, "class": type(model).__module__}, sys.stdout)
"""


def check_loads_elsewhere(folder: str | Path, rows: list[dict[str, Any]], scorer: RewardScorer) -> dict[str, Any]:
    """Load an exported model in a fresh interpreter that cannot import this package, and compare rewards.

    Args:
        folder: exported model.
        rows: pairs whose chosen and rejected responses are scored there.
        scorer: the model here.

    Returns:
        ``num_responses``, ``largest_reward_difference`` and the ``module`` that the class came from.

    Raises:
        RuntimeError: if it does not load, or token ids differ, or rewards by more than `ROUND_TRIP_TOLERANCE`.
    """
    texts = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    input_ids = [scorer.encode(prompt, response, prompt).input_ids for prompt, response in texts]
    request = {
        "folder": str(Path(folder).resolve()),
        "messages": [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            for prompt, response in texts
        ],
        "input_ids": input_ids,
    }
    with tempfile.TemporaryDirectory() as modules:
        environment = {**os.environ, "HF_MODULES_CACHE": modules, "HF_HUB_OFFLINE": "1"}
        finished = subprocess.run(
            [sys.executable, "-I", "-c", _LOAD_ELSEWHERE],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env=environment,
            cwd=modules,
            check=False,
        )
    if finished.returncode != 0:
        raise RuntimeError(f"{folder} does not load without the package:\n{finished.stderr[-2000:]}")
    answer = json.loads(finished.stdout.splitlines()[-1])
    here = scorer.score_encoded(input_ids).numpy()
    difference = float(np.abs(here - np.array(answer["rewards"])).max())
    if difference > ROUND_TRIP_TOLERANCE or not answer["ids_agree"]:
        raise RuntimeError(
            f"{folder} gives other {'rewards' if answer['ids_agree'] else 'token ids'} in a fresh interpreter "
            f"(largest reward difference {difference:.2g}, allowed {ROUND_TRIP_TOLERANCE:g})."
        )
    return {"num_responses": len(texts), "largest_reward_difference": difference, "module": answer["class"]}


def _remove_folder(folder: Path) -> None:
    import shutil

    if folder.exists():
        shutil.rmtree(folder)
