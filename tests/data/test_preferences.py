import atexit
import csv
import gzip
import json
import os
import pickle
import sys
import tempfile
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pandas import DataFrame

from inform_rm.data import records
from inform_rm.data.messages import to_messages
from inform_rm.data.pairs import BadRow, parse_pair
from inform_rm.data.preferences import load_preferences
from inform_rm.errors import InputError

USER = {"role": "user", "content": "Name a colour."}
PROMPT = [USER]
BLUE = {"role": "assistant", "content": "Blue."}
CAR = {"role": "assistant", "content": "A car."}
EXPLICIT = {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "A car."}
HH = "\n\nHuman: Name a colour.\n\nAssistant: "

words = st.text(
    st.characters(codec="utf-8", exclude_categories=("Zs", "Zl", "Zp", "Cc", "Cf", "Co", "Cn")), min_size=1
)
lines = st.lists(words, min_size=1, max_size=6).map(" ".join)


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "record",
    [
        EXPLICIT,
        {"prompt": PROMPT, "chosen": [BLUE], "rejected": [CAR]},
        {"prompt": PROMPT, "chosen": "Blue.", "rejected": "A car."},
        {"prompt": "Name a colour.", "chosen": [BLUE], "rejected": [CAR]},
        {"prompt": "Name a colour.", "chosen": [USER, BLUE], "rejected": [USER, CAR]},
        {"prompt": PROMPT, "chosen": [USER, BLUE], "rejected": [USER, CAR]},
        {"chosen": [USER, BLUE], "rejected": [USER, CAR]},
        {"chosen": HH + "Blue.", "rejected": HH + "A car."},
        {"chosen": (HH + "Blue.").lstrip(), "rejected": (HH + "A car. ").lstrip()},
        {"prompt": HH, "chosen": " Blue.", "rejected": " A car."},
        {"prompt": "Human: Name a colour.", "chosen": "Blue.", "rejected": "A car."},
        {"prompt": None, "margin": None, "subset": None, "chosen": [USER, BLUE], "rejected": [USER, CAR]},
    ],
)
def test_every_documented_form_gives_the_same_pair(record):
    pair = parse_pair(record, "data/some.jsonl.gz", 3)
    assert (pair.prompt, pair.chosen, pair.rejected) == (PROMPT, "Blue.", "A car.")
    assert (pair.margin, pair.subset, pair.id, pair.row) == (None, "some", "some/3", 3)


def test_optional_fields_are_kept():
    pair = parse_pair({**EXPLICIT, "margin": 2, "subset": "colours", "id": 17, "note": "ignored"}, "f.jsonl", 1)
    assert (pair.margin, pair.subset, pair.id) == (2.0, "colours", "17")


def test_implicit_text_is_cut_at_a_word_boundary_and_loses_nothing():
    columns = {"prompt": "shared_prefix"}
    pair = parse_pair({"chosen": "The sky is blue.", "rejected": "The sky is blush."}, "f.jsonl", 1, columns=columns)
    assert (pair.prompt[0]["content"], pair.chosen, pair.rejected) == ("The sky is", " blue.", " blush.")
    longer = parse_pair({"chosen": "Well? \n yes", "rejected": "Well? \n yes indeed"}, "f.jsonl", 1, columns=columns)
    assert (longer.prompt[0]["content"], longer.chosen, longer.rejected) == ("Well?", " \n yes", " \n yes indeed")


@settings(max_examples=50)
@given(prompt=lines, chosen=lines, rejected=lines)
def test_implicit_text_joins_to_the_original(prompt, chosen, rejected):
    record = {"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}"}
    try:
        pair = parse_pair(record, "f.jsonl", 1, columns={"prompt": "shared_prefix"})
    except BadRow as bad:
        assert chosen == rejected and bad.kind in ("identical sides", "no prompt")
        return
    for side in ("chosen", "rejected"):
        assert pair.prompt[0]["content"] + getattr(pair, side) == record[side]
    assert pair.chosen != pair.rejected and pair.chosen[0].isspace() and pair.rejected[0].isspace()
    assert pair.prompt[0]["content"].startswith(prompt)  # never cut back past the shared words


