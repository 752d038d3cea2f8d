"""`evaluate_suite`: rewards computed one by one, batches, interruptions, policies, files, command line."""

import gzip
import json
import shutil
from dataclasses import replace

import pytest
import torch

from inform_rm import evaluate_suite
from inform_rm.cli import main
from inform_rm.data.encoding import encode
from inform_rm.errors import InputError
from inform_rm.eval.suites.tables import SUITES
from inform_rm.scoring.scorer import NonFiniteRewardError, RewardScorer

SWAP = SUITES["prompt-swap"]
FILES = {"items.jsonl", "sections.png", "result.md", "result.html", "result.json"}
# The part of a result that rewards decide.
FIGURES = ("score", "complete", "missing", "sections", "subsets", "counts")


@pytest.fixture
def ties_file(tmp_path):
    """RewardBench 2 rows: Ties (5 questions, tied and ref) and Math, with candidates of several lengths."""
    rows = []
    for number in range(5):
        prompt = f"Name a colour of {number} letters. " * (number + 1)
        right, wrong = ["red", "blue sky", "green grass"][: 2 + number % 2], ["one", "two three " * 3, "seven"]
        rows.append({"id": f"tied:{number}", "prompt": prompt, "chosen": right, "rejected": wrong, "subset": "Ties"})
        rows.append({"id": f"ref:{number}", "prompt": prompt, "chosen": ["rose"], "rejected": wrong, "subset": "Ties"})
        rows.append({"id": number, "prompt": f"What is {number} + 1?", "chosen": [str(number + 1)],
                     "rejected": ["one hundred", "x" * number + "y", "no"], "subset": "Math"})  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs_file(tmp_path):
    """Rows of two subsets of RewardBench with prompts of 3 to 27 words."""
    rows = [
        {"prompt": "Say it again. " * (1 + 2 * (number % 5)), "chosen": f"yes {number}",
         "rejected": "no " * (number % 4 + 1), "subset": ("hep-go", "math-prm")[number % 2], "id": number}
        for number in range(12)
    ]  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(folder):
    return [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]


def alone(model, tokenizer, prompt, response):
    ids = encode(tokenizer, prompt, response).input_ids
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits.item()


def test_rewards_are_those_of_one_at_a_time(model, tokenizer, scorer, ties_file, tmp_path):
    evaluate_suite(scorer, "rewardbench2", ties_file, tmp_path / "out", progress=False)
    rows = [json.loads(line) for line in ties_file.read_text().splitlines()]
    written = lines(tmp_path / "out")
    assert len(written) == len(rows)
    for row, item in zip(rows, written, strict=True):
        candidates = row["chosen"] + row["rejected"]
        assert item["id"] == f"{row['subset']}/{row['id']}"
        assert (item["subset"], item["section"], item["num_correct"]) == (row["subset"],) * 2 + (len(row["chosen"]),)
        assert item["characters"] == [len(text) for text in candidates]
        expected = [alone(model, tokenizer, row["prompt"], text) for text in candidates]
        assert item["rewards"] == pytest.approx(expected, abs=1e-5)
        best = max(item["rewards"])
        if row["subset"] == "Math":
            assert item["credit"] == float(item["rewards"][0] == best)
        else:
            right, wrong = item["rewards"][: item["num_correct"]], item["rewards"][item["num_correct"] :]
            assert item["credit"] == float(min(right) > max(wrong))


def test_any_batch_size_gives_the_same_result(model, tokenizer, ties_file, tmp_path):
    results = []
    for tokens in (20, 5000):
        scorer = RewardScorer(model, tokenizer, tokens_per_batch=tokens)
        results.append(evaluate_suite(scorer, "rewardbench2", ties_file, tmp_path / str(tokens), progress=False))
    for name in FIGURES:
        assert getattr(results[0], name) == getattr(results[1], name)
    for one, other in zip(lines(tmp_path / "20"), lines(tmp_path / "5000"), strict=True):
        assert one["rewards"] == pytest.approx(other["rewards"], abs=1e-5)


