"""Train a reward model from a `datasets.Dataset` with LoRA and a callback, then evaluate, detect and export it.

    python examples/train_in_memory.py --output my-run [--torch-compile [BACKEND]]

Needs peft (pip install 'inform-rm[peft]'). Nothing is downloaded: pairs come from the package's generated world, and
the backbone is a small Llama that is made here. About 20 seconds on one CPU core. The backbone is untrained, so that
the accuracy says nothing.
"""

import argparse
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from inform_rm import RewardTrainer, RewardTrainingArguments, detect, evaluate, export_model
from inform_rm.world.backbone import write_backbone
from inform_rm.world.worlds import WorldConfig, make_pairs, sample_responses

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--torch-compile", nargs="?", const="inductor", metavar="BACKEND")
options = parser.parse_args()
folder: Path = options.output

# A backbone, here an untrained one; in its place goes any causal LM, by its Hub id.
write_backbone(folder / "backbone")

# Pairs in memory. Their columns have names of their own; `columns` says which is which.
pairs = Dataset.from_list(make_pairs(WorldConfig(), "train", 256)).select_columns(["prompt", "chosen", "rejected"])
pairs = pairs.rename_columns({"prompt": "question", "chosen": "better", "rejected": "worse"})
splits = pairs.train_test_split(test_size=64, seed=0)


class SaysAccuracy(TrainerCallback):
    """Any callback of transformers works."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Say it."""
        print(f"step {state.global_step}: accuracy {metrics['eval_accuracy']:.3f}")


# All settings of transformers.TrainingArguments, and those of this package.
args = RewardTrainingArguments(
    str(folder / "run"),
    columns={"prompt": "question", "chosen": "better", "rejected": "worse"},
    latent_dim=16,
    learning_rate=1e-3,
    max_steps=16,
    per_device_train_batch_size=16,
    gradient_accumulation_steps=1,
    eval_steps=8,
    logging_steps=8,
    torch_compile=options.torch_compile is not None,
    torch_compile_backend=options.torch_compile,
    use_cpu=True,
    disable_tqdm=True,
)
trainer = RewardTrainer(
    str(folder / "backbone"),
    args,
    train_dataset=splits,  # a DatasetDict: trained on `train`, evaluated on `test`
    peft_config=LoraConfig(r=8, lora_alpha=16),
    callbacks=[SaysAccuracy()],
)
# A run that was cut off goes on from its last complete checkpoint; here there is none, and it begins.
trainer.train(resume_from_checkpoint=True)

# Upload it with `trainer.push_to_hub()`, after `hub_model_id="name/model"` in the arguments. Without a network a local
# folder stands in for the Hub: adapters are merged into a whole model that loads anywhere with trust_remote_code=True.
trainer.save_model(str(folder / "adapters"))
export_model(str(folder / "adapters"), str(folder / "hub"))

test = [
    {name: row[name] for name in ("prompt", "chosen", "rejected")}
    for row in make_pairs(WorldConfig(), "in_distribution", 64)
]
result = evaluate(str(folder / "hub"), test, folder / "evaluation", device="cpu", progress=False)
print("accuracy of the exported model:", result.accuracy)

# Do two samples of responses to the same prompts differ in the latents? They are of one policy: they should not.
prompts = sorted({row["prompt"] for row in test})
samples = [
    [{"prompt": prompt, "response": sample_responses(prompt, 1, seed=seed)[0]} for prompt in prompts]
    for seed in (0, 1)
]
found = detect(
    str(folder / "hub"), *samples, folder / "detection", device="cpu", alpha=0.05, num_splits=20, num_resamples=20,
    progress=False,
)  # fmt: skip
print(f"outlying responses (MOP): {found.candidates[0]['mop']:.3f}")
# In a notebook `result` and `found` show themselves as tables, and their figure() as a plot.
print(f"pages: {folder / 'evaluation' / 'result.html'}, {folder / 'detection' / 'result.html'}")
