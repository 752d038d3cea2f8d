"""Pairwise statistics against plain loops; `evaluate` against rewards computed one by one, and after interruptions."""

import gzip
import json
import math

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from inform_rm import InfoRMConfig, InfoRMForSequenceClassification, evaluate
from inform_rm.data.encoding import encode
from inform_rm.errors import InputError
from inform_rm.eval.accuracy import pairwise_accuracy, reliability_bins
from inform_rm.scoring.scorer import NonFiniteRewardError, RewardScorer
from inform_rm.util.intervals import expected_calibration_error, wilson_interval

REWARDS = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e4, 1e4, width=32))
PAIRS = st.lists(
    st.tuples(REWARDS, REWARDS, st.sampled_from("abc"), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=40
)


def counted(pairs):
    """The statistics by counting with plain Python."""
    right = sum(chosen > rejected for chosen, rejected, *_ in pairs)
    ties = sum(chosen == rejected for chosen, rejected, *_ in pairs)
    return {
        "num_pairs": len(pairs),
        "num_ties": ties,
        "accuracy": (right + ties / 2) / len(pairs),
        "accuracy_ties_wrong": right / len(pairs),
        "mean_margin": math.fsum(chosen - rejected for chosen, rejected, *_ in pairs) / len(pairs),
    }


def assert_counts(block, pairs):
    for key, value in counted(pairs).items():
        assert block[key] == pytest.approx(value, abs=1e-9), key
    for kind in ("accuracy", "accuracy_ties_wrong"):
        low, high = block[f"{kind}_interval"]
        assert (low, high) == wilson_interval(block[kind] * len(pairs), len(pairs))
        assert low <= block[kind] <= high


@settings(max_examples=40)
@given(PAIRS)
def test_statistics_equal_counting_and_parts_add_up(pairs):
    chosen, rejected, subsets, chosen_lengths, rejected_lengths = map(list, zip(*pairs, strict=True))
    result = pairwise_accuracy(chosen, rejected, subsets, chosen_lengths, rejected_lengths)
    json.dumps(result, allow_nan=False)
    assert_counts(result, pairs)
    assert set(result["subsets"]) == set(subsets)
    for name, block in result["subsets"].items():
        assert_counts(block, [pair for pair in pairs if pair[2] == name])
    is_part = {
        "chosen_longer": lambda pair: pair[3] > pair[4],
        "chosen_shorter": lambda pair: pair[3] < pair[4],
        "same_length": lambda pair: pair[3] == pair[4],
    }
    for name, belongs in is_part.items():
        members = [pair for pair in pairs if belongs(pair)]
        assert (name in result["by_length"]) == bool(members)  # what was not measured is absent
        if members:
            assert_counts(result["by_length"][name], members)
    lengths_as_rewards = [(pair[3], pair[4]) for pair in pairs]
    assert result["longer_wins_accuracy"] == pytest.approx(counted(lengths_as_rewards)["accuracy"])
    for parts in (result["subsets"], result["by_length"]):
        for key in ("num_pairs", "num_ties"):
            assert sum(block[key] for block in parts.values()) == result[key]


@settings(max_examples=40)
@given(PAIRS)
def test_swapping_the_sides_turns_the_accuracy_over(pairs):
    chosen, rejected = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    forward, backward = pairwise_accuracy(chosen, rejected), pairwise_accuracy(rejected, chosen)
    assert forward["accuracy"] + backward["accuracy"] == pytest.approx(1.0)
    total = forward["accuracy_ties_wrong"] + backward["accuracy_ties_wrong"] + forward["num_ties"] / len(pairs)
    assert total == pytest.approx(1.0)


def test_tie_conventions():
    result = pairwise_accuracy([1.0, 0.0, 2.0, 5.0], [1.0, 0.0, 2.0, 4.0])
    assert (result["accuracy"], result["accuracy_ties_wrong"], result["num_ties"]) == (0.625, 0.25, 3)


def test_a_difference_of_one_float32_step_is_no_tie():
    one = torch.tensor([1.0])
    above = torch.nextafter(one, torch.tensor(2.0))
    assert pairwise_accuracy(above, one)["num_ties"] == 0
    assert pairwise_accuracy(above, one)["accuracy"] == 1.0


def test_what_was_not_given_is_absent():
    assert {"subsets", "by_length", "longer_wins_accuracy"}.isdisjoint(pairwise_accuracy([1.0], [0.0]))


@settings(max_examples=40)
@given(st.lists(st.floats(-800, 800), min_size=1, max_size=60), st.integers(1, 15))
def test_reliability_bins_hold_every_pair_once_and_give_the_calibration_error(margins, num_bins):
    table = reliability_bins(margins, num_bins)
    assert sum(part["num_pairs"] for part in table) == len(margins)
    assert [part["low"] for part in table] == sorted({part["low"] for part in table})
    error = sum(part["num_pairs"] * abs(part["accuracy"] - part["mean_confidence"]) for part in table) / len(margins)
    assert error == pytest.approx(expected_calibration_error(margins, num_bins), abs=1e-9)
    for part in table:
        assert part["low"] - 1e-12 <= part["mean_confidence"] <= part["high"] + 1e-12
        inside = [m for m in margins if part["low"] <= 1 / (1 + math.exp(-abs(m))) < part["high"]]
        if part["high"] < 1:
            assert part["num_pairs"] == pytest.approx(len(inside), abs=1)  # 1: a margin on the edge of two bins


def test_a_calibrated_model_has_a_small_calibration_error_and_an_overconfident_one_a_large():
    generator = np.random.default_rng(0)
    size = np.abs(generator.normal(0, 2, 40_000))
    margins = np.where(generator.random(40_000) < 1 / (1 + np.exp(-size)), size, -size)
    assert pairwise_accuracy(margins, 0 * margins)["calibration"]["expected_calibration_error"] < 0.01
    assert pairwise_accuracy(8 * margins, 0 * margins)["calibration"]["expected_calibration_error"] > 0.15


# --- evaluate


def pair(index):
    return {
        "prompt": "Name a colour and a fruit, please." if index % 3 else "How many apples are in the basket?",
        "chosen": f"The sky is blue {index}." + " Seven apples are in the basket." * (index % 2),
        "rejected": f"Roses are red {index}, but the sea is calm.",
        "subset": ("sky", "sea")[index % 2],
        "id": f"pair-{index}",
    }


def write_pairs(path, pairs):
    path.write_text("".join(json.dumps(item) + "\n" for item in pairs), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl", [pair(index) for index in range(24)])


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def single_reward(model, tokenizer, prompt, response):
    ids = encode(tokenizer, prompt, response).input_ids
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits.item()


def test_result_follows_from_rewards_computed_one_by_one(model, tokenizer, data, tmp_path):
    output = tmp_path / "out"
    result = evaluate(model, data, output, tokenizer=tokenizer, tokens_per_batch=150, progress=False)
    rewards = [
        [single_reward(model, tokenizer, pair(index)["prompt"], pair(index)[side]) for side in ("chosen", "rejected")]
        for index in range(24)
    ]
    written = read_jsonl(output / "pairs.jsonl")
    assert [item["id"] for item in written] == [f"pair-{index}" for index in range(24)]
    assert [item["subset"] for item in written] == [pair(index)["subset"] for index in range(24)]
    for item, (chosen, rejected) in zip(written, rewards, strict=True):
        assert item["chosen_reward"] == pytest.approx(chosen, abs=1e-5)
        assert item["rejected_reward"] == pytest.approx(rejected, abs=1e-5)
    right = sum(chosen > rejected for chosen, rejected in rewards)
    assert 0 < right < 24 and result.accuracy == right / 24
    assert {name: block["num_pairs"] for name, block in result.subsets.items()} == {"sea": 12, "sky": 12}
    longer = sum(len(pair(index)["chosen"]) > len(pair(index)["rejected"]) for index in range(24))
    assert result.by_length["chosen_longer"]["num_pairs"] == longer

    assert json.loads((output / "result.json").read_text()) == result.to_dict()
    assert sorted(path.name for path in output.iterdir()) == [
        "pairs.jsonl", "reliability.png", "result.html", "result.json", "result.md",
    ]  # fmt: skip
    assert result.versions["torch"] == torch.__version__ or result.versions["torch"] in torch.__version__
    assert len(result.model_fingerprint) == len(result.tokenizer_fingerprint) == 64
    assert result.seed == 0 and result.settings["max_length"] == 128 and result.settings["dtype"] == "float32"
    (source,) = result.data
    counts = {"pairs_read": 24, "not_sampled": 0, "overlong": 0, "dropped": 0, "truncated": 0, "bad_rows": 0}
    named = {"source": str(data), "is_local": True, "fingerprint": source["fingerprint"], "reading": source["reading"]}
    assert list(source["reading"]["columns"]) == ["prompt", "chosen", "rejected", "subset", "id"]
    assert source == {**named, **counts, "evaluated": 24, "not_as_written": {"n": 0, "examples": []}}


def test_a_model_that_ignores_the_prompt_scores_half_on_swapped_prompts(scorer, model, tokenizer, tmp_path):
    # The same two responses under two prompts with opposite preference, and a "model" that sees the responses only.
    pairs = []
    for index in range(10):
        one, other = f"It is {index}.", f"There are {index} apples."
        pairs += [
            {"prompt": "What is it?", "chosen": one, "rejected": other},
            {"prompt": "How many apples?", "chosen": other, "rejected": one},
        ]
    data = write_pairs(tmp_path / "swap.jsonl", pairs)
    blind = RewardScorer(model, tokenizer)
    iter_scores = blind.iter_scores
    start = {prompt: len(encode(tokenizer, prompt, "x").prompt_ids) for prompt in ("What is it?", "How many apples?")}

    def without_prompt(sequences, prompt_lengths):
        assert len(sequences) == 40
        prompt_of = [("What is it?", "How many apples?")[place // 2 % 2] for place in range(40)]
        return iter_scores([ids[start[prompt] :] for ids, prompt in zip(sequences, prompt_of, strict=True)])

    blind.iter_scores = without_prompt
    assert evaluate(blind, data, progress=False).accuracy == 0.5


def test_rows_in_memory_give_the_result_of_their_file(scorer, data):
    rows = read_jsonl(data)
    file = evaluate(scorer, data, progress=False).to_dict()
    for source in (rows, Dataset.from_list(rows), DatasetDict(test=Dataset.from_list(rows))):
        result = evaluate(scorer, source, progress=False)
        found = result.to_dict()
        name = f"{type(source).__name__} in memory"
        assert found["settings"].pop("data") == [name]
        expected = {**file, "settings": {**file["settings"]}, "data": [{**file["data"][0], "source": name}]}
        assert expected["settings"].pop("data") == [str(data)] and found == expected
    half = evaluate(scorer, [rows[:10], rows[10:]], progress=False)
    assert [part["source"] for part in half.data] == ["list in memory 1", "list in memory 2"]
    assert half.accuracy == result.accuracy


def test_a_result_shows_its_table_and_its_drawing_and_text_from_data_stays_text(scorer, data, tmp_path):
    rows = [{**row, "subset": "<script>x</script>"} for row in read_jsonl(data)]
    result = evaluate(scorer, rows, tmp_path / "out", progress=False)
    shown = result._repr_html_()
    assert shown.count("<table>") == 1 and f"<td>{result.accuracy:.3f}</td>" in shown and "Accuracy of" in shown
    assert "<script>" not in shown and "&lt;script&gt;x&lt;/script&gt;" in shown
    assert isinstance(result.figure(), Figure)
    assert result.page().markdown() == (tmp_path / "out/result.md").read_text()
    assert result.rows == read_jsonl(tmp_path / "out/pairs.jsonl")


def test_evaluation_without_output_writes_nothing(scorer, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    evaluate(scorer, data, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_several_sources_are_counted_apart_and_evaluated_together(scorer, tmp_path):
    first = write_pairs(tmp_path / "first.jsonl", [pair(index) for index in range(8)])
    second = tmp_path / "second.jsonl.gz"
    second.write_bytes(gzip.compress("".join(json.dumps(pair(index)) + "\n" for index in range(8, 24)).encode()))
    both = evaluate(scorer, [first, second], progress=False)
    whole = write_pairs(tmp_path / "whole.jsonl", [pair(index) for index in range(24)])
    together = evaluate(scorer, whole, progress=False)
    assert [source["evaluated"] for source in both.data] == [8, 16]
    for key in ("num_pairs", "accuracy", "num_ties", "longer_wins_accuracy"):
        assert getattr(both, key) == getattr(together, key)
    assert [row["source"] for row in both.rows] == [str(first)] * 8 + [str(second)] * 16
    assert [row["id"] for row in both.rows] == [f"pair-{index}" for index in range(24)]


def test_a_sample_is_seeded_and_counted(scorer, data):
    def sampled(seed):
        result = evaluate(scorer, data, max_pairs=10, seed=seed, progress=False)
        assert result.data[0]["not_sampled"] == 14 and result.num_pairs == 10 and result.seed == seed
        return [row["id"] for row in result.rows]

    first = sampled(1)
    assert first == sampled(1) and set(first) != set(sampled(2)) and len(set(first)) == 10


def test_left_out_pairs_are_counted_and_bad_rows_listed(scorer, tmp_path, caplog):
    pairs = [pair(index) for index in range(6)]
    pairs[1]["rejected"] = pairs[1]["chosen"]
    pairs[4]["prompt"] = "Long " * 150
    data = write_pairs(tmp_path / "pairs.jsonl", pairs)
    with pytest.raises(InputError, match="row 2"):
        evaluate(scorer, data, progress=False)
    skipped = evaluate(scorer, data, on_bad_row="skip", progress=False)
    assert (skipped.data[0]["bad_rows"], skipped.data[0]["overlong"], skipped.num_pairs) == (2, 1, 4)
    assert "row 2" in skipped.data[0]["bad_row_reasons"][0] and "row 5" in skipped.data[0]["bad_row_reasons"][1]
    dropped = evaluate(scorer, data, on_bad_row="skip", overlong="drop", progress=False)
    (source,) = dropped.data
    assert (source["bad_rows"], source["overlong"], source["dropped"], source["truncated"]) == (1, 1, 1, 0)
    assert source["pairs_read"] == 5 and source["evaluated"] == dropped.num_pairs == 4
    assert "row 2" in source["bad_row_reasons"][0]
    assert any("dropped 1, bad_rows 1" in message for message in caplog.messages)
    cut = evaluate(scorer, data, on_bad_row="skip", overlong="truncate_prompt", progress=False)
    assert cut.data[0]["truncated"] == 1 and cut.num_pairs == 5
    write_pairs(data, pairs[2:])
    with pytest.raises(InputError, match=r"row 3.*128.*on_bad_row='skip'"):
        evaluate(scorer, data, progress=False)


@pytest.mark.parametrize("fail_at", (0, 5))
def test_interrupted_evaluation_computes_no_reward_twice(scorer, data, tmp_path, fail_at):
    whole = evaluate(scorer, data, tmp_path / "whole", progress=False)
    seen, limit = [], fail_at

    def count(module, args, kwargs):
        if limit is not None and len(seen) == limit:
            raise KeyboardInterrupt
        seen.append(len(kwargs["pooled_positions"]))

    handle = scorer.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        with pytest.raises(KeyboardInterrupt):
            evaluate(scorer, data, tmp_path / "out", progress=False)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["rewards.partial"]
        limit = None
        resumed = evaluate(scorer, data, tmp_path / "out", progress=False)
    finally:
        handle.remove()
    assert sum(seen) == 48  # each of 24 pairs twice, none of them again
    assert not (tmp_path / "out" / "rewards.partial").exists()
    for one, other in zip(
        read_jsonl(tmp_path / "whole/pairs.jsonl"), read_jsonl(tmp_path / "out/pairs.jsonl"), strict=True
    ):
        assert other == {**one, **{key: pytest.approx(one[key], abs=1e-5) for key in one if key.endswith("_reward")}}
    assert resumed.accuracy == whole.accuracy and resumed.data == whole.data


def test_resuming_refuses_other_data_or_settings(scorer, data, tmp_path):
    handle = scorer.model.register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            evaluate(scorer, data, tmp_path / "out", progress=False)
    finally:
        handle.remove()
    with pytest.raises(InputError, match=r"other settings: .*max_pairs"):
        evaluate(scorer, data, tmp_path / "out", max_pairs=5, progress=False)
    write_pairs(data, [pair(index) for index in range(23)])
    with pytest.raises(InputError, match="other settings: data was"):
        evaluate(scorer, data, tmp_path / "out", progress=False)


def test_a_finished_result_survives_a_later_run_that_fails(scorer, data, tmp_path):
    evaluate(scorer, data, tmp_path / "out", progress=False)
    before = (tmp_path / "out/result.json").read_bytes()
    handle = scorer.model.register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            evaluate(scorer, data, tmp_path / "out", progress=False)
    finally:
        handle.remove()
    assert (tmp_path / "out/result.json").read_bytes() == before


def test_a_reward_that_is_not_finite_names_the_pair_and_side(backbone_configs, tokenizer, tmp_path):
    broken = InfoRMForSequenceClassification(InfoRMConfig(text_config=backbone_configs["llama"], latent_dim=8)).eval()
    with torch.no_grad():
        broken.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("~")] = float("nan")
    pairs = [pair(index) for index in range(4)]
    pairs[2]["rejected"] = "a ~ b"
    data = write_pairs(tmp_path / "pairs.jsonl", pairs)
    with pytest.raises(NonFiniteRewardError, match="the rejected response of pair pair-2 has the reward nan"):
        evaluate(broken, data, tmp_path / "out", tokenizer=tokenizer, progress=False)
    assert not (tmp_path / "out" / "result.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": []}, "at least one source"),
        ({"data": "absent.jsonl"}, "absent.jsonl"),
        ({"max_pairs": 0}, "max_pairs: 0"),
        ({"max_pairs": "9"}, "max_pairs: '9'"),
        ({"overlong": "cut"}, "overlong"),
        ({"on_bad_row": "ignore"}, "on_bad_row"),
        ({"max_length": 9}, "Set them on the scorer"),
        ({"max_pair": 9}, "max_pair: no setting of this name; expected one of batching, .*max_pairs"),
        ({"output": __file__}, "is a file"),
    ],
)
def test_wrong_arguments_of_evaluate_are_refused(scorer, data, options, message):
    with pytest.raises(InputError, match=message):
        evaluate(**{"model": scorer, "data": data, "progress": False, **options})


def test_a_loaded_model_without_tokenizer_is_refused(model, data):
    with pytest.raises(InputError, match="Pass tokenizer"):
        evaluate(model, data, progress=False)


def test_progress_bars_are_shown_where_they_are_asked_for_alone(scorer, data, capsys):
    datasets.enable_progress_bars()  # a command that ran in this process may have turned them off
    evaluate(scorer, data)
    shown = capsys.readouterr().err
    assert "48/48" in shown and "response/s" in shown and "Encoding pairs" in shown
    evaluate(scorer, data, progress=False)
    assert capsys.readouterr().err == ""
    assert not datasets.are_progress_bars_disabled()  # for others' data sets they are as before


@pytest.mark.slow
def test_real_data_with_a_real_backbone(shared_dir, tmp_path):
    model = InfoRMForSequenceClassification.from_backbone(str(shared_dir / "models/stories260K"))
    model.save_pretrained(tmp_path / "model")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(shared_dir / "models/stories260K").save_pretrained(tmp_path / "model")
    data = shared_dir / "data/prompt-swap/test.jsonl.gz"
    result = evaluate(tmp_path / "model", data, chat_template="plain", overlong="drop", max_pairs=15, progress=False)
    (source,) = result.data
    assert source["pairs_read"] == 1352 and result.num_pairs + source["dropped"] == 15
    assert sum(block["num_pairs"] for block in result.subsets.values()) == result.num_pairs