def test_a_prompt_is_computed_once_for_its_candidates(model, tokenizer, ties_file):
    shared, alone = (
        RewardScorer(model, tokenizer, tokens_per_batch=400, batching=kind) for kind in ("packed", "padded")
    )
    for scorer in (shared, alone):
        evaluate_suite(scorer, "rewardbench2", ties_file, progress=False)
    assert shared.tokens_computed < 0.5 * alone.tokens_computed


def test_an_interrupted_run_ends_as_an_uninterrupted_one(model, tokenizer, pairs_file, tmp_path, monkeypatch):
    scorer = RewardScorer(model, tokenizer, tokens_per_batch=60)
    whole = evaluate_suite(scorer, "rewardbench", pairs_file, tmp_path / "whole", progress=False)
    forward, calls = RewardScorer._packed_forward, []

    def breaks(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(self, *arguments)

    monkeypatch.setattr(RewardScorer, "_packed_forward", breaks)
    folder = tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt):
        evaluate_suite(scorer, "rewardbench", pairs_file, folder, progress=False)
    assert {path.name for path in folder.iterdir()} == {"rewards.partial"}
    finished = len((folder / "rewards.partial").read_text().splitlines()) - 1
    assert 0 < finished < 24
    # Another suite or other data do not go on from it.
    other = tmp_path / "other.jsonl"
    other.write_text(pairs_file.read_text().replace("yes", "yea"))
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    with pytest.raises(InputError, match="belongs to an unfinished run with other settings: data was"):
        evaluate_suite(scorer, "rewardbench", other, copy, progress=False)

    monkeypatch.setattr(RewardScorer, "_packed_forward", forward)
    computed = []
    iter_scores = RewardScorer.iter_scores

    def counted(self, sequences, *arguments):
        computed.append(len(sequences))
        return iter_scores(self, sequences, *arguments)

    monkeypatch.setattr(RewardScorer, "iter_scores", counted)
    resumed = evaluate_suite(scorer, "rewardbench", pairs_file, folder, progress=False)
    assert sum(computed) == 24 - finished
    assert resumed == whole
    assert (folder / "items.jsonl").read_bytes() == (tmp_path / "whole" / "items.jsonl").read_bytes()
    assert {path.name for path in folder.iterdir()} == FILES


def test_files_hold_the_result_and_say_what_is_missing(scorer, pairs_file, tmp_path, drawn):
    folder = tmp_path / "out"
    result = evaluate_suite(scorer, "rewardbench", pairs_file, folder, seed=3, progress=False)
    assert {path.name for path in folder.iterdir()} == FILES
    assert json.loads((folder / "result.json").read_text()) == result.to_dict()
    assert result.score is None and result.complete is False and result.sections == {}
    assert len(result.missing) == 23  # every subset of the four sections: none has its published number
    assert "Reasoning: hep-go 6 of 164 items" in result.missing
    assert {"suite", "settings", "seed", "versions", "model_fingerprint", "data", "counts"} <= result.to_dict().keys()
    assert result.seed == 3 and result.data[0]["items"] == 12
    for text in ((folder / "result.md").read_text(), (folder / "result.html").read_text()):
        assert "No score: RewardBench is incomplete here" in text
        assert "Reasoning: hep-go 6 of 164 items" in text and "math-prm" in text
    assert "<img" in (folder / "result.html").read_text() and "http" not in (folder / "result.html").read_text()
    assert (folder / "sections.png").read_bytes().startswith(b"\x89PNG")
    assert "RewardBench" in result._repr_html_() and "math-prm" in result._repr_html_()
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    assert evaluate_suite(scorer, "rewardbench", rows, progress=False).subsets == result.subsets


