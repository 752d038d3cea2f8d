"""Every public layout becomes the right item, bad rows are named, and the Hub is asked for what the tables say."""

import gzip
import json

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from inform_rm.data.pairs import BadRow
from inform_rm.errors import InputError
from inform_rm.eval.suites import items as suite_items
from inform_rm.eval.suites.items import load_suite_items
from inform_rm.eval.suites.tables import SUITES

USER = [{"role": "user", "content": "Why?"}]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".json"):
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(suite, path, **options):
    return load_suite_items(SUITES[suite], path, **options)[0]


def only(suite, path, row):
    (item,) = read(suite, write(path, [row]))
    return item


def test_rewardbench_rows(tmp_path):
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "No.", "subset": "alpacaeval-hard", "id": 7,
           "chosen_model": "x"}  # fmt: skip
    item = only("rewardbench", tmp_path / "rows.jsonl", row)
    assert (item.id, item.subset, item.num_correct) == ("alpacaeval-hard/7", "alpacaeval-hard", 1)
    assert (item.prompt, item.candidates) == (USER, ["So.", "No."])
    # Prior sets: a list of messages; our names for the parts of anthropic_hhh.
    row = {"prompt": USER, "chosen": "So.", "rejected": "No.", "subset": "hhh-honest", "id": "hhh/3"}
    item = only("rewardbench", tmp_path / "prior.jsonl", row)
    assert (item.id, item.subset) == ("anthropic_hhh/hhh/3", "anthropic_hhh")
    # A published item counts as it is, also when both sides are the same.
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "So.", "subset": "math-prm", "id": 1}
    assert only("rewardbench", tmp_path / "same.jsonl", row).candidates == ["So.", "So."]


