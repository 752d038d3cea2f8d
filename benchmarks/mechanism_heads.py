"""Loss curves of heads on the demo's world without noise: does a bottleneck start behind a linear reward head?

    python benchmarks/mechanism_heads.py --output runs/mechanism-heads --processes 2

Each run trains the demo's small Llama from scratch with the package's trainer, on pairs that are seen once, beta
0.001; heads start as `mechanism_models.restart` says. A JSON file a run; started again, it does what is missing.
"""

import argparse
import json
import multiprocessing
import os
import time
from pathlib import Path

STARTS = ("standard", "random 1 0", "mirrored 0.3 -4", "mirrored 0.3 0", "linear 1 0")
SEEDS, STEPS, PAIRS_PER_STEP = (0, 1), 500, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/mechanism-heads"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--starts", nargs="+", default=STARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    jobs = [(arguments.output, start, seed, arguments.steps) for seed in arguments.seeds for start in arguments.starts]
    begun = time.time()
    with multiprocessing.get_context("spawn").Pool(arguments.processes, maxtasksperchild=1) as pool:
        for words in pool.imap_unordered(one_run, jobs):
            print(f"{time.time() - begun:.0f} s: {words}", flush=True)


def one_run(job: tuple[Path, str, int, int]) -> str:
    """Train one model; ``losses`` are means of ten steps."""
    import torch

    from inform_rm import InfoRMForSequenceClassification
    from inform_rm.eval.frame import json_lines
    from inform_rm.training.reward_arguments import RewardTrainingArguments
    from inform_rm.training.run import train
    from inform_rm.util.files import atomic_write_text, versions, write_json
    from inform_rm.world.backbone import MAX_LENGTH, write_backbone
    from inform_rm.world.worlds import WorldConfig, make_pairs
    from mechanism_models import restart

    output, start, seed, steps = job
    folder = output / f"{start.replace(' ', '_')}-{seed}-{steps}"
    if (folder / "curve.json").exists():
        return f"{folder.name} is there"
    torch.set_num_threads(1)
    begun = time.time()
    world = WorldConfig(seed=seed, label_noise=0.0)
    for split, size in (("train", steps * PAIRS_PER_STEP), ("in_distribution", 500)):
        rows = make_pairs(world, split, size)  # type: ignore[arg-type]
        kept = [{name: row[name] for name in ("prompt", "chosen", "rejected", "id")} for row in rows]
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / f"{split}.jsonl", json_lines(kept))
    write_backbone(folder / "backbone", seed=seed)
    model = folder / "backbone"
    is_inform = start != "standard"
    head = {"latent_dim": 32, "beta": 0.001, "decoder": "linear" if start.startswith("linear") else "mlp"}
    if is_inform:
        torch.manual_seed(seed)
        fresh = InfoRMForSequenceClassification.from_backbone(str(model), **head)
        restart(fresh.score, start)
        fresh.save_pretrained(model)  # beside the tokenizer: a reward model to go on from
    result = train(RewardTrainingArguments(
        output_dir=str(folder / "model"), overwrite=True, seed=seed, model=str(model), max_length=MAX_LENGTH,
        data=(str(folder / "train.jsonl"),), eval_data=(str(folder / "in_distribution.jsonl"),),
        learning_rate=1e-3, warmup_steps=0.05, per_device_train_batch_size=PAIRS_PER_STEP,
        gradient_accumulation_steps=1, max_steps=steps, per_device_eval_batch_size=64, eval_steps=0.5,
        logging_steps=10, save_steps=steps, save_total_limit=1, disable_tqdm=True, use_cpu=True,
        **({**head, "kl_warmup_steps": 0.25} if is_inform else {"architecture": "standard"}),
    ))  # fmt: skip
    log = result["log_history"]
    write_json(folder / "curve.json", {
        "start": start, "seed": seed, "log": log, "seconds": time.time() - begun, "versions": versions(),
    })  # fmt: skip
    last = [row for row in log if "eval_accuracy" in row][-1]
    return f"{folder.name}: {json.dumps({key: last[key] for key in last if 'accuracy' in key or 'loss' in key})}"


if __name__ == "__main__":
    main()