def test_a_whole_suite_has_a_score_everywhere(scorer, tmp_path, monkeypatch):
    small = tuple(replace(subset, items=4 * place) for place, subset in enumerate(SWAP.subsets.values(), start=1))
    monkeypatch.setitem(SUITES, "prompt-swap", replace(SWAP, sections=(replace(SWAP.sections[0], subsets=small),)))
    rows = [
        {
            "prompt": f"Say {number}.",
            "chosen": "yes",
            "rejected": "no",
            "subset": subset.name,
            "id": f"{number}/{side}",
        }
        for subset in SUITES["prompt-swap"].subsets.values()
        for number in range(subset.items // 2)
        for side in "ab"
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = evaluate_suite(scorer, "prompt-swap", tmp_path / "rows.jsonl", tmp_path / "out", progress=False)
    assert result.complete and result.missing == []
    accuracy = sum(item["credit"] for item in lines(tmp_path / "out")) / 60
    assert result.score == pytest.approx(accuracy)
    assert result.interval[0] <= accuracy <= result.interval[1]
    assert result.twins["num_twins"] == 30 and "on_hub" not in result.to_dict()  # its rows are in no data set there
    assert f"Score {accuracy:.4f}" in (tmp_path / "out" / "result.html").read_text()
    assert "30 twins right" in (tmp_path / "out" / "result.md").read_text()


def test_where_a_suites_data_set_lies_is_named():
    parts = [{"id": "ScalerLab/JudgeBench", "config": None, "split": split} for split in ("gpt", "claude")]
    assert SUITES["judgebench"].on_hub == parts and SUITES["llmbar"].on_hub is None
    assert [part["id"] for part in SUITES["rewardbench"].on_hub] == ["allenai/reward-bench"]  # prior sets are extra


def test_overlong_items_follow_the_policy(model, tokenizer, tmp_path):
    long = "Say it again and again. " * 12
    rows = [
        {"prompt": prompt, "chosen": "yes", "rejected": "no no", "subset": "hep-go", "id": number}
        for number, prompt in enumerate(["Short.", long, long + "Now."])
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(overlong, max_length=40):
        scorer = RewardScorer(model, tokenizer, max_length=max_length)
        return evaluate_suite(scorer, "rewardbench", path, tmp_path / overlong, overlong=overlong, progress=False)

    with pytest.raises(InputError, match=r"rows.jsonl, row 2: \d+ tokens, over max_length 40. Raise max_length, or"):
        run("error")
    dropped = run("drop")
    assert dropped.counts == {
        "items": 3, "overlong": 2, "dropped": 2, "truncated": 0, "evaluated": 1, "indistinguishable": 0,
        "not_as_written": 0,
    }  # fmt: skip
    assert dropped.subsets["hep-go"]["num_dropped"] == 2
    cut = run("truncate_prompt")
    assert cut.counts["truncated"] == 2 and cut.counts["evaluated"] == 3
    # The same tokens go from the left of the prompt for both candidates: what is left are the last ones.
    for row, item in zip(rows[1:], lines(tmp_path / "truncate_prompt")[1:], strict=True):
        both = [encode(tokenizer, row["prompt"], text).input_ids for text in ("yes", "no no")]
        excess = max(map(len, both)) - 40
        for ids, reward in zip(both, item["rewards"], strict=True):
            with torch.no_grad():
                expected = model(input_ids=torch.tensor([ids[excess:]])).logits.item()
            assert reward == pytest.approx(expected, abs=1e-5)
    with pytest.raises(InputError, match=r"its longer response alone takes \d+ of max_length 3 tokens"):
        run("truncate_prompt", max_length=3)
    with pytest.raises(InputError, match="max_length: 3 leaves none of the 3 items"):
        run("drop", max_length=3)
    with pytest.raises(InputError, match="overlong: got 'cut'"):
        run("cut")


def test_candidates_that_become_the_same_tokens_are_counted_as_ties(scorer, tmp_path):
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "So.", "subset": "hep-go", "id": 1}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    result = evaluate_suite(scorer, "rewardbench", tmp_path / "rows.jsonl", progress=False)
    assert result.counts["indistinguishable"] == 1
    assert result.subsets["hep-go"]["num_ties"] == 1 and result.subsets["hep-go"]["accuracy"] == 0.0
    # Beside other items, too, where equal tokens at different places of a batch may differ in the last bit.
    rows = [{**row, "id": number, "prompt": "Why? " * (number + 1)} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    half = evaluate_suite(scorer, "rewardbench", tmp_path / "rows.jsonl", ties="half", progress=False)
    assert half.subsets["hep-go"]["num_ties"] == 12
    assert half.subsets["hep-go"]["accuracy"] == 0.5 and half.settings["ties"] == "half"
    with pytest.raises(InputError, match="ties: 'half' is an option of rewardbench; hh counts a tie as wrong"):
        evaluate_suite(scorer, "hh", tmp_path / "rows.jsonl", ties="half")
    with pytest.raises(InputError, match="ties: got 'none'; expected one of wrong, half"):
        evaluate_suite(scorer, "rewardbench", tmp_path / "rows.jsonl", ties="none")


def test_a_broken_reward_names_the_candidate_and_the_item(model, tokenizer, ties_file, monkeypatch):
    scorer = RewardScorer(model, tokenizer)
    forward = RewardScorer._packed_forward
    target = encode(tokenizer, "What is 3 + 1?", "no").input_ids

    def broken(self, sequences, *arguments):
        rewards, *rest = forward(self, sequences, *arguments)
        for place, ids in enumerate(sequences):
            if list(ids) == target:
                rewards[place] = float("nan")
        return rewards, *rest

    monkeypatch.setattr(RewardScorer, "_packed_forward", broken)
    with pytest.raises(
        NonFiniteRewardError, match=r"candidate 3 \(counted from 0, correct ones first\) of item Math/3"
    ):
        evaluate_suite(scorer, "rewardbench2", ties_file, progress=False)


def test_the_command_line(model, tokenizer, pairs_file, tmp_path, capsys):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    start = ["evaluate", "--model", str(folder), "--output", str(tmp_path / "out")]
    assert main([*start, "--suite", "rewardbench", "--data", str(pairs_file), "--ties", "half"]) == 0
    assert "No score: RewardBench is incomplete here" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["suite"] == "rewardbench" and result["settings"]["ties"] == "half"
    for arguments, fault in (
        ([], "data: name the pairs with --data FILES, or a benchmark with --suite NAME"),
        (["--suite", "prompt-swap"], "prompt-swap is not on the Hub"),
        (["--suite", "hh", "--data", str(pairs_file)], "subset 'hep-go' is none of hh's"),
        (["--suite", "rewardbench", "--data", str(pairs_file), "--max-pairs", "3"], "a suite is evaluated whole"),
        (["--data", str(pairs_file), "--ties", "half"], "ties: an option of --suite rewardbench"),
    ):
        assert main([*start, *arguments]) == 2
        assert fault in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main([*start, "--suite", "rewardbench3"])
    assert stopped.value.code == 2 and "invalid choice: 'rewardbench3'" in capsys.readouterr().err


@pytest.mark.parametrize("suite", ["hh", "truthfulqa-mc", "prompt-swap", "llmbar"])
def test_real_items_from_text_to_page(suite, shared_dir, scorer, tmp_path):
    """The first rows of each subset, through a tiny model: incomplete, and nothing in them is refused."""
    folder = {"hh": "hh-rlhf", "truthfulqa-mc": "truthfulqa"}.get(suite, suite)
    rows = [json.loads(line) for line in gzip.open(shared_dir / "data" / folder / "test.jsonl.gz")]
    seen = {}
    kept = [row for row in rows if seen.setdefault(row["subset"], []).append(1) or len(seen[row["subset"]]) <= 2]
    path = tmp_path / "part.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    result = evaluate_suite(scorer.model, suite, path, tmp_path / "out", tokenizer=scorer.tokenizer,
                            max_length=4000, progress=False)  # fmt: skip
    assert result.score is None and result.counts["evaluated"] == len(kept)
    assert sum(part["num_items"] for part in result.subsets.values()) == len(kept)
