"""Gold rewards of `real_text.py` once more, from the cached texts alone: not the program that cached them.

    python benchmarks/real_text_check.py --model DIR --output runs/real-text
    python benchmarks/real_text_check.py --model DIR --output runs/real-text --policy NAME

The whole gold model, in float32, scores prompts and responses of the JSON Lines with the package's `RewardScorer`, and
is compared with ``gold/rewards.safetensors``, or with what a policy was measured by. A text that is not encoded to the
tokens that were sampled is left out.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from real_text_gold import gold_rewards, load_gold
from real_text_grpo import some_rows
from real_text_models import whole_model
from real_text_policy import TEMPLATE
from real_text_samples import depths_of, read_part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the policy")
    parser.add_argument("--output", type=Path, default=Path("runs/real-text"))
    parser.add_argument("--part", default="pairs")
    parser.add_argument("--policy", help="folder of a run in policy/, instead of a part")
    parser.add_argument("--limit", type=int, default=256, help="responses at most")
    arguments = parser.parse_args()
    print(compare(arguments.output, arguments.model, arguments.part, arguments.limit, arguments.policy))


def compare(folder: Path, model_folder: Path, part: str, limit: int, policy: str | None = None) -> dict[str, Any]:
    """Correlation and largest difference, in standard deviations of gold, and the share of equal tokens."""
    from transformers import AutoConfig, AutoTokenizer

    from inform_rm.data.encoding import encode
    from inform_rm.scoring.scorer import RewardScorer

    layers = int(AutoConfig.from_pretrained(model_folder).num_hidden_layers)
    top = load_gold(folder, model_folder, layers)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = TEMPLATE.read_text(encoding="utf-8")
    if policy is None:
        rows, lines = read_part(folder, part, ())
        known = gold_rewards(folder, part)
    else:
        rows, lines = read_part(folder / "policy" / policy, "measured", ())
        rows, lines = some_rows(rows, torch.arange(len(lines)).flip(0)), lines[::-1]  # the end of the run first
        known = torch.tensor([line["gold"] for line in lines], dtype=torch.float64)

    def sampled(place: int) -> list[int]:
        return rows.ids[place, : rows.lengths[place]].tolist()

    same = [
        place for place, line in enumerate(lines[:limit])
        if list(encode(tokenizer, line["prompt"], line["response"]).input_ids) == sampled(place)
    ]  # fmt: skip
    scorer = RewardScorer(whole_model(model_folder, top.model, depths_of(layers)[1]), tokenizer)
    found = scorer.score([lines[place]["prompt"] for place in same], [lines[place]["response"] for place in same])
    found = torch.as_tensor(found, dtype=torch.float64)
    own = known[same]
    slope = ((found - found.mean()) * (own - own.mean())).sum() / (found - found.mean()).square().sum()
    left = (found - found.mean()) * slope - (own - own.mean())  # gold is kept in other units
    correlation = float(torch.corrcoef(torch.stack([found, own]))[0, 1])
    return {"responses": min(limit, len(lines)), "same_tokens": len(same), "correlation": correlation,
            "largest_difference": float(left.abs().max())}  # fmt: skip


if __name__ == "__main__":
    main()
