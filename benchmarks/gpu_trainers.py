"""Whole trainers on an accelerator, TRL's and ours, on the pairs of `gpu_contestants`. Not a command; see `gpu.py`."""

import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, TrainerCallback

from gpu_contestants import LLAMA, SHAPES, Batch, Setting, make_model, now, pairs_of, summarise


class StepTimes(TrainerCallback):
    """When each step ended."""

    def __init__(self, device: torch.device):
        self.device, self.ends = device, []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(now(self.device))


def trained(trainer: Any, times: StepTimes, pairs: list[Batch], setting: Setting) -> dict[str, Any]:
    """Mean seconds of the steps after the second."""
    start = now(setting.device)
    trainer.train()
    seconds = (times.ends[-1] - times.ends[1]) / (len(times.ends) - 2)
    useful = statistics.mean(sum(len(ids) for ids, _ in batch) for batch in pairs[2:])
    found = summarise(seconds, setting.pairs, useful, setting)
    return found | {"first_step_seconds": round(times.ends[0] - start, 2), "steps": len(times.ends)}


def common_arguments(setting: Setting) -> dict[str, Any]:
    on_gpu = setting.device.type == "cuda"
    return {
        "num_train_epochs": 1, "learning_rate": 1e-6, "report_to": "none", "seed": 0, "save_strategy": "no",
        "logging_strategy": "no", "disable_tqdm": True, "train_sampling_strategy": "sequential", "bf16": on_gpu,
        "use_cpu": not on_gpu,
    }  # fmt: skip


def plain_tokenizer(vocabulary: int) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0} | {f"w{number}": number for number in range(1, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="w2")


def trl(setting: Setting, shape: str, is_best: bool) -> dict[str, Any]:
    """TRL's RewardTrainer, 8 pairs a pass (its default): shuffled and checkpointed, or by length and not."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    generator = np.random.default_rng(0)
    pairs = [pairs_of(generator, setting, SHAPES[shape]["vocab_size"]) for _ in range(setting.steps)]
    sides = [(batch[i][0], batch[i + len(batch) // 2][0]) for batch in pairs for i in range(len(batch) // 2)]
    per_pass = min(8, setting.pairs)
    if is_best:  # what length-grouped sampling makes of a large set: passes of equal lengths, in any order
        sides.sort(key=lambda pair: max(map(len, pair)))
        passes = [sides[start : start + per_pass] for start in range(0, len(sides), per_pass)]
        sides = [pair for number in generator.permutation(len(passes)) for pair in passes[number]]
    config = LlamaConfig(**SHAPES[shape], **LLAMA, num_labels=1)
    with torch.device(setting.device):
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    times = StepTimes(setting.device)
    with TemporaryDirectory() as folder:
        arguments = RewardConfig(
            folder, max_length=None, per_device_train_batch_size=per_pass,
            gradient_accumulation_steps=setting.pairs // per_pass,
            **({"gradient_checkpointing": False} if is_best else {}), **common_arguments(setting),
        )  # fmt: skip
        trainer = RewardTrainer(
            model=model, args=arguments, processing_class=plain_tokenizer(SHAPES[shape]["vocab_size"]),
            train_dataset=Dataset.from_list([{"chosen_ids": c, "rejected_ids": r} for c, r in sides]),
            callbacks=[times],
        )  # fmt: skip
        return trained(trainer, times, pairs, setting)


def reward_trainer(setting: Setting, shape: str, compiles: bool = False) -> dict[str, Any]:
    """Ours as ``inform-rm train`` runs it, with the same pairs; ``compiles``: with ``torch_compile: true``."""
    from datasets import Dataset

    from inform_rm.training.reward_arguments import RewardTrainingArguments
    from inform_rm.training.trainer import RewardTrainer

    generator = np.random.default_rng(0)
    pairs = [pairs_of(generator, setting, SHAPES[shape]["vocab_size"]) for _ in range(setting.steps)]
    rows = []
    for batch in pairs:
        for (chosen, length), (rejected, _) in zip(*np.array_split(np.array(batch, dtype=object), 2), strict=True):
            rows.append({"chosen_input_ids": chosen, "rejected_input_ids": rejected, "prompt_length": length,
                         "length": max(len(chosen), len(rejected)), "margin": None, "id": str(len(rows))})  # fmt: skip
    times = StepTimes(setting.device)
    counters = torch._dynamo.utils.counters
    counters.clear()
    with TemporaryDirectory() as folder:
        arguments = RewardTrainingArguments(
            str(Path(folder) / "run"), per_device_train_batch_size=setting.pairs, gradient_accumulation_steps=1,
            kl_warmup_steps=0, tokens_per_batch=setting.tokens, max_length=2048, torch_compile=compiles,
            **common_arguments(setting),
        )  # fmt: skip
        trainer = RewardTrainer(
            model=make_model(shape, setting.device, trains=True), args=arguments,
            train_dataset=Dataset.from_list(rows), callbacks=[times],
            processing_class=plain_tokenizer(SHAPES[shape]["vocab_size"]),
        )  # fmt: skip
        found = trained(trainer, times, pairs, setting) | {"batching": trainer.batching}
    if compiles:
        found["graphs"] = counters["stats"]["unique_graphs"]
        found["graph_breaks"] = sum(counters["graph_break"].values())
    return found
