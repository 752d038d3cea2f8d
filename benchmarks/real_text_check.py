"""A second look at gold's rewards of `real_text.py`: from text, by the package's scorer, in float32.

    python benchmarks/real_text_check.py --data DIR --model DIR --output runs/real-text --limit 64

Responses of best-of-n are decoded to text, rendered and encoded anew for `RewardScorer`, which has loaded gold's
folder, and their rewards are compared with the stored ones.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

import real_text_texts
from inform_rm import InfoRMForSequenceClassification
from inform_rm.data.encoding import encode
from inform_rm.scoring.scorer import RewardScorer
from real_text_gold import UNITS, gold_rewards
from real_text_texts import read_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=64)
    arguments = parser.parse_args()
    sizes = real_text_texts.Sizes()
    print(json.dumps(compare(arguments.output, arguments.model, arguments.data, sizes, arguments.limit), indent=2))


def compare(folder: Path, model: Path, data: Path, sizes: Any, limit: int) -> dict[str, Any]:
    """How far both rewards of a response are apart, in standard deviations, where its text gives the same tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = real_text_texts.Texts(data, tokenizer, sizes)
    asked = texts.prompts("attack")
    scorer = RewardScorer(InfoRMForSequenceClassification.from_pretrained(folder / "gold" / "model"), tokenizer)
    rows, stored, units = read_rows(folder, "attack"), gold_rewards(folder, "attack"), gold_rewards(folder, UNITS)
    same, prompts, responses = [], [], []
    places = np.random.default_rng(0).permutation(len(stored))[:limit].tolist()
    for place in places:
        prompt, ids = asked[int(rows.prompts[place])], rows.ids[place, : rows.lengths[place]].tolist()
        response = tokenizer.decode(ids[rows.prompt_lengths[place] : -1])
        if list(encode(tokenizer, prompt, response).input_ids) == ids:
            same.append(place)
            prompts.append(prompt)
            responses.append(response)
    found = (torch.as_tensor(scorer.score(prompts, responses), dtype=torch.float64) - units[0]) / units[1]
    other = stored[same]
    return {
        "responses": len(places), "same_tokens": len(same),
        "correlation": float(torch.corrcoef(torch.stack([found, other]))[0, 1]),
        "largest_difference": float((found - other).abs().max()),
    }  # fmt: skip


if __name__ == "__main__":
    main()