@settings(max_examples=30)
@given(turns=st.lists(st.tuples(lines, lines), max_size=3), question=lines, chosen=lines, rejected=lines)
def test_transcripts_and_message_lists_are_the_same_dialogue(turns, question, chosen, rejected):
    if chosen == rejected:
        return
    messages = []
    for human, assistant in turns:
        messages += [{"role": "user", "content": human}, {"role": "assistant", "content": assistant}]
    messages.append({"role": "user", "content": question})
    speaker = {"user": "Human", "assistant": "Assistant"}
    transcript = "".join(f"\n\n{speaker[message['role']]}: {message['content']}" for message in messages)
    expected = (messages, chosen, rejected)
    for record in (
        {"prompt": transcript, "chosen": chosen, "rejected": rejected},
        {"prompt": transcript.lstrip() + "\n\nAssistant:", "chosen": chosen, "rejected": rejected},
        {"chosen": f"{transcript}\n\nAssistant: {chosen}", "rejected": f"{transcript}\n\nAssistant: {rejected}"},
        {
            "chosen": [*messages, {"role": "assistant", "content": chosen}],
            "rejected": [*messages, {"role": "assistant", "content": rejected}],
        },
    ):
        pair = parse_pair(record, "f.jsonl", 1)
        assert (pair.prompt, pair.chosen, pair.rejected) == expected


def test_a_colon_after_human_inside_a_line_starts_no_turn():
    assert to_messages("Human: Is it Human: or Assistant: here?\nHuman: same turn") == [
        {"role": "user", "content": "Is it Human: or Assistant: here?\nHuman: same turn"}
    ]


@settings(max_examples=50)
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text() | st.integers(), lambda inner: st.lists(
    inner, max_size=3) | st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "margin", "subset", "role",
    "content", "id", "tools"]), inner, max_size=6), max_leaves=12))  # fmt: skip
def test_any_json_is_a_pair_or_a_bad_row(record):
    try:
        pair = parse_pair(record, "f.jsonl", 1)
    except BadRow as bad:
        assert bad.reason and bad.kind and str(bad).startswith("f.jsonl, row 1: ")
    else:
        assert pair.prompt[-1]["role"] == "user" and pair.chosen.strip() != pair.rejected.strip()


def _but(**changes):
    return {key: value for key, value in {**EXPLICIT, **changes}.items() if value != "absent"}


