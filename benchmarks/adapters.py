"""Memory, trainable parameters and storage of full training, LoRA and QLoRA on a CPU; one process for each.

    python benchmarks/adapters.py --model FOLDER [--steps 3] [--modes full,lora,nf4,int8]

Memory is the peak resident size of the process (ru_maxrss) minus that before the model is loaded. On a CPU a quantised
model is loaded in full precision first, and the export of the finished model is not part of what is measured.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

MODES = {
    "full": {},
    "lora": {"lora_r": 16},
    "nf4": {"lora_r": 16, "load_in_4bit": True},
    "int8": {"lora_r": 16, "load_in_8bit": True},
    "full_adamw8bit": {"optim": "adamw_bnb_8bit"},
}


def measure(model_folder: str, mode: str, steps: int, output: Path) -> dict[str, float]:
    """Train a few steps of 4 pairs of 128 tokens and save a checkpoint, all in this process."""
    import torch
    from datasets import Dataset
    from transformers import set_seed

    from inform_rm.data.tokenizer import load_tokenizer
    from inform_rm.training.reward_arguments import RewardTrainingArguments
    from inform_rm.training.trainer import RewardTrainer

    config = RewardTrainingArguments(
        model=model_folder, output_dir=str(output), max_steps=steps, save_steps=steps,
        per_device_train_batch_size=4, gradient_accumulation_steps=1, logging_steps=1, use_cpu=True,
        learning_rate=1e-4, batching="padded", beta=0.0, overwrite=True, **MODES[mode],
    )  # fmt: skip
    set_seed(0)
    tokenizer = load_tokenizer(model_folder, chat_template="plain")
    draws = torch.randint(10, 4000, (4 * steps, 2, 128), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = [
        {
            "chosen_input_ids": one,
            "rejected_input_ids": other,
            "prompt_length": 0,
            "margin": 0.0,
            "length": 128,
            "id": "",
        }
        for one, other in draws
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainer = RewardTrainer(args=config, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
    trainable = trainer.accelerator.unwrap_model(trainer.model)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainer.train()
    checkpoint = output / "checkpoints" / f"checkpoint-{steps}"
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
    mib = 2**20
    return {
        "trainable_parameters": sum(value.numel() for value in trainable.parameters() if value.requires_grad),
        "peak_mib_loading": (loaded - before) // 1024,
        "peak_mib_training": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024,
        "model_in_memory_mib": round(trainable.get_memory_footprint() / mib, 1),
        "weights_file_mib": round(sum(size for name, size in sizes.items() if name.endswith(".safetensors")) / mib, 2),
        "optimizer_file_mib": round(sizes["optimizer.pt"] / mib, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(arguments.model, arguments.measure, arguments.steps, Path(folder))
        print("RESULT " + json.dumps(result))
        return
    for mode in arguments.modes.split(","):
        command = [sys.executable, __file__, "--model", arguments.model, "--steps", str(arguments.steps)]
        done = subprocess.run([*command, "--measure", mode], capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            sys.exit(f"{mode} failed:\n{done.stderr[-2000:]}")
        print(f"{mode:16}{lines[-1].removeprefix('RESULT ')}", flush=True)


if __name__ == "__main__":
    main()
