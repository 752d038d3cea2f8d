"""Audit a reward model: how often is it right, and how much of its preference comes from the response alone?

    python examples/audit_any_model.py --output runs/audit [--model FOLDER_OR_HUB_ID] [--data FILE_OR_HUB_ID]

Needs any sequence-classification reward model, ours or not, and pairs. Without them it takes a random one that is made
here, and pairs of the package's generated world; nothing is downloaded. About 5 seconds on one CPU core.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from inform_rm import RewardScorer, decompose, evaluate
from inform_rm.world.backbone import write_backbone
from inform_rm.world.worlds import WorldConfig, make_pairs

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--model")
parser.add_argument("--data")
options = parser.parse_args()
folder: Path = options.output

if options.model is None:
    write_backbone(folder / "backbone")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "backbone", num_labels=1)
    scorer = RewardScorer(model, AutoTokenizer.from_pretrained(folder / "backbone"))
else:
    scorer = RewardScorer(options.model)
rows = make_pairs(WorldConfig(), "in_distribution", 64)
data = options.data or [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]

# One response to one prompt: a number.
print("a reward:", scorer.score(["Name a colour."], ["Blue."]).item())

accuracy = evaluate(scorer, data, folder / "accuracy", progress=False)
low, high = accuracy.accuracy_interval
print(f"accuracy {accuracy.accuracy:.3f} on {accuracy.num_pairs} pairs (95 % interval {low:.3f} to {high:.3f})")

# Both responses of each pair under prompts of other pairs: what remains of the preference is not about the prompt.
found = decompose(scorer, data, folder / "decomposition", num_prompts=8, progress=False)
print(f"preference mostly about the response alone: {found.response_decides:.3f} of the pairs")
print(f"pages: {folder / 'accuracy' / 'result.html'}, {folder / 'decomposition' / 'result.html'}")