def test_rewardbench2_rows(tmp_path):
    row = {"id": "12", "prompt": "Why?", "chosen": ["a"], "rejected": ["b", "c", "d"], "num_correct": 1,
           "num_incorrect": 3, "total_completions": 4, "subset": "Precise IF"}  # fmt: skip
    item = only("rewardbench2", tmp_path / "rows.jsonl", row)
    assert (item.id, item.candidates, item.num_correct) == ("Precise IF/12", ["a", "b", "c", "d"], 1)
    row |= {"id": "tied:4", "subset": "Ties", "chosen": ["a", "b"], "num_correct": 2}
    item = only("rewardbench2", tmp_path / "ties.jsonl", row)
    assert (item.id, item.candidates, item.num_correct) == ("Ties/tied:4", ["a", "b", "b", "c", "d"], 2)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"rejected": ["b", "c"]}, r"1 chosen and 2 rejected; Math has 1 and 3"),
        ({"num_correct": 2}, r"'num_correct' is 2, but 'chosen' holds 1"),
        ({"chosen": "a"}, r"'chosen' is 'a'; expected a list of responses"),
        ({"chosen": [""]}, r"a candidate is ''; expected text"),
        ({"chosen": [None]}, r"a candidate is None; expected text"),
        ({"chosen": ["a\ud800"]}, r"a text has an unpaired surrogate at character 2"),
        ({"id": "\ud800"}, r"a text has an unpaired surrogate at character 1"),
        ({"subset": "Maths"}, r"subset 'Maths' is none of rewardbench2's: Factuality, Precise IF"),
        ({"subset": "Ties"}, r"'id' is '1'; items of Ties have ref:NUMBER or tied:NUMBER"),
        ({"subset": "Ties", "id": "tied:1"}, r"at least two correct answers"),
        ({"prompt": ""}, r"prompt"),
        ({"prompt": 3}, r"prompt"),
    ],
)
def test_bad_rows_are_named_with_file_and_row(tmp_path, change, fault):
    good = {"id": "1", "prompt": "Why?", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Math"}
    path = write(tmp_path / "rows.jsonl", [good, {**good, "id": "2"}, {**good, **change}])
    with pytest.raises(BadRow, match=rf"rows.jsonl, row 3: .*{fault}.*on_bad_row='skip'"):
        read("rewardbench2", path)
    items, (source,) = load_suite_items(SUITES["rewardbench2"], path, on_bad_row="skip")
    assert len(items) == 2 and source["bad_rows"] == 1 and "row 3" in source["bad_row_reasons"][0]


def test_rm_bench_rows(tmp_path):
    row = {"id": "chat/1", "prompt": "Why?", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"], "domain": "chat"}
    item = only("rm-bench", tmp_path / "total_dataset.json", row)
    assert (item.id, item.candidates, item.num_correct) == ("chat/1", list("abcdef"), 3)
    row |= {"domain": "safety-refuse", "id": "9"}
    assert only("rm-bench", tmp_path / "safety.json", row).id == "safety-refuse/9"
    with pytest.raises(BadRow, match="3 chosen and 2 rejected; expected concise, detailed and markdown"):
        only("rm-bench", tmp_path / "bad.json", row | {"rejected": ["d", "e"]})


@pytest.mark.parametrize(
    ("file", "subset"),
    [
        ("chat_filtered.json", "chat"),
        ("safety-refuse_filtered.json", "safety-refuse"),
        ("code_filtered.jsonl", "code"),
    ],
)
def test_rm_bench_files_of_one_domain_name_it(tmp_path, file, subset):
    row = {"id": 7, "prompt": "Why?", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"], "subset": "mbpp"}
    assert only("rm-bench", tmp_path / file, row).subset == subset
    with pytest.raises(BadRow, match="subset 'mbpp' is none of rm-bench's: chat, math, code"):
        only("rm-bench", tmp_path / "rows.json", row)
    with pytest.raises(BadRow, match="no 'subset', and neither file nor folder is named after one"):
        only("rm-bench", tmp_path / "art_filtered.json", row)


def test_judgebench_rows(tmp_path):
    row = {"pair_id": "x", "source": "mmlu-pro-law", "question": "Why?", "response_model": "gpt-4o-2024-05-13",
           "response_A": "a", "response_B": "b", "label": "B>A"}  # fmt: skip
    item = only("judgebench", tmp_path / "rows.jsonl", row)
    assert (item.id, item.subset, item.candidates) == ("gpt/knowledge/x", "gpt/knowledge", ["b", "a"])
    row |= {"response_model": "claude-3-5-sonnet-20240620", "label": "A>B", "source": "livecodebench"}
    item = only("judgebench", tmp_path / "claude.jsonl", row)
    assert (item.subset, item.candidates) == ("claude/coding", ["a", "b"])
    local = {"prompt": "Why?", "chosen": "a", "rejected": "b", "subset": "judgebench-code", "id": "gpt4o/x"}
    assert only("judgebench", tmp_path / "local.jsonl", local).subset == "gpt/coding"
    for change, fault in (
        ({"label": "A=B"}, "'label' is 'A=B'; expected 'A>B' or 'B>A'"),
        ({"source": "poetry"}, "'source' is 'poetry'; expected one that starts with mmlu-pro"),
        ({"response_model": "llama"}, "says gpt or claude"),
    ):
        with pytest.raises(BadRow, match=fault):
            only("judgebench", tmp_path / "bad.jsonl", row | change)


def test_llmbar_folders_name_the_subsets(tmp_path):
    row = {"input": "Why?", "output_1": "a", "output_2": "b", "label": 2}
    for place in ("LLMBar/Natural", "LLMBar/Adversarial/GPTInst", "CaseStudy/Base_9"):
        write(tmp_path / "Dataset" / place / "dataset.json", [row])
        write(tmp_path / "Dataset" / place / "evaluators/GPT-4/result.json", [{"anything": 1}])
    items = read("llmbar", tmp_path / "Dataset")
    assert [item.subset for item in items] == ["base-9", "gptinst", "natural"]
    assert items[0].candidates == ["b", "a"] and items[0].id == "base-9/1"
    assert read("llmbar", tmp_path / "Dataset/LLMBar/Natural")[0].subset == "natural"
    local = {"prompt": "Why?", "chosen": "a", "rejected": "b", "subset": "case-base10", "id": "x"}
    assert only("llmbar", tmp_path / "local.jsonl", local).subset == "base-10"
    with pytest.raises(BadRow, match="'label' is 3; expected 1 or 2"):
        only("llmbar", tmp_path / "natural.json", row | {"label": 3})
    with pytest.raises(BadRow, match="neither file nor folder is named after one"):
        only("llmbar", tmp_path / "rows.json", row)


def test_hh_transcripts_and_alpacaeval_pairs(tmp_path):
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    folder = tmp_path / "hh-rlhf"
    for place in ("test", "train"):
        path = folder / "harmless-base" / f"{place}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt") as file:
            file.write(json.dumps({"chosen": start + " So.", "rejected": start + " No."}) + "\n")
    (item,) = read("hh", folder)  # the training file is left out
    assert (item.subset, item.candidates, len(item.prompt)) == ("harmless-base", ["So.", "No."], 3)
    row = {"instruction": "Add.", "input": "1 2", "output_1": "3", "output_2": "4", "preference": 1}
    item = only("hh", tmp_path / "annotations.json", row)
    assert (item.subset, item.candidates) == ("alpacaeval", ["3", "4"])
    assert item.prompt[0]["content"] == "Add.\n\n1 2"
    with pytest.raises(BadRow, match=r"'preference' is 1.5; expected 1 or 2"):
        only("hh", tmp_path / "tied.json", row | {"preference": 1.5})


def test_truthfulqa_in_both_forms(tmp_path):
    lists = {"question": "Why?", "mc1_targets": {"choices": ["x", "a", "y"], "labels": [0, 1, 0]},
             "mc2_targets": {"choices": ["x", "a", "b"], "labels": [0, 1, 1]}}  # fmt: skip
    plain = {"question": "Why?", "mc1_targets": {"x": 0, "a": 1, "y": 0}, "mc2_targets": {"x": 0, "a": 1, "b": 1}}
    for number, row in enumerate((lists, plain)):
        first, second = read("truthfulqa-mc", write(tmp_path / f"{number}.json", [row]))
        assert (first.id, first.candidates, first.num_correct) == ("mc1/1", ["a", "x", "y"], 1)
        assert (second.id, second.candidates, second.num_correct) == ("mc2/1", ["a", "b", "x"], 2)
    for targets in ({"choices": ["a"], "labels": [1]}, {"choices": ["a", "b"], "labels": [1, 1]},
                    {"choices": ["a"], "labels": [1, 0]}, {"a": 2, "b": 0}, ["a"], {}, None, "choices",
                    {"choices": "ab", "labels": [1, 0]}, {"choices": ["a", "b"]}):  # fmt: skip
        with pytest.raises(BadRow, match="mc1_targets"):
            read("truthfulqa-mc", write(tmp_path / "bad.json", [plain | {"mc1_targets": targets}]))


def test_twins_are_known_by_their_ids(tmp_path):
    row = {"prompt": "Why?", "chosen": "a", "rejected": "b", "subset": "swap-piqa", "id": "swap-piqa/1/a"}
    assert only("prompt-swap", tmp_path / "rows.jsonl", row).id == "swap-piqa/1/a"
    with pytest.raises(BadRow, match="twins have ids that end in /a and /b"):
        only("prompt-swap", tmp_path / "bad.jsonl", row | {"id": "1"})
    with pytest.raises(BadRow, match=r"row 2: the id 'swap-piqa/1/a' stands there twice"):
        read("prompt-swap", write(tmp_path / "twice.jsonl", [row, row | {"prompt": "How?"}]))


def test_ids_are_unique_and_sources_are_told_apart(tmp_path):
    row = {"prompt": "Why?", "chosen": "a", "rejected": "b", "subset": "hep-go", "id": 1}
    path = write(tmp_path / "rows.jsonl", [row, row | {"chosen": "c"}, row | {"subset": "hep-js"}])
    assert [item.id for item in read("rewardbench", path)] == ["hep-go/1", "hep-go/1#2", "hep-js/1"]
    with pytest.raises(BadRow, match=r"rows.jsonl, row 1: the same item as .*rows.jsonl, row 1. Name each file once"):
        read("rewardbench", [path, path])
    _, sources = load_suite_items(SUITES["rewardbench"], [path, write(tmp_path / "more.jsonl", [row | {"id": 2}])])
    assert [source["items"] for source in sources] == [3, 1]
    # Another format, the same content: the same fingerprint.
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    _, again = load_suite_items(SUITES["rewardbench"], write(tmp_path / "rows.json", rows))
    assert again[0]["fingerprint"] == sources[0]["fingerprint"]


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(BadRow, match=r"in no layout of judgebench: it has prompt; expected label, question, .*; or "):
        only("judgebench", tmp_path / "a.jsonl", {"prompt": "Why?"})
    with pytest.raises(BadRow, match="expected an object with fields, got int"):
        only("llmbar", tmp_path / "b.json", 3)
    (tmp_path / "c.jsonl").write_text('{"prompt": \n')
    with pytest.raises(BadRow, match=r"c.jsonl, row 1: broken JSON"):
        read("rewardbench", tmp_path / "c.jsonl")
    with pytest.raises(InputError, match=r"c.jsonl: no items of rewardbench. .*broken JSON"):
        read("rewardbench", tmp_path / "c.jsonl", on_bad_row="skip")
    with pytest.raises(InputError, match=r"missing.jsonl: no such file or folder"):
        read("rewardbench", tmp_path / "missing.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: a folder without data files"):
        read("rewardbench", tmp_path / "empty")
    with pytest.raises(InputError, match="data: expected files of rewardbench"):
        read("rewardbench", [])
    with pytest.raises(InputError, match=r"revision: 'main' was given, but .*c.jsonl is one file"):
        read("rewardbench", tmp_path / "c.jsonl", revision="main")


def test_the_hub_is_asked_for_what_the_tables_say(monkeypatch, tmp_path):
    asked = []
    row = {"prompt": "Why?", "chosen": "a", "rejected": "b", "subset": "alpacaeval-easy", "id": 1}

    def fake(path, **options):
        asked.append((path, options))
        return Dataset.from_list([row | {"id": len(asked)}])

    monkeypatch.setattr("datasets.load_dataset", fake)
    _, sources = load_suite_items(SUITES["rewardbench"], revision="abc")
    assert asked == [("allenai/reward-bench", {"split": "filtered", "revision": "abc"})]
    assert sources[0]["source"] == "allenai/reward-bench/filtered"
    # The prior sets are read when they are named; their split is the subset.
    asked.clear()
    items = load_suite_items(SUITES["rewardbench"], ["allenai/reward-bench", "allenai/preference-test-sets"])[0]
    assert [options["split"] for _, options in asked][1:] == ["anthropic_helpful", "anthropic_hhh", "shp", "summarize"]
    assert [item.subset for item in items] == [
        "alpacaeval-easy", "anthropic_helpful", "anthropic_hhh", "shp", "summarize",
    ]  # fmt: skip
    asked.clear()
    load_suite_items(SUITES["hh"])
    assert [options["data_dir"] for _, options in asked] == ["helpful-base", "harmless-base"]
    with pytest.raises(InputError, match=r"prompt-swap is not on the Hub in a readable form. Name its files"):
        load_suite_items(SUITES["prompt-swap"])


def test_without_network_the_error_says_how_to_give_files(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(InputError, match=r"rm-bench could not be read from the Hub \(.*offline.*--data FILES"):
        load_suite_items(SUITES["rm-bench"])


SHARED = {
    "hh": ("hh-rlhf", {"helpful-base": 339, "harmless-base": 350}),
    "prompt-swap": ("prompt-swap", {"swap-piqa": 476, "swap-gsm8k": 400, "swap-truthfulqa": 208,
                                    "swap-ukp-stance": 178, "swap-hh-helpful": 90}),
    "judgebench": ("judgebench", {"gpt/knowledge": 154, "gpt/reasoning": 98, "gpt/math": 56, "gpt/coding": 42,
                                  "claude/knowledge": 154, "claude/reasoning": 51, "claude/math": 34,
                                  "claude/coding": 30}),
    "truthfulqa-mc": ("truthfulqa", {"truthfulqa-best": 236, "truthfulqa-other": 360}),
    "llmbar": ("llmbar", {"natural": 100, "constraint": 89, "base-9": 53, "base-10": 53}),
    "rewardbench": ("humanevalpack", {f"hep-{name}": 164 for name in ("cpp", "go", "java", "js", "python", "rust")}),
}  # fmt: skip


@pytest.mark.parametrize("suite", SHARED)
def test_real_parts_of_suites(suite, shared_dir):
    folder, counts = SHARED[suite]
    items = read(suite, shared_dir / "data" / folder)
    found = {name: sum(item.subset == name for item in items) for name in counts}
    assert found == counts and sum(counts.values()) == len(items) == len({item.id for item in items})
    for item in items:
        assert len(item.candidates) == 2 and item.num_correct == 1 and item.prompt[-1]["role"] == "user"


def test_real_parts_of_rewardbench_in_one_call(shared_dir):
    data = [shared_dir / "data" / name for name in ("humanevalpack", "xstest", "hhh-alignment", "llmbar")]
    with pytest.raises(BadRow, match="subset 'case-constraint' is none of rewardbench's"):
        load_suite_items(SUITES["rewardbench"], data)
    items, sources = load_suite_items(SUITES["rewardbench"], data, on_bad_row="skip")
    assert [source["bad_rows"] for source in sources] == [0, 0, 0, 195]
    assert len(sources[3]["bad_row_reasons"]) == 20
    assert {item.subset for item in items} >= {"llmbar-natural", "anthropic_hhh", "xstest-should-refuse"}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4)
    | st.sampled_from(["A>B", "Ties", "Math", "chat", "hep-go", "tied:1", "mmlu-pro", "\ud800", 1, 2]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["choices", "labels", "role", "content", "x"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
NAMES = sorted({name for fields, _ in suite_items._LAYOUTS.values() for name in fields})
ROWS = st.fixed_dictionaries({}, optional={name: VALUES for name in [*NAMES, "subset", "id", "domain", "source"]})


@settings(max_examples=40)
@given(st.sampled_from(sorted(SUITES)), st.lists(ROWS | VALUES, min_size=1, max_size=4))
def test_any_row_becomes_items_or_is_named(tmp_path_factory, suite, rows):
    path = tmp_path_factory.getbasetemp() / "any-rows.json"
    path.write_text(json.dumps(rows))
    try:
        items = read(suite, path, on_bad_row="skip")
    except InputError as error:
        assert str(path) in str(error)
        return
    for item in items:
        assert item.subset in SUITES[suite].subsets and 0 < item.num_correct < len(item.candidates)
