import copy
import json
from pathlib import Path

import numpy as np
import pytest
from datasets import disable_progress_bars
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors

from inform_rm.data.check_data import check_data, write_report
from inform_rm.data.check_data_text import format_report
from inform_rm.data.encoding import encode, encode_pairs
from inform_rm.data.pairs import BadRow
from inform_rm.data.preferences import load_preferences
from inform_rm.errors import InputError
from inform_rm.util.intervals import wilson_interval


@pytest.fixture(autouse=True)
def quiet():
    """No progress bars between the test results."""
    disable_progress_bars()


def pair(prompt="Name a colour.", chosen="Blue.", rejected="A car.", **fields):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **fields}


def write(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def check_one(path: Path, rows: list, *arguments, **options) -> dict:
    return check_data(write(path, rows), *arguments, **options)["sources"][0]


def test_rows_bad_rows_and_subsets_are_counted(tmp_path):
    rows = [
        pair(),
        pair(chosen=""),
        "{broken",
        pair(rejected="Blue."),
        pair("Two?", margin=1),
        pair("Three?", subset="x"),
    ]
    report = check_one(tmp_path / "a.jsonl", rows)
    assert (report["rows"], report["pairs"], report["margins"], report["prompts"]) == (6, 3, 1, 3)
    assert report["subsets"] == {"a": 2, "x": 1}
    assert report["bad_rows"]["n"] == 3 and report["identical_sides"] == 1
    assert report["bad_rows"]["by_kind"] == {"empty field": 1, "identical sides": 1, "unreadable": 1}
    assert [bad["row"] for bad in report["bad_rows"]["rows"]] == [2, 3, 4]
    assert "'chosen' is empty" in report["bad_rows"]["rows"][0]["reason"]
    assert report["fingerprint"] == load_preferences(tmp_path / "a.jsonl", on_bad_row="skip").fingerprint


def test_duplicates_and_conflicts_are_told_apart(tmp_path):
    rows = [
        pair("a?"),  # 1
        pair("a?"),  # 2 repeats 1
        pair("b?", "yes", "no"),  # 3
        pair("b?", "no", "yes"),  # 4 contradicts 3
        pair("c?", "no", "yes"),  # another prompt: no conflict
        pair("b?", "no", "perhaps"),  # another response: no conflict
        pair("a?"),  # 7 repeats 1
        pair("d?", "one", "two", margin=2, id="m"),  # 8
        pair("d?", "one", "two", margin=3, id="n"),  # 9 repeats 8 with another margin
    ]
    report = check_one(tmp_path / "a.jsonl", rows)
    assert report["duplicates"] == {"n": 3, "examples": [2, 7, 9]}
    assert report["conflicting_labels"] == {"n": 2, "examples": [3, 4]}


small_pairs = st.tuples(st.sampled_from("pq"), st.sampled_from("xyz"), st.sampled_from("xyz"))


@given(rows=st.lists(small_pairs.filter(lambda row: row[1] != row[2]), min_size=1, max_size=14))
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_counts_equal_those_of_a_plain_loop(tmp_path, rows):
    report = check_one(tmp_path / "a.jsonl", [pair(*row) for row in rows])
    assert report["duplicates"]["n"] == sum(row in rows[:index] for index, row in enumerate(rows))
    assert report["conflicting_labels"]["n"] == sum((p, r, c) in rows for p, c, r in rows)
    assert report["prompts"] == len({row[0] for row in rows})


def test_overlap_of_every_two_sources(tmp_path):
    train = write(tmp_path / "train.jsonl", [pair("a?"), pair("a?", "x", "y"), pair("b?"), pair("c?")])
    test = write(tmp_path / "test.jsonl", [pair("a?", "A car.", "Blue."), pair("d?"), pair("b?", "x", "y")])
    other = write(tmp_path / "other.jsonl", [pair("e?")])
    report = check_data([train, test, other])
    assert report["overlap"] == [
        {
            "sources": [str(train), str(test)],
            "shared_prompts": 2,
            "shared_pairs": 1,  # also when the label is reversed
            "rows_with_shared_prompt": [3, 2],
        },
        {
            "sources": [str(train), str(other)],
            "shared_prompts": 0,
            "shared_pairs": 0,
            "rows_with_shared_prompt": [0, 0],
        },
        {
            "sources": [str(test), str(other)],
            "shared_prompts": 0,
            "shared_pairs": 0,
            "rows_with_shared_prompt": [0, 0],
        },
    ]
    assert f"{train} and {test} share 2 prompts: not train and test." in report["warnings"]
    assert "Overlap of sources: none" in format_report(check_data([train, other]))


def test_length_bias_counts_ties_as_half(tmp_path):
    rows = [pair("a?", "long", "abc"), pair("b?", "long", "abc"), pair("c?", "ab", "cd"), pair("d?", "a", "bcd")]
    longer = check_one(tmp_path / "a.jsonl", rows)["chosen_longer_characters"]
    low, high = wilson_interval(2.5, 4)
    assert longer == {
        "n": 4, "longer": 2, "equal": 1, "shorter": 1, "share": 2.5 / 4, "interval": [low, high],
    }  # fmt: skip


def test_a_length_bias_is_warned_of_and_balance_is_not(tmp_path):
    biased = write(tmp_path / "biased.jsonl", [pair(f"{number}?", "quite long", "no") for number in range(40)])
    balanced = [pair(f"{number}?", *(("long", "no") if number % 2 else ("no", "long"))) for number in range(40)]
    warnings = check_data([biased, write(tmp_path / "balanced.jsonl", balanced)])["warnings"]
    assert [warning for warning in warnings if "length and label" in warning] == [
        f"{biased}: length and label are related: the longer response is chosen in 100.0%."
    ]


def test_without_a_tokenizer_nothing_is_said_about_tokens(tmp_path):
    path = write(tmp_path / "a.jsonl", [pair()])
    report = check_data(path)
    assert not {"tokens", "template", "max_length", "chosen_longer_tokens"} & set(report["sources"][0])
    assert "tokenizer" not in report and "tokens" not in format_report(report)
    with pytest.raises(InputError, match="max_length: 512 tokens cannot be checked without a tokenizer"):
        check_data(path, max_length=512)


def test_token_quantiles_are_those_of_the_encoded_pairs(tmp_path, tokenizer):
    path = write(
        tmp_path / "a.jsonl", [pair("Name " * n, "Blue " * (n % 5 + 1), "Red " * (n % 3 + 7)) for n in range(1, 60)]
    )
    report = check_data(path, tokenizer)["sources"][0]
    encoded = encode_pairs(load_preferences(path).dataset, tokenizer, max_length=None).dataset
    prompt = np.array(encoded["prompt_length"][:])
    chosen, rejected = (
        np.array([len(ids) for ids in encoded[f"{side}_input_ids"]]) for side in ("chosen", "rejected")
    )
    for name, lengths in (
        ("prompt", prompt),
        ("chosen", chosen - prompt),
        ("rejected", rejected - prompt),
        ("total", np.maximum(chosen, rejected)),
    ):
        expected = {"mean": lengths.mean(), "0%": lengths.min(), "50%": np.median(lengths), "100%": lengths.max()}
        found = report["tokens"][name]
        assert {key: found[key] for key in expected} == pytest.approx(expected, abs=0.051)
    assert report["chosen_longer_tokens"]["longer"] == int((chosen > rejected).sum())


@pytest.mark.parametrize("max_length", [5, 22, 40, 500])
def test_what_a_limit_would_do_is_what_it_does(max_length, tmp_path, tokenizer):
    rows = [pair("Name a colour. " * n, "Blue " * (n % 5 + 1), "Red " * (n % 4 + 2)) for n in range(1, 30)]
    path = write(tmp_path / "a.jsonl", rows)
    report = check_data(path, tokenizer, max_length)["sources"][0]["max_length"]
    dataset = load_preferences(path).dataset
    assert report["drop"]["dropped"] + report["drop"]["left"] == len(rows)
    if report["drop"]["left"]:
        counts = encode_pairs(dataset, tokenizer, max_length=max_length, overlong="drop").counts
        assert (counts["overlong"], counts["dropped"]) == (report["overlong"], report["drop"]["dropped"])
    else:
        with pytest.raises(InputError, match="leaves none"):
            encode_pairs(dataset, tokenizer, max_length=max_length, overlong="drop")
    if report["error"]["stops"]:
        with pytest.raises(BadRow, match="over max_length"):
            encode_pairs(dataset, tokenizer, max_length=max_length)
    else:
        assert encode_pairs(dataset, tokenizer, max_length=max_length).counts["overlong"] == 0
    cut = report["truncate_prompt"]
    assert cut["truncated"] + cut["response_too_long"] == report["overlong"]
    if cut["response_too_long"]:
        with pytest.raises(BadRow, match="responses are never cut"):
            encode_pairs(dataset, tokenizer, max_length=max_length, overlong="truncate_prompt")
    else:
        encoded = encode_pairs(dataset, tokenizer, max_length=max_length, overlong="truncate_prompt")
        whole = encode_pairs(dataset, tokenizer, max_length=None).dataset
        assert encoded.counts["truncated"] == cut["truncated"]
        removed = sum(whole["prompt_length"][:]) - sum(encoded.dataset["prompt_length"][:])
        assert removed == cut["prompt_tokens_removed"]


def _audit(path, tokenizer, template, rows=None):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    report = check_data(write(path, rows or [pair(), pair("b?")]), changed)
    return report["sources"][0]["template"], report["warnings"]


def test_the_audit_of_a_sound_template(tmp_path, tokenizer):
    audit, warnings = _audit(tmp_path / "a.jsonl", tokenizer, tokenizer.chat_template)
    assert audit["endings"] == [{"ending": "</s>", "ids": [2], "n": 4}] and audit["responses"] == 4
    assert [audit[name] for name in ("double_bos", "double_eos", "starts_with_bos")] == [0] * 3
    assert audit["not_as_written"] == {"n": 0, "examples": []}
    assert audit["example_chosen"] == "<|user|>Name a colour.</s><|assistant|>Blue.</s>"
    assert audit["example_rejected_response"] == "A car.</s>" and audit["example_last_ids"][-1] == 2
    assert warnings == []


def test_the_audit_names_what_follows_the_end_token(tmp_path, tokenizer):
    template = tokenizer.chat_template.replace("'</s>'", "'</s>\n'")
    audit, warnings = _audit(tmp_path / "a.jsonl", tokenizer, template)
    (ending,) = audit["endings"]
    assert ending["ending"] == "</s>\n" and ending["ids"][0] == 2 and ending["n"] == 4 and warnings == []


@pytest.mark.parametrize(
    ("change", "field", "count", "warning"),
    [
        (lambda template: "{{ bos_token }}{{ bos_token }}" + template, "double_bos", 2, "start with two BOS tokens"),
        (lambda template: template + "{{ eos_token }}", "double_eos", 2, "end with two end tokens"),
        (lambda template: template.replace(" + '</s>'", ""), None, 4, "4 responses hold no end token"),
    ],
)
def test_the_audit_finds_a_broken_template(change, field, count, warning, tmp_path, tokenizer):
    audit, warnings = _audit(tmp_path / "a.jsonl", tokenizer, change(tokenizer.chat_template))
    found = audit[field] if field else sum(ending["n"] for ending in audit["endings"] if not ending["ids"])
    assert found == count and [line for line in warnings if warning in line]


def test_the_audit_counts_special_and_unknown_tokens_in_text(tmp_path, tokenizer):
    rows = [pair("Say </s> now"), pair("b?", "<unk> it is"), pair("c?")]
    audit, warnings = _audit(tmp_path / "a.jsonl", tokenizer, tokenizer.chat_template, rows)
    assert audit["with_unknown_tokens"] == 1
    assert audit["not_as_written"]["examples"] == [
        "row 1: turn 1 (user) with '</s>', which becomes that token",
        "row 2: chosen: the response with '<unk>', which becomes that token",
    ]
    assert any("2 pairs would not be read as they stand: row 1: turn 1" in line for line in warnings)
    assert len(warnings) == 2


def test_a_turn_opened_inside_a_response_is_named(tmp_path, tokenizer):
    """The response ends its turn and answers itself: its text has become control tokens."""
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    rows = [pair(), pair("b?", "Blue.<|turn|>Great!"), pair("c?")]
    audit, warnings = _audit(tmp_path / "a.jsonl", changed, tokenizer.chat_template, rows)
    (example,) = audit["not_as_written"]["examples"]
    assert example.startswith("row 2: chosen: the response with '<|turn|>'")
    assert any(example in line for line in warnings)
    ids = encode(changed, "b?", "Blue.<|turn|>Great!").input_ids
    assert changed.convert_tokens_to_ids("<|turn|>") in ids


def test_bos_added_by_the_tokenizer_is_not_doubled_by_the_template(tmp_path, tokenizer):
    adding = copy.deepcopy(tokenizer)
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    audit, _ = _audit(tmp_path / "a.jsonl", adding, "{{ bos_token }}" + tokenizer.chat_template)
    assert (audit["starts_with_bos"], audit["double_bos"]) == (2, 0)


def test_rows_that_cannot_be_encoded_are_listed_and_the_rest_is_measured(tmp_path, tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}" + (
        tokenizer.chat_template
    )
    dialogue = "Human: a\n\nAssistant: b\n\nHuman: c"
    report = check_data(write(tmp_path / "a.jsonl", [pair(), pair(dialogue), pair("c?")]), strict)
    tokens = report["sources"][0]["tokens"]
    assert (tokens["pairs"], tokens["not_encodable"]) == (2, 1)
    assert tokens["not_encodable_examples"][0]["row"] == 2
    assert "or 'plain'" in tokens["not_encodable_examples"][0]["reason"]
    assert any("1 pairs cannot be encoded" in warning for warning in report["warnings"])
    none_left = check_data(write(tmp_path / "b.jsonl", [pair(dialogue)]), strict, 10)
    assert none_left["sources"][0]["tokens"]["pairs"] == 0 and format_report(none_left)