BAD_RECORDS = [
    (["not", "an", "object"], "wrong type", "expected an object"),
    (7, "wrong type", "expected an object with fields, got int 7"),
    (_but(chosen="absent"), "missing field", "no 'chosen'. Its fields are 'prompt', 'rejected'"),
    (_but(rejected=None), "missing field", "no 'rejected'"),
    ({}, "missing field", "Its fields are none"),
    (_but(prompt="absent"), "no prompt", "no 'prompt', and the sides are plain text. Add 'prompt'"),
    (_but(prompt=""), "empty field", "'prompt' is empty"),
    (_but(chosen=""), "empty field", "'chosen' is empty"),
    (_but(rejected=" \n\t "), "empty field", "'rejected' is only whitespace or invisible"),
    (_but(chosen="\u200b\u200b"), "empty field", "'chosen' is only whitespace or invisible"),
    (_but(chosen=5), "wrong type", "'chosen' is int 5"),
    (_but(prompt=5), "wrong type", "'prompt' is int 5; expected text or a list of messages"),
    (_but(prompt={"role": "user"}), "wrong type", "'prompt' is dict"),
    (_but(chosen=[BLUE]), "wrong type", "Give both in the same form"),
    (_but(rejected="Blue."), "identical sides", "are identical"),
    (_but(rejected=" Blue.\n"), "identical sides", "differ only in surrounding space"),
    (_but(margin=float("nan")), "bad margin", "'margin' is float nan; expected a finite number"),
    (_but(margin=float("-inf")), "bad margin", "'margin' is float -inf"),
    (_but(margin=10**400), "bad margin", "expected a finite number"),
    (_but(margin=10**5000), "bad margin", "expected a finite number"),
    (_but(margin="much"), "bad margin", "'margin' is str 'much'; expected a finite number"),
    (_but(margin="inf"), "bad margin", "'margin' is str 'inf'; expected a finite number"),
    (_but(margin=True), "bad margin", "'margin' is bool True"),
    (_but(subset=["a"]), "wrong type", "'subset' is list"),
    (_but(id=1.5), "wrong type", "'id' is float 1.5; expected text or a whole number"),
    (_but(id={"a": 1}), "wrong type", "'id' is dict"),
    (_but(chosen="broken \ud800 text"), "bad encoding", "unpaired surrogate at character 8"),
    (_but(tools=[{"name": "search"}]), "unsupported", "'tools' is not encoded.*Write the tools .*ignore=tools"),
    (_but(prompt=[]), "empty field", "'prompt' is an empty list"),
    (_but(prompt=["hello"]), "wrong type", "message 1 of 'prompt' is str 'hello'"),
    (_but(prompt=[{"content": "x"}]), "wrong type", "expected an object with 'role' and 'content'"),
    (_but(prompt=[{"role": "human", "content": "x"}]), "invalid roles", "role 'human'; .* Rename it 'user'"),
    (_but(prompt=[{"role": "wizard", "content": "x"}]), "invalid roles", "one of system, user, assistant"),
    (_but(prompt=[USER, {"role": "system", "content": "x"}]), "invalid roles", "only the first message"),
    (_but(prompt=[USER, BLUE]), "invalid roles", "last turn of the prompt is 'assistant'; expected 'user'"),
    (_but(prompt=[{"role": "user", "content": None}]), "missing field", "content of message 1 of 'prompt' is missing"),
    (_but(prompt=[{"role": "user", "content": [{"type": "image"}]}]), "wrong type", "is list .* expected text"),
    (_but(prompt=[{"role": "user", "content": " "}]), "empty field", "content of message 1 of 'prompt' is only"),
    (_but(prompt=[{**USER, "tool_calls": [1]}]), "unsupported", "has 'tool_calls'"),
    (_but(prompt="Human: Hi.\n\nAssistant: Hello."), "invalid roles", "last turn of the prompt is 'assistant'"),
    (_but(prompt="Human: \n\nAssistant: Hello.\n\nHuman: x"), "empty field", "empty Human turn .turn 1."),
    (_but(prompt="\n\nHuman: "), "empty field", "empty Human turn"),
    ({"chosen": HH + "a", "rejected": HH}, "empty field", "empty Assistant turn .turn 2."),
    (
        {"chosen": HH + "a\n\nHuman: b", "rejected": HH + "c"},
        "no reply",
        "last turn of 'chosen' is 'user'; expected 'assistant'",
    ),
    (
        {"chosen": HH + "a\n\nHuman: b\n\nAssistant: c", "rejected": HH + "d"},
        "sides diverge",
        "differ before the last reply",
    ),
    ({"chosen": [USER, BLUE, USER, BLUE], "rejected": [USER, CAR, USER, CAR]}, "sides diverge", "Cut both after"),
    ({"chosen": [USER], "rejected": [USER]}, "no reply", "last turn of 'chosen' is 'user'"),
    ({"chosen": [BLUE], "rejected": [CAR]}, "no prompt", "both sides hold nothing but the reply"),
    ({"prompt": "Other?", "chosen": [USER, BLUE], "rejected": [USER, CAR]}, "sides diverge", "is not the prompt"),
    (_but(prompt=PROMPT, chosen=[BLUE, USER, BLUE], rejected=[BLUE, USER, CAR]), "sides diverge", "is not the prompt"),
]


@pytest.mark.parametrize(("record", "kind", "message"), BAD_RECORDS)
def test_bad_rows_say_what_is_wrong(record, kind, message):
    with pytest.raises(BadRow, match=message) as caught:
        parse_pair(record, "f.jsonl", 9)
    assert (caught.value.file, caught.value.row, caught.value.kind) == ("f.jsonl", 9, kind)
    assert isinstance(caught.value, InputError)


def test_all_bad_records_in_one_file_are_counted_and_listed(tmp_path):
    storable = [(record, kind) for record, kind, _ in BAD_RECORDS if record != _but(margin=10**5000)]
    path = write_jsonl(tmp_path / "bad.jsonl", [EXPLICIT, *(record for record, _ in storable), EXPLICIT])
    data = load_preferences(path, on_bad_row="skip")
    assert [bad.kind for bad in data.bad_rows] == [kind for _, kind in storable]
    assert [bad.row for bad in data.bad_rows] == list(range(2, len(storable) + 2))
    assert data.dataset["row"][:] == [1, len(storable) + 2]
    with pytest.raises(BadRow, match=r"bad\.jsonl, row 2: expected an object with .* \(on_bad_row='skip'"):
        load_preferences(path)


