"""A benchmark suite on two processes gives the files of one."""

import json

import pytest

from inform_rm import evaluate_suite
from inform_rm.scoring.scorer import RewardScorer

pytestmark = pytest.mark.distributed

TOKENS = 200  # per batch: several batches for each process


def test_two_processes_give_the_suite_of_one(model, launcher, count_passes, tmp_path):
    rows = []
    for number in range(20):
        wrong = ["two", "three " * (number % 3 + 1), "x" * (number % 5 + 1) + "y"]
        rows.append({"id": number, "prompt": f"Count to {number}.", "chosen": ["one"], "rejected": wrong,
                     "subset": "Math"})  # fmt: skip
        for kind, right in (("tied", ["red", "blue"]), ("ref", ["rose"])):
            rows.append({"id": f"{kind}:{number}", "prompt": f"Name {number}.", "chosen": right, "rejected": wrong,
                         "subset": "Ties"})  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    arguments = ["evaluate", "--model", model, "--suite", "rewardbench2", "--data", data, "--tokens-per-batch", TOKENS]
    out, _ = launcher.cli([*arguments, "--output", tmp_path / "two"], patch=count_passes)
    one = evaluate_suite(
        RewardScorer(model, tokens_per_batch=TOKENS), "rewardbench2", data, tmp_path / "one", progress=False
    )
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert two == one.to_dict()  # the same batches give the same bits
    assert (tmp_path / "two" / "items.jsonl").read_bytes() == (tmp_path / "one" / "items.jsonl").read_bytes()
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    assert out.count("No score: RewardBench 2 is incomplete here") == 1  # one of the two says so
    passes = [int(line.split()[1]) for line in out.splitlines() if line.startswith("PASSES")]
    assert len(passes) == 2 and passes[0] == passes[1] > 3
