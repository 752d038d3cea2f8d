"""CPU time of an update of prioritized training, by part.

    python benchmarks/selection_time.py --model MODEL --data PAIRS --steps 4 --set objective=prioritized num_prompts=4

``--set`` are settings of training. Prints milliseconds a step; ``docs/results/prioritized.md`` shows them.
"""

import argparse
import functools
import tempfile
import time
from collections import Counter
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    arguments = parser.parse_args()

    import yaml
    from transformers import Trainer

    from inform_rm import train
    from inform_rm.decomposition import gap_grid
    from inform_rm.scoring.scorer import RewardScorer
    from inform_rm.training import prioritized
    from inform_rm.training.loop import RewardLoop
    from inform_rm.training.reward_arguments import arguments_from_mapping

    spent: Counter[str] = Counter()
    parts: list[tuple[Any, str, str]] = [
        (RewardScorer, "_packed_forward", "forward passes of selection"),
        (gap_grid, "encode_each", "encoding of the cells"),
        (prioritized, "decompose_gaps", "root D2"),
        (prioritized.PoolSelector, "batch", "all of selection"),
        (RewardLoop, "_forward_and_backward", "forward and backward pass of the update"),
        (Trainer, "train", "whole step"),
    ]
    for owner, name, label in parts:
        setattr(owner, name, timed(getattr(owner, name), spent, label))
    given = {name: yaml.safe_load(value) for name, value in (text.split("=", 1) for text in arguments.set)}
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "model": arguments.model, "data": [arguments.data], "output": folder, "architecture": "standard",
            "max_steps": arguments.steps, "gradient_accumulation_steps": 1, "warmup_fraction": 0.0, "use_cpu": True,
            "save_strategy": "no", "disable_tqdm": True,
        }  # fmt: skip
        train(arguments_from_mapping(settings | given, "selection_time.py"))
    for _, _, label in parts:
        print(f"{label:40} {1000 * spent[label] / arguments.steps:8.1f} ms a step")


def timed(function: Any, spent: Counter[str], label: str) -> Any:
    """A function whose CPU seconds are added to what was spent."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent[label] += time.process_time() - start

    return wrapped


if __name__ == "__main__":
    main()