def test_a_bad_row_survives_the_way_between_processes():
    bad = pickle.loads(pickle.dumps(BadRow("f", 3, "reason", "kind")))
    assert (bad.file, bad.row, bad.reason, bad.kind, str(bad)) == ("f", 3, "reason", "kind", "f, row 3: reason")


ROWS = [
    {**EXPLICIT, "margin": 0.5, "subset": "one", "id": "a"},
    {"prompt": 'Quote "this",\nplease\u2028now 🦜', "chosen": "\u0000 ok", "rejected": "é", "margin": None,
     "subset": "two", "id": "b"},
]  # fmt: skip


IN_MEMORY = {
    "list": list,
    "Dataset": Dataset.from_list,
    "IterableDataset": lambda rows: Dataset.from_list(rows).to_iterable_dataset(),
    "DatasetDict": lambda rows: DatasetDict(test=Dataset.from_list(rows)),
    "DataFrame": DataFrame,
}


def _save(kind: str, folder: Path) -> object:
    path = folder / f"pairs.{kind}"
    if kind in IN_MEMORY:
        return IN_MEMORY[kind](ROWS)
    if kind in ("jsonl", "jsonl.gz", "json lines.json"):
        content = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()  # no newline at the end
        path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    elif kind in ("json", "json.gz"):
        content = json.dumps(ROWS, indent=1).encode()
        path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    else:
        Dataset.from_list(ROWS).save_to_disk(path)
    return path


@pytest.mark.parametrize(
    "kind", ["jsonl", "jsonl.gz", "json lines.json", "json", "json.gz", "csv", "parquet", "saved", *IN_MEMORY]
)
def test_every_container_gives_the_same_content(kind, tmp_path):
    if kind == "csv" and sys.version_info < (3, 11):
        pytest.skip("the csv module of Python 3.10 has no null characters, of which a row has one")
    data = load_preferences(_save(kind, tmp_path))
    expected = load_preferences(write_jsonl(tmp_path / "expected.jsonl", ROWS))
    assert data.fingerprint == expected.fingerprint and data.bad_rows == []
    pairs = [{key: row[key] for key in ROWS[0]} for row in data.dataset]
    assert pairs == [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    assert data.dataset["row"][:] == [1, 2]


def test_the_fingerprint_is_of_content_order_and_nothing_else(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    first = load_preferences(write_jsonl(tmp_path / "a.jsonl", ROWS)).fingerprint
    assert load_preferences(write_jsonl(tmp_path / "elsewhere" / "b.jsonl", ROWS)).fingerprint == first
    assert load_preferences(write_jsonl(tmp_path / "c.jsonl", ROWS[::-1])).fingerprint != first
    swapped = {**ROWS[0], "chosen": ROWS[0]["rejected"], "rejected": ROWS[0]["chosen"]}
    assert load_preferences(write_jsonl(tmp_path / "d.jsonl", [swapped, ROWS[1]])).fingerprint != first


def test_a_changed_file_is_read_again(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [EXPLICIT])
    stamp = path.stat()
    first = load_preferences(path)
    write_jsonl(path, [{**EXPLICIT, "chosen": "Cyan."}])
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same size, same time: a cache by time would be stale
    assert load_preferences(path).dataset["chosen"][0] == "Cyan."
    assert first.dataset["chosen"][0] == "Blue."


def test_message_lists_in_csv_cells_are_json(tmp_path):
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "chosen", "rejected", "margin"])
        writer.writerow([json.dumps(PROMPT), "[1] Blue.", "[{2}] A car.", "1.5"])
        writer.writerow([repr(PROMPT), "Blue.", "A car.", ""])
        writer.writerow(["Name one.", "Blue.", "A car.", "large"])
    data = load_preferences(path, on_bad_row="skip")
    assert data.dataset["prompt"][0] == PROMPT and data.dataset["margin"][:] == [1.5]
    assert "looks like a message list but is not JSON" in data.bad_rows[0].reason
    assert "'margin' is str 'large'" in data.bad_rows[1].reason


