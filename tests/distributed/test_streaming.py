"""Streaming with two CPU processes under DDP, launched as users launch it."""

import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inform_rm.training.reward_arguments import arguments_from_mapping
from inform_rm.training.run import train

pytestmark = pytest.mark.distributed

# Put in the processes through sitecustomize: each says which tokens it learns from, in order.
PATCH = """
import itertools
import json
from inform_rm.training.trainer import RewardTrainer

step = RewardTrainer.training_step

def told(self, model, inputs, *args):
    with open(f"{self.args.output_dir}/batches-{self.args.process_index}.jsonl", "a") as file:
        print(json.dumps([inputs["input_ids"].tolist(), inputs["attention_mask"].sum(1).tolist()]), file=file)
    return step(self, model, inputs, *args)

RewardTrainer.training_step = told
"""


def rows_of(path):
    """The token ids of both sides of each pair, batch by batch."""
    batches = []
    for line in path.open():
        ids, lengths = json.loads(line)
        sides = [tuple(row[:length]) for row, length in zip(ids, lengths, strict=True)]
        half = len(sides) // 2
        batches.append(list(zip(sides[:half], sides[half:], strict=True)))
    return batches


def test_two_processes_share_a_pass_of_uneven_files_and_train_as_one(settings, tmp_path, launcher):
    folder = tmp_path / "data"
    folder.mkdir()
    numbers = iter(range(32))
    for part, size in enumerate((21, 1, 10)):
        rows = [
            {"prompt": f"Count to {n}.", "chosen": "one two " * (n % 4 + 1), "rejected": "no " * (n % 3 + 1)}
            for n in itertools.islice(numbers, size)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"part-{part}.parquet", row_group_size=6)
    made = settings(
        data=[str(folder)], streaming=True, shuffle_buffer=8, max_steps=5, save_steps=4, batching="padded",
        dataloader_num_workers=1,
    )  # fmt: skip
    launcher.train_all([made], "ddp", PATCH)
    two = json.loads((tmp_path / "two" / "train_result.json").read_text())
    assert (two["distributed_type"], two["num_processes"]) == ("MULTI_CPU", 2)
    # Four steps of two batches of four are one pass over the 32 pairs; the fifth begins the second one.
    assert (two["train_pairs"]["pairs"], two["train_pairs"]["passes"]) == (40, 2)
    first, second = (rows_of(tmp_path / "two" / f"batches-{rank}.jsonl") for rank in (0, 1))
    one_pass = [pair for batch in first[:4] + second[:4] for pair in batch]
    assert len(first) == len(second) == 5 and len(one_pass) == len(set(one_pass)) == 32
    states = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("two/checkpoints/*-5/stream_*"))]
    assert [state["counts"]["pairs"] for state in states] == [20, 20]

    # Batches of eight in one process are those of four in both.
    alone = made | {"gradient_accumulation_steps": 2, "output_dir": str(tmp_path / "one")}
    one = train(arguments_from_mapping(alone, "test"))
    for name in ("loss", "accuracy", "grad_norm"):
        here, there = ([line[name] for line in r["log_history"] if "loss" in line] for r in (one, two))
        assert there == pytest.approx(here, abs=1e-4), name
