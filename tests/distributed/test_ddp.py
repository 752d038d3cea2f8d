"""Prioritized training with two CPU processes under DDP, launched as users launch it."""

import json

import pytest

from inform_rm.training.config import TrainingConfig
from inform_rm.training.run import train

pytestmark = pytest.mark.distributed

# Put in the processes through sitecustomize: each says which pairs its pools hold and which of them it learns from.
PATCH = """
import json
from inform_rm.training import prioritized

select = prioritized.PrioritizedRewardTrainer._select

def told(self, positions, wanted):
    selected = select(self, positions, wanted)
    with open(f"{self.args.output_dir}/pools-{self.args.process_index}.jsonl", "a") as file:
        gaps = [self._known_gaps[row][1] for row in positions.tolist()]
        print(json.dumps([positions.tolist(), selected.tolist(), gaps]), file=file)
    return selected

prioritized.PrioritizedRewardTrainer._select = told
"""


def test_each_process_selects_as_many_pairs_from_its_own_pools(causal_lm_dir, tmp_path, train_on_two):
    data = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"Count to {n}.", "chosen": "one two " * (n % 4 + 1), "rejected": "no " * (n % 3 + 1)}
        for n in range(32)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": str(causal_lm_dir("llama")), "data": [str(data)], "architecture": "standard", "learning_rate": 1e-3,
        "max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "logging_steps": 1,
        "save_steps": 4, "use_cpu": True, "batching": "padded", "objective": "prioritized", "num_prompts": 3,
        "warmup_fraction": 0.0, "refresh": 2, "output": str(tmp_path / "two"),
    }  # fmt: skip
    # Accelerate starts CPU processes for what it calls MULTI_GPU, and none beside the first for MULTI_CPU.
    train_on_two(settings, {"distributed_type": "MULTI_GPU"}, PATCH)
    result = json.loads((tmp_path / "two" / "train_result.json").read_text())
    assert (result["distributed_type"], result["num_processes"]) == ("MULTI_CPU", 2)
    pools = [
        [json.loads(line) for line in (tmp_path / "two" / "checkpoints" / f"pools-{rank}.jsonl").open()]
        for rank in (0, 1)
    ]
    assert len(pools[0]) == len(pools[1]) == 4
    for line, first, second in zip(result["log_history"], *pools, strict=False):
        assert len(first[0]) == len(second[0]) == 8 and not set(first[0]) & set(second[0])
        selected, left_out = [], []
        for _, places, gaps in (first, second):
            assert len(places) == 4
            selected += [gaps[place] for place in places]
            left_out += [gap for place, gap in enumerate(gaps) if place not in places]
            assert max(gaps[place] for place in places) <= min(
                gap for place, gap in enumerate(gaps) if place not in places
            )
        # The log has both processes' pools.
        assert line["prompt_free_gap_selected"] == pytest.approx(sum(selected) / 8, abs=1e-5)
        assert line["prompt_free_gap_left_out"] == pytest.approx(sum(left_out) / 8, abs=1e-5)

    # Without a choice it is the training of one process with pools as large as both.
    no_choice = {**settings, "pool_factor": 1, "output": str(tmp_path / "all")}
    train_on_two(no_choice, {"distributed_type": "MULTI_GPU"})
    two = json.loads((tmp_path / "all" / "train_result.json").read_text())
    one = train(
        TrainingConfig(**no_choice | {"data": (str(data),), "output": str(tmp_path / "one"), "objective":
                                      "bradley_terry", "per_device_train_batch_size": 8})
    )  # fmt: skip
    for name in ("loss", "accuracy", "grad_norm"):
        first, second = ([line[name] for line in r["log_history"] if "loss" in line] for r in (one, two))
        assert second == pytest.approx(first, abs=1e-4), name