GOOD = json.dumps(EXPLICIT).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD + b"\n{broken\n", r"row 2: broken JSON: .* Correct or remove the line"),
        ("a.jsonl", GOOD + b"\n\n" + GOOD[:-5] + b"\n", r"row 3: broken JSON"),
        ("a.jsonl", b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}', r"row 1: not UTF-8 at byte 13"),
        ("a.jsonl", b'{"chosen": "a", "chosen": "b"}', r"row 1: broken JSON: the key 'chosen' stands twice"),
        ("a.jsonl", b"[" * 100_000, r"row 1: broken JSON"),
        ("a.jsonl", b'{"margin": ' + b"9" * 5000 + b"}", r"row 1: broken JSON: .*limit"),
        ("a.csv", b"prompt,chosen,rejected\na,b\n", r"row 1: 2 cells, but the header names 3 columns"),
        ("a.csv", b"prompt,chosen,rejected\na,b,c,d\n", r"row 1: 4 cells, but the header names 3 columns"),
        ("a.csv", b"prompt,chosen,rejected\na,b,c\na,\xff,d\n", r"row 2: column 'chosen' is not UTF-8"),
        (
            "a.csv",
            b"prompt,good,bad\na,b,c\n",
            r"row 1: no 'chosen'. Its fields are 'prompt', 'good', 'bad'.*--columns chosen=good",
        ),
    ],
)
def test_unreadable_rows_are_named_and_can_be_skipped(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadRow, match=message):
        load_preferences(path)
    good = GOOD if name.endswith("l") else b"x,y,z"
    if b"good,bad" not in content:
        path.write_bytes(content.rstrip(b"\n") + b"\n" + good + b"\n")
        data = load_preferences(path, on_bad_row="skip")
        assert len(data.bad_rows) == 1 and data.dataset["row"][-1] > data.bad_rows[0].row


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl: the file is empty \(0 bytes\)"),
        ("a.jsonl", b"\n \n", r"a\.jsonl: no rows\. Expected at least one"),
        ("a.json", b"[]", r"a\.json: no rows"),
        ("a.json", b"  ", r"expected a JSON array"),
        ("a.json", b'"text"', r"expected a JSON array"),
        ("a.json", b"[" + GOOD + b", {broken]", r"row 2: broken JSON"),
        ("a.json", b"[" + GOOD, r"row 2: broken JSON: expected ',' or '\]'"),
        ("a.json", b"[" + GOOD + b" " + GOOD + b"]", r"row 2: broken JSON: expected ','"),
        ("a.json", b"[" + GOOD + b",]", r"row 2: broken JSON"),
        ("a.json", b"[" + GOOD + b"]\n[]", r"text follows the end of the JSON array after row 1"),
        ("a.json", b"[" + GOOD + b', {"chosen": "\xff"}]', r"not UTF-8"),
        ("a.csv", b"prompt,chosen,rejected\n", r"a\.csv: no rows"),
        ("a.csv", b"prompt,chosen,chosen\na,b,c\n", r"names a column twice: chosen"),
        ("a.csv", b'prompt,chosen,rejected\na,"b,c\n', r"broken CSV after row 0"),
        ("a.parquet", b"PAR1 this is not one", r"not a readable Parquet file"),
        ("a.jsonl.gz", gzip.compress(GOOD, mtime=0)[:-9], r"damaged or cut short after row 0"),
        ("a.jsonl.gz", GOOD, r"damaged or cut short after row 0 \(Not a gzipped file"),
        ("a.txt", GOOD, r"a\.txt: unknown format; expected a name ending in \.jsonl, "),
        ("a", GOOD, r"unknown format"),
    ],
)
def test_unusable_files_are_refused_whatever_happens_to_bad_rows(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    for on_bad_row in ("error", "skip"):
        with pytest.raises(InputError, match=message):
            load_preferences(path, on_bad_row=on_bad_row)


def test_a_file_without_one_usable_row_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{**EXPLICIT, "rejected": "Blue."}] * 5)
    with pytest.raises(InputError, match=r"none of its 5 rows can be used\. row 1: .*identical.*remove it\.$"):
        load_preferences(path, on_bad_row="skip")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.jsonl", r"nowhere\.jsonl: no such file or folder"),
        ("./nowhere", r"no such file or folder"),
        ("/nowhere/at/all", r"no such file or folder"),
        ("too/many/parts", r"no such file or folder"),
        ("has space", r"no such file or folder"),
        ("", r"got an empty name"),
    ],
)
def test_a_missing_source_is_named_without_asking_the_hub(source, message, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("the Hub was asked"))
    with pytest.raises(InputError, match=message):
        load_preferences(source)


