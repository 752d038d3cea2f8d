"""`evaluate`, `decompose` and `score` on two processes: one set of files, that of one process, and no race."""

import json

import pyarrow.parquet as pq
import pytest

from inform_rm.eval.decompose import decompose
from inform_rm.eval.evaluate import evaluate
from inform_rm.scoring.score_files import score_file
from inform_rm.scoring.scorer import RewardScorer

pytestmark = pytest.mark.distributed

TOKENS = 300  # per batch: some ten batches, so that both processes have several

# Every command in one launch, in turn; like `inform-rm`, which each of them is.
ALL = """
import sys
from inform_rm.cli import main
from inform_rm.util.processes import is_main_process

for line in open(sys.argv[1]):
    code = main(line.split())
    assert code == 0, (code, line)
"""


def _without(result, *names):
    return {name: value for name, value in result.items() if name not in names}


def _assert_close(first, second, path=""):
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for name in first:
            _assert_close(first[name], second[name], f"{path}/{name}")
    elif isinstance(first, list):
        assert len(first) == len(second), path
        for number, pair in enumerate(zip(first, second, strict=True)):
            _assert_close(*pair, f"{path}/{number}")
    elif isinstance(first, float):
        assert second == pytest.approx(first, abs=1e-6), path
    else:
        assert first == second, path


def test_two_processes_give_the_results_of_one(model, pairs_file, causal_lm_dir, launcher, tmp_path, count_passes):
    data = pairs_file(61)
    rows = tmp_path / "rows.jsonl"
    pairs = [json.loads(line) for line in open(data)]
    rows.write_text("".join(json.dumps({"prompt": p["prompt"], "response": p["chosen"]}) + "\n" for p in pairs))
    common = f"--model {model} --tokens-per-batch {TOKENS}"
    commands = [
        f"evaluate {common} --data {data} --output {tmp_path}/evaluate",
        f"decompose {common} --data {data} --output {tmp_path}/decompose --num-prompts 3",
        f"decompose {common} --data {data} --output {tmp_path}/behavior --num-prompts 3 "
        f"--behavior-model {causal_lm_dir('llama')}",
        f"score {common} --input {rows} --output {tmp_path}/scores.jsonl --uncertainty 4",
    ]
    (tmp_path / "commands").write_text("\n".join(commands))
    (tmp_path / "all.py").write_text(ALL)
    out, _ = launcher.run([tmp_path / "all.py", tmp_path / "commands"], "ddp", count_passes)

    scorer = RewardScorer(model, tokens_per_batch=TOKENS)
    one = evaluate(scorer, data, tmp_path / "one", progress=False)
    two = json.loads((tmp_path / "evaluate" / "result.json").read_text())
    _assert_close(one.to_dict(), two)
    assert (tmp_path / "evaluate" / "pairs.jsonl").read_text() == (tmp_path / "one" / "pairs.jsonl").read_text()
    assert {path.name for path in (tmp_path / "evaluate").iterdir()} == {
        path.name for path in (tmp_path / "one").iterdir()
    }
    score_file(scorer, rows, tmp_path / "one.jsonl", uncertainty=4, progress=False)
    assert (tmp_path / "scores.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()
    assert not list(tmp_path.glob("scores.jsonl.*"))
    for name, options in {
        "decompose": {}, "behavior": {"weights": "behavior", "behavior_model": str(causal_lm_dir("llama"))}
    }.items():  # fmt: skip
        one = decompose(scorer, data, tmp_path / f"one-{name}", num_prompts=3, progress=False, **options)
        _assert_close(one.to_dict(), json.loads((tmp_path / name / "result.json").read_text()))
        tables = [pq.read_table(tmp_path / folder / "pairs.parquet") for folder in (name, f"one-{name}")]
        _assert_close(tables[1].to_pydict(), tables[0].to_pydict())
        assert {path.name for path in (tmp_path / name).iterdir()} == {
            path.name for path in (tmp_path / f"one-{name}").iterdir()
        }
    # The work was divided: each made half of the passes of one process.
    passes = [int(line.split()[1]) for line in out.splitlines() if line.startswith("PASSES")]
    assert len(passes) == 2 and passes[0] == passes[1] > 20


def test_errors_on_one_process_end_both_and_finished_work_is_taken_up(
    model, pairs_file, launcher, tmp_path, count_passes
):
    data = pairs_file(61)
    folder = tmp_path / "out"
    arguments = ["evaluate", "--model", model, "--tokens-per-batch", TOKENS, "--data", data, "--output", folder]
    # The second process's model breaks down after some batches.
    patch = """
import os
before = scoring.RewardScorer._packed_forward
def breaks(self, *arguments):
    if os.environ["RANK"] == "1" and passes[0] == 3:
        raise RuntimeError("out of luck")
    return before(self, *arguments)
scoring.RewardScorer._packed_forward = breaks
"""
    _, err = launcher.cli(arguments, patch=count_passes + patch, fails=True)
    assert "error: RuntimeError: out of luck" in err
    assert "error: RuntimeError: process 1: RuntimeError: out of luck" in err
    assert {path.name for path in folder.iterdir()} == {"rewards.partial"}
    finished = len((folder / "rewards.partial").read_text().splitlines()) - 1
    assert 0 < finished < 122
    # One process goes on where two stopped.
    scorer = RewardScorer(model, tokens_per_batch=TOKENS)
    result = evaluate(scorer, data, folder, progress=False)
    whole = evaluate(scorer, data, tmp_path / "whole", progress=False)
    _assert_close(whole.to_dict(), result.to_dict())
    assert not (folder / "rewards.partial").exists()


def test_what_cannot_be_shared_is_refused(model, pairs_file, launcher, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    commands = [
        ["detect", "--model", model, "--reference", rows, "--candidate", rows, "--output", out],
        ["evaluate", "--model", model, "--data", pairs_file(4), "--output", out, "--device", "cuda:0"],
    ]
    (tmp_path / "commands.json").write_text(json.dumps([[str(part) for part in command] for command in commands]))
    (tmp_path / "all.py").write_text(
        "import json, sys\nfrom inform_rm.cli import main\n"
        "assert [main(command) for command in json.load(open(sys.argv[1]))] == [2, 2]"
    )
    _, err = launcher.run([tmp_path / "all.py", tmp_path / "commands.json"], "ddp")
    assert err.count("start it without accelerate launch") == 2
    assert err.count("device: 'cuda:0' with 2 processes") == 2
    assert not out.exists() or not list(out.iterdir())