def test_pad_is_eos_is_noted(tmp_path, tokenizer):
    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    report = check_data(write(tmp_path / "a.jsonl", [pair()]), same)
    assert report["tokenizer"]["pad_is_eos"] and "the pad token is the end token" in report["warnings"][-1]


def test_the_report_is_written_whole_and_reads_well(tmp_path, tokenizer):
    rows = [pair(), pair("b?", chosen=""), pair("c?" * 60), *[pair("d?", rejected="Blue.")] * 6]
    report = check_data(write(tmp_path / "a.jsonl", rows), tokenizer, 60)
    path = write_report(report, tmp_path / "out")
    assert json.loads(path.read_text(encoding="utf-8")) == report
    assert [item.name for item in path.parent.iterdir()] == ["preflight.json"]
    assert write_report(report, None) is None
    text = format_report(report)
    for line in (
        "rows 9, usable pairs 2, bad rows 7",
        "row 2: 'chosen' is empty",
        "... and 2 more",
        "identical sides 6",
        "max_length 60: 1 pairs over it",
        "drop: 1 dropped, 1 left",
        "4 of 4 responses end with '</s>' [2]",
        "| <|user|>Name a colour.</s><|assistant|>Blue.</s>",
        "Warnings: 2",
    ):
        assert line in text
    with pytest.raises(InputError, match="is a file"):
        write_report(report, tmp_path / "a.jsonl")