def test_splits_of_a_saved_dataset(tmp_path):
    one, two = Dataset.from_list(ROWS), Dataset.from_list(ROWS[:1])
    DatasetDict({"train": one, "test": two}).save_to_disk(tmp_path / "both")
    DatasetDict({"train": one}).save_to_disk(tmp_path / "single")
    one.save_to_disk(tmp_path / "plain")
    assert len(load_preferences(f"{tmp_path}/both[test]").dataset) == 1
    assert len(load_preferences(tmp_path / "single").dataset) == 2
    with pytest.raises(InputError, match=r"no split was named. Name one: .*both\[train\], .*both\[test\]"):
        load_preferences(tmp_path / "both")
    with pytest.raises(InputError, match=r"there is no split 'dev'. Name one: .*both\[train\]"):
        load_preferences(f"{tmp_path}/both[dev]")
    with pytest.raises(InputError, match=r"has no splits. Leave \[train\] out"):
        load_preferences(f"{tmp_path}/plain[train]")
    with pytest.raises(InputError, match=r"has no configurations\. Leave 'en' out"):
        load_preferences(f"{tmp_path}/both[en/test]")
    (tmp_path / "plain" / "dataset_info.json").write_text("{broken")
    with pytest.raises(InputError, match="saved dataset cannot be read"):
        load_preferences(tmp_path / "plain")


def test_arguments_that_would_be_ignored_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [EXPLICIT])
    with pytest.raises(InputError, match=r"a.jsonl is one file and has no splits. Leave \[train\] out"):
        load_preferences(f"{path}[train]")
    with pytest.raises(InputError, match="revision: 'main' was given"):
        load_preferences(path, revision="main")
    with pytest.raises(InputError, match="revision: 'main' was given"):
        load_preferences(tmp_path, revision="main")
    with pytest.raises(InputError, match="on_bad_row: got 'ignore'"):
        load_preferences(path, on_bad_row="ignore")


def test_rows_in_memory_are_named_in_refusals_with_the_way_out():
    rows = [EXPLICIT, {**EXPLICIT, "chosen": None}]
    with pytest.raises(BadRow, match=r"list in memory, row 2: no 'chosen'"):
        load_preferences(rows)
    pairs = load_preferences(rows, on_bad_row="skip").dataset
    assert (pairs["subset"][0], pairs["id"][0]) == ("default", "default/1")
    with pytest.raises(InputError, match=r"several splits, 'train', 'test'. Pass one: data\[NAME\]"):
        load_preferences(DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS)))
    with pytest.raises(InputError, match="data: got a int; expected the name of a source"):
        load_preferences(7)
    with pytest.raises(InputError, match="the data is in memory"):
        load_preferences(rows, revision="main")
    with pytest.raises(InputError, match="list in memory: no rows"):
        load_preferences([])


