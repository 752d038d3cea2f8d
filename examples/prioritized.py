"""Prioritized training from Python: of each pool, learn from the pairs with the smallest prompt-free gap.

    python examples/prioritized.py --output runs/prioritized

Needs nothing but this package; nothing is downloaded. About 10 seconds on one CPU core. The backbone is small and
untrained and sees few pairs, so that the accuracies say nothing: docs/results/prioritized.md has a comparison that
does.
"""

import argparse
from pathlib import Path

from inform_rm import RewardTrainer, RewardTrainingArguments, decompose, evaluate
from inform_rm.world.backbone import write_backbone
from inform_rm.world.worlds import WorldConfig, make_pairs

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, required=True)
folder: Path = parser.parse_args().output

write_backbone(folder / "backbone")  # in its place goes any causal LM, by its Hub id
columns = ("prompt", "chosen", "rejected")
pairs = [{name: row[name] for name in columns} for row in make_pairs(WorldConfig(), "train", 128)]

args = RewardTrainingArguments(
    str(folder / "run"),
    objective="prioritized",
    pool_factor=2,  # of 16 pairs the 8 with the smallest gap
    num_prompts=2,  # other prompts behind each gap
    warmup_fraction=0.25,  # before the head has learnt anything, its gaps are noise
    latent_dim=16,
    learning_rate=1e-3,
    max_steps=8,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=1,
    logging_steps=4,
    use_cpu=True,
    disable_tqdm=True,
)
trainer = RewardTrainer(str(folder / "backbone"), args, train_dataset=pairs)
trainer.train()
for line in trainer.state.log_history:
    if "prompt_free_gap_selected" in line:
        selected, left_out = line["prompt_free_gap_selected"], line["prompt_free_gap_left_out"]
        print(f"step {line['step']}: prompt-free gap {selected:.3f} where it learns, {left_out:.3f} where it does not")
trainer.save_model(str(folder / "model"))

# What the preference of the finished model rests on: the response alone, or the response to its prompt?
test = [{name: row[name] for name in columns} for row in make_pairs(WorldConfig(), "in_distribution", 32)]
quiet = {"device": "cpu", "progress": False}
print("accuracy:", evaluate(str(folder / "model"), test, **quiet).accuracy)
found = decompose(str(folder / "model"), test, folder / "decomposition", num_prompts=4, **quiet)
print(f"preference mostly about the response alone: {found.response_decides:.3f} of the pairs")
print(f"page: {folder / 'decomposition' / 'result.html'}")