def test_a_tokenizer_may_be_named(tmp_path, causal_lm_dir):
    folder = causal_lm_dir("llama")
    path = write(tmp_path / "a.jsonl", [pair()])
    report = check_data(path, folder, chat_template="plain")
    assert report["settings"]["tokenizer"] == str(folder)
    assert report["sources"][0]["template"]["example_chosen"].startswith(
        "\n\nHuman: Name a colour.\n\nAssistant: Blue."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": []}, "got no source"),
        ({"sources": ["a.jsonl", "a.jsonl"]}, "a source is named twice"),
        ({"sources": "a.jsonl", "max_length": 0}, "max_length: 0"),
        ({"sources": "a.jsonl", "max_length": "8"}, "max_length: '8'"),
        ({"sources": "a.jsonl", "chat_template": "plain"}, "chat_template: set it on the tokenizer"),
        ({"sources": "nowhere.jsonl"}, "no such file"),
    ],
)
def test_wrong_use(options, message):
    with pytest.raises(InputError, match=message):
        check_data(**options)


def test_real_splits_share_no_prompt(shared_dir, tmp_path):
    files = [shared_dir / "data" / "pandalm-human" / f"{split}.jsonl.gz" for split in ("train", "test")]
    sources = [load_preferences(file).dataset.select(range(100)).to_list() for file in files]
    paths = [write(tmp_path / f"{number}.jsonl", rows) for number, rows in enumerate(sources)]
    report = check_data(paths, shared_dir / "models" / "smollm2-135m-first6-v16k", 64)
    assert [source["pairs"] for source in report["sources"]] == [100, 100]
    assert report["overlap"][0]["shared_prompts"] == 0
    for source in report["sources"]:
        assert source["bad_rows"]["n"] == source["template"]["double_bos"] == 0
        assert [ending["ending"] for ending in source["template"]["endings"]] == ["<|im_end|>\n"]