def test_a_hub_id_is_loaded_with_split_and_revision(monkeypatch):
    asked = {}

    def fake(name, **options):
        asked.update(options, name=name)
        return Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in ROWS])

    monkeypatch.setattr("datasets.load_dataset", fake)
    data = load_preferences("someone/pairs[train]", revision="abc")
    assert asked == {"name": "someone/pairs", "split": "train", "revision": "abc"}
    assert data.dataset["subset"][:] == ["pairs", "pairs"] and data.dataset["file"][0] == "someone/pairs[train]"
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: DatasetDict({"a": Dataset.from_list(ROWS)}))
    assert len(load_preferences("someone/pairs").dataset) == 2

    def fail(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(InputError, match=r"someone/pairs: no such file or folder, and not loadable .* offline"):
        load_preferences("someone/pairs")


@given(st.lists(st.dictionaries(st.text(max_size=3), st.text() | st.floats(allow_nan=False) | st.none()), max_size=6))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_json_arrays_read_in_pieces_equal_the_whole(tmp_path, rows):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    for characters in (1, 3, 1 << 16):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(records, "_CHUNK_CHARACTERS", characters)
            assert [record for _, record in records.open_file(path)[1]] == rows


def test_batches_on_disk_are_bounded_by_rows_and_by_text(tmp_path, monkeypatch):
    monkeypatch.setattr("inform_rm.data.preferences._BATCH_CHARACTERS", 5000)
    rows = [{**EXPLICIT, "prompt": f"{number}" + "x" * (2000 if number % 7 == 0 else 1)} for number in range(1500)]
    data = load_preferences(write_jsonl(tmp_path / "a.jsonl", rows)).dataset
    assert [prompt[0]["content"] for prompt in data["prompt"]] == [row["prompt"] for row in rows]
    chunks = data.data.column("chosen").num_chunks
    assert 1500 * 2000 / 7 / 7000 < chunks < 1500


def test_the_temporary_folder_goes_with_the_process(tmp_path, exit_code_of_fork):
    path = write_jsonl(tmp_path / "a.jsonl", [EXPLICIT])
    (tmp_path / "scratch").mkdir()

    def load_and_end():
        tempfile.tempdir = str(tmp_path / "scratch")
        atexit._clear()  # a fork has what its parent registered, and runs nothing of it at its end
        data = load_preferences(path)
        assert len(list((tmp_path / "scratch").rglob("pairs.arrow"))) == 1 and data.dataset[0]["chosen"] == "Blue."
        atexit._run_exitfuncs()

    assert exit_code_of_fork(load_and_end) == 0
    assert list((tmp_path / "scratch").rglob("pairs.arrow")) == []


@pytest.mark.parametrize("name", ["hh-rlhf/test", "oasst-sample/test"])
def test_real_data_loads_completely_and_unchanged(name, shared_dir):
    path = shared_dir / "data" / f"{name}.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    dataset = load_preferences(path).dataset
    assert len(dataset) == len(rows)
    for row, pair in zip(rows, dataset, strict=True):
        assert [pair[key] for key in ("subset", "id", "margin")] == [row["subset"], row["id"], None]
        if row["prompt"].startswith("Human: "):
            speaker = {"user": "Human", "assistant": "Assistant"}
            turns = [f"{speaker[turn['role']]}: {turn['content']}" for turn in pair["prompt"]]
            assert "".join("\n\n".join(turns).split()) == "".join(row["prompt"].split())
            assert len(turns) == 1 + row["prompt"].count("\n\nHuman: ") + row["prompt"].count("\n\nAssistant: ")
        else:
            assert pair["prompt"] == [{"role": "user", "content": row["prompt"]}]
            assert (pair["chosen"], pair["rejected"]) == (row["chosen"], row["rejected"])


QUESTION = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"prompt": "q", "response_0": "one", "response_1": "two", "better": 1}, "'response_0' and 'response_1'"),
        ({"model_a": "x", "model_b": "y", "talk_a": [QUESTION], "talk_b": [QUESTION]}, "'talk_a' and 'talk_b'"),
        ({"ref_A": "one", "ref_B": "two", "score_A": 1, "score_B": 2, "labels": 0}, "'ref_A' and 'ref_B'"),
        ({"context": [QUESTION], "response1": "one", "response2": "two"}, "'response1' and 'response2'"),
        ({"prompt": "q", "answers": [{"answer": "one"}, {"answer": "two"}]}, "'answers' looks like a list"),
    ],
)  # fmt: skip
def test_two_responses_and_a_verdict_are_refused_with_the_way_out(row, hint):
    with pytest.raises(BadRow, match=hint + r".*docs/how-to/data\.md, 'Two responses and a verdict'"):
        load_preferences([row])


@pytest.mark.parametrize("row", [{"prompt": "q", "score_0": 1, "score_1": 2}, {"messages": [QUESTION, QUESTION]}])
def test_numbers_and_messages_are_not_taken_for_responses(row):
    with pytest.raises(BadRow, match="no 'chosen'") as refused:
        load_preferences([row])
    assert "look" not in str(refused.value)
