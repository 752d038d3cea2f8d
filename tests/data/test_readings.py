"""What people bring: each kind of input with its neighbours is read right, or refused with the way out."""

import csv
import json
import re
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from inform_rm.data.columns import Reading
from inform_rm.data.encoding import encode
from inform_rm.data.messages import to_messages
from inform_rm.data.pairs import BadRow, parse_pair
from inform_rm.data.preferences import load_preferences
from inform_rm.data.response_rows import RowFault, score_rows_or_faults
from inform_rm.errors import InputError

USER, BLUE, CAR = "Name a colour, please.", "Blue.", "A car."
ASKED = [{"role": "user", "content": USER}]
SIDES = {"chosen": BLUE, "rejected": CAR}
DIALOGUE = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": USER},
]
SYSTEM = {"role": "system", "content": "Be brief."}


def reply(text: str) -> dict:
    return {"role": "assistant", "content": text}


def sides(turns: list) -> dict:
    return {"chosen": [*turns, reply(BLUE)], "rejected": [*turns, reply(CAR)]}


def as_text(record: dict) -> dict:
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in record.items()}


def spoken(template: str) -> dict:
    """Both sides of a transcript; {} is the reply."""
    return {"chosen": template.replace("{}", BLUE), "rejected": template.replace("{}", CAR)}


def sharegpt(turns: list) -> list:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]


def columns_of(turns: list) -> dict:
    return {"role": [turn["role"] for turn in turns], "content": [turn["content"] for turn in turns]}


LF = f"\n\nHuman: Hi there\n\nAssistant: Hello\n\nHuman: {USER}\n\nAssistant: {{}}"

# (record, columns, prompt): read, with BLUE and CAR as the replies.
READ = {
    # 01: the prompt has another name, and is mapped
    "question, mapped": ({"question": USER, **SIDES}, {"prompt": "question"}, ASKED),
    "instruction and input, mapped": (
        {"instruction": "Name a", "input": "colour", **SIDES}, {"prompt": "instruction+input"},
        [{"role": "user", "content": "Name a\n\ncolour"}]),
    "instruction without input, mapped": (
        {"instruction": USER, "input": "", **SIDES}, {"prompt": "instruction+input"}, ASKED),
    "instruction with input null, mapped": (
        {"instruction": USER, "input": None, **SIDES}, {"prompt": "instruction+input"}, ASKED),
    "sides of other names, mapped": (
        {"prompt": USER, "response_j": BLUE, "response_k": CAR},
        {"chosen": "response_j", "rejected": "response_k"}, ASKED),
    "a column whose name has a plus": ({"a+b": USER, **SIDES}, {"prompt": "a+b"}, ASKED),
    # 02: columns that change the conversation
    "system": ({"prompt": USER, "system": "Be brief.", **SIDES}, None, [SYSTEM, *ASKED]),
    "empty system": ({"prompt": USER, "system": "", **SIDES}, None, ASKED),
    "system null": ({"prompt": USER, "system": None, **SIDES}, None, ASKED),
    "system_prompt, mapped": (
        {"prompt": USER, "system_prompt": "Be brief.", **SIDES}, {"system": "system_prompt"}, [SYSTEM, *ASKED]),
    "system beside a conversation": ({"system": "Be brief.", **sides(DIALOGUE)}, None, [SYSTEM, *DIALOGUE]),
    "the same system twice": (
        {"system": "Be brief.", "prompt": [SYSTEM, *ASKED], **SIDES}, None, [SYSTEM, *ASKED]),
    "history of pairs": ({"prompt": USER, "history": [["Hi there", "Hello"]], **SIDES}, None, DIALOGUE),
    "history of messages": ({"prompt": USER, "history": DIALOGUE[:2], **SIDES}, None, DIALOGUE),
    "history as JSON text": ({"prompt": USER, "history": '[["Hi there", "Hello"]]', **SIDES}, None, DIALOGUE),
    "empty history": ({"prompt": USER, "history": [], **SIDES}, None, ASKED),
    "system and history": (
        {"prompt": USER, "history": [["Hi there", "Hello"]], "system": "Be brief.", **SIDES}, None,
        [SYSTEM, *DIALOGUE]),
    "images, ignored": ({"prompt": USER, "images": ["a.png"], **SIDES}, {"ignore": "images"}, ASKED),
    "two columns, ignored": (
        {"prompt": USER, "images": ["a"], "tools": [1], **SIDES}, {"ignore": "images+tools"}, ASKED),
    "empty images": ({"prompt": USER, "images": [], "tools": None, **SIDES}, None, ASKED),
    "empty columns as JSON text": ({"prompt": USER, "images": "[]", "tools": "null", **SIDES}, None, ASKED),
    # 03: transcripts in their spellings
    "line feeds": (spoken(LF), None, DIALOGUE),
    "carriage returns": (spoken(LF.replace("\n", "\r\n")), None, DIALOGUE),
    "old Mac line ends": (spoken(LF.replace("\n", "\r")), None, DIALOGUE),
    "no leading line break": (spoken(LF.lstrip()), None, DIALOGUE),
    "one leading line break": (spoken(LF[1:]), None, DIALOGUE),
    "a leading blank": (spoken(" " + LF.lstrip()), None, DIALOGUE),
    "no blank after the names": (spoken(LF.replace(": ", ":")), None, DIALOGUE),
    "three line breaks": (spoken(LF.replace("\n\nA", "\n\n\nA")), None, DIALOGUE),
    "User and Assistant": (spoken(LF.replace("Human", "User")), None, DIALOGUE),
    "in capitals": (spoken(LF.replace("Human", "USER").replace("Assistant", "ASSISTANT")), None, DIALOGUE),
    "with number signs": (
        spoken(LF.replace("Human", "### Human").replace("Assistant", "### Assistant")), None, DIALOGUE),
    "prompt with carriage returns": (
        {"prompt": LF.replace("{}", "").replace("\n", "\r\n"), "chosen": " Blue.", "rejected": " A car."}, None,
        DIALOGUE),
    "the end of a prompt without blank": ({"prompt": LF.replace(" {}", ""), **SIDES}, None, DIALOGUE),
    # 04: the prompt stands in both sides
    "transcript beside its prompt": ({"prompt": LF.replace(" {}", ""), **spoken(LF)}, None, DIALOGUE),
    "transcript beside its prompt, other line ends": (
        {"prompt": LF.replace(" {}", ""), **spoken(LF.replace("\n", "\r\n"))}, None, DIALOGUE),
    "transcript beside its question": ({"prompt": USER, **spoken(LF)}, None, DIALOGUE),
    "transcript beside its messages": ({"prompt": DIALOGUE, **spoken(LF)}, None, DIALOGUE),
    "plain text that begins with the prompt": (
        {"prompt": USER, "chosen": f"{USER} {BLUE}", "rejected": f"{USER}\n{CAR}"}, None, ASKED),
    "messages beside their question": ({"prompt": USER, **sides(DIALOGUE)}, None, DIALOGUE),
    "messages beside a prompt of other blanks": ({"prompt": f" {USER}\n", **sides(ASKED)}, None, ASKED),
    # 05: message lists as JSON text
    "JSON sides": (as_text(sides(DIALOGUE)), None, DIALOGUE),
    "JSON sides and prompt": (as_text({"prompt": ASKED, **sides(ASKED)}), None, ASKED),
    "JSON sides, prompt as text": ({"prompt": USER, **as_text(sides(ASKED))}, None, ASKED),
    "JSON prompt": ({"prompt": json.dumps(DIALOGUE), **SIDES}, None, DIALOGUE),
    "JSON with indents": ({"prompt": json.dumps(DIALOGUE, indent=2), **SIDES}, None, DIALOGUE),
    "JSON of one message a side": ({"prompt": USER, **as_text({k: reply(v) for k, v in SIDES.items()})}, None, ASKED),
    "JSON of ShareGPT": (
        as_text({k: sharegpt(v) for k, v in sides(DIALOGUE).items()}), None, DIALOGUE),
    # 15: whole numbers with a gap
    "id 1.0": ({"prompt": USER, **SIDES, "id": 1.0}, None, ASKED),
    "id NaN": ({"prompt": USER, **SIDES, "id": float("nan")}, None, ASKED),
    # 20: other containers of messages
    "dict of lists": ({k: columns_of(v) for k, v in sides(DIALOGUE).items()}, None, DIALOGUE),
    "dict of lists as prompt": ({"prompt": columns_of(DIALOGUE), **SIDES}, None, DIALOGUE),
    "ShareGPT sides, conversations mapped": (
        {"conversations": sharegpt(DIALOGUE), **{k: sharegpt([reply(v)])[0] for k, v in SIDES.items()}},
        {"prompt": "conversations"}, DIALOGUE),
    "ShareGPT whole sides": ({k: sharegpt(v) for k, v in sides(DIALOGUE).items()}, None, DIALOGUE),
    "empty system message": (
        {"prompt": [{"role": "system", "content": ""}, *ASKED], **SIDES}, None, ASKED),
    "system message null": (sides([{"role": "system", "content": None}, *ASKED]), None, ASKED),
    "content in one part of text": (
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": USER}]}], **SIDES}, None, ASKED),
    "one message for each side": ({"prompt": USER, **{k: reply(v) for k, v in SIDES.items()}}, None, ASKED),
    "keys of a struct that are null": (
        {"prompt": [{**ASKED[0], "tool_calls": None, "name": None}], **SIDES}, None, ASKED),
}  # fmt: skip


@pytest.mark.parametrize("kind", READ)
def test_what_people_bring_is_read_right(kind):
    record, columns, prompt = READ[kind]
    pair = parse_pair(record, "f.jsonl", 1, columns=columns)
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, BLUE, CAR)


# (record, columns, kind of the fault, what it must say: the column and the way out)
REFUSED = {
    "question": ({"question": USER, **SIDES}, None, "no prompt", r"'question' may be it: .*--columns prompt=question"),
    "instruction and input": (
        {"instruction": "a", "input": "b", **SIDES}, None, "no prompt", r"--columns prompt=instruction\+input"),
    "query": ({"query": USER, **SIDES}, None, "no prompt", "--columns prompt=query"),
    "conversations": (
        {"conversations": sharegpt(ASKED), **{k: reply(v) for k, v in SIDES.items()}}, None, "no prompt",
        "--columns prompt=conversations"),
    "a name that nobody knows": ({"frage": USER, **SIDES}, None, "no prompt", "Not read: 'frage'.*prompt=COLUMN"),
    "sides that begin alike": (
        {"chosen": "It is 1", "rejected": "It is 0"}, None, "no prompt", "on demand: columns prompt=shared_prefix"),
    "sides of other names": (
        {"prompt": USER, "chosen_response": BLUE, "rejected_response": CAR}, None, "missing field",
        "--columns chosen=chosen_response rejected=rejected_response"),
    "sides of names that nobody knows": (
        {"prompt": USER, "besser": BLUE, "schlechter": CAR}, None, "missing field",
        "--columns chosen=COLUMN rejected=COLUMN"),
    "a mapped column that is not there": (
        {"prompt": USER, **SIDES}, {"prompt": "question"}, "missing field", "no column 'question', which columns"),
    "images": ({"prompt": USER, "images": ["a.png"], **SIDES}, None, "unsupported", "--columns ignore=images"),
    "images and settings of the template": (
        {"prompt": USER, "images": ["a"], "chat_template_kwargs": {"x": 1}, **SIDES}, None, "unsupported",
        r"'images', 'chat_template_kwargs' are not encoded.*ignore=images\+chat_template_kwargs"),
    "tools": ({"prompt": USER, "tools": [{"name": "f"}], **SIDES}, None, "unsupported", "--columns ignore=tools"),
    "system_prompt": (
        {"prompt": USER, "system_prompt": "x", **SIDES}, None, "unread column", "--columns system=system_prompt"),
    "chat_history": (
        {"prompt": USER, "chat_history": [["a", "b"]], **SIDES}, None, "unread column", "history=chat_history"),
    "input beside prompt": (
        {"prompt": USER, "input": "x", **SIDES}, None, "unread column", r"prompt=prompt\+input.*ignore=input"),
    "context beside prompt": ({"prompt": USER, "context": "x", **SIDES}, None, "unread column", "ignore=context"),
    "two systems": (
        {"system": "x", "prompt": [SYSTEM, *ASKED], **SIDES}, None, "sides diverge", "'system' is not the system"),
    "system that is no text": ({"prompt": USER, "system": ["x"], **SIDES}, None, "wrong type", "'system' is list"),
    "history before several turns": (
        {"prompt": DIALOGUE, "history": [["a", "b"]], **SIDES}, None, "sides diverge", "which comes first"),
    "history that ends with the user": (
        {"prompt": USER, "history": ASKED, **SIDES}, None, "invalid roles", "last turn of 'history' is 'user'"),
    "history of other things": (
        {"prompt": USER, "history": [1], **SIDES}, None, "wrong type", "message 1 of 'history'"),
    "single line breaks": (
        spoken("Human: Hi\nAssistant: {}"), None, "transcript", "without an empty line before it.*list of messages"),
    "turns on one line": (spoken("### Human: Hi ### Assistant: {}"), None, "transcript", "cannot be told apart"),
    "a prompt with single line breaks": (
        {"prompt": "User: Hi\nAssistant: Hello\nUser: x", **SIDES}, None, "transcript", "list of messages"),
    "a marker without blank": ({"prompt": "Human:innen sagen", **SIDES}, None, "transcript", "or words"),
    "one side is a transcript": (
        {"chosen": LF.replace("{}", BLUE), "rejected": CAR}, None, "no prompt", "only one side is a transcript"),
    "rendered by ChatML": (
        {"prompt": "<|im_start|>user\nHi<|im_end|>\n", **SIDES}, None, "rendered text", "Give its messages"),
    "rendered by Llama": ({"prompt": "<s>[INST] Hi [/INST]", **SIDES}, None, "rendered text", "Give its messages"),
    "replies rendered by ChatML": (
        {"prompt": USER, **{k: f"<|im_start|>assistant\n{v}<|im_end|>\n" for k, v in SIDES.items()}}, None,
        "rendered text", "'chosen' begins with"),
    "replies rendered by Zephyr": (
        {"prompt": USER, **{k: f"<|assistant|>\n{v}</s>" for k, v in SIDES.items()}}, None, "rendered text", "Give"),
    "turns after the prompt": (
        {"prompt": DIALOGUE[:1], **{k: v[1:] for k, v in sides(DIALOGUE).items()}}, None, "sides diverge",
        "goes on after it. Move all turns"),
    "sides rendered by Gemma": (
        spoken("<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n{}"), None, "rendered text", "messages"),
    "one side begins with the prompt": (
        {"prompt": USER, "chosen": f"{USER} {BLUE}", "rejected": CAR}, None, "sides diverge", "columns sides=reply"),
    "one transcript beside a question": (
        {"prompt": USER, "chosen": LF.replace("{}", BLUE), "rejected": CAR}, None, "sides diverge", "only 'chosen'"),
    "a transcript about something else": (
        {"prompt": LF.replace(" {}", "").replace("Hi", "Ho"), **spoken(LF)}, None, "sides diverge",
        "is not the prompt"),
    "one side as JSON": (
        {"prompt": USER, "chosen": json.dumps([reply(BLUE)]), "rejected": CAR}, None, "wrong type", "same form"),
    "Python's repr of messages": ({"prompt": repr(ASKED), **SIDES}, None, "unreadable", "Write it with json.dumps"),
    "JSON cut short": ({"prompt": json.dumps(ASKED)[:-5], **SIDES}, None, "unreadable", "json.dumps"),
    "JSON written twice": ({"prompt": json.dumps(json.dumps(ASKED)), **SIDES}, None, "unreadable", "JSON twice"),
    "id 1.5": ({"prompt": USER, **SIDES, "id": 1.5}, None, "wrong type", "'id' is float 1.5"),
    "lists of unequal length": (
        {"prompt": {"role": ["user"], "content": ["a", "b"]}, **SIDES}, None, "wrong type", "unequal lengths"),
    "a dict that is no message": ({"prompt": {"text": "a"}, **SIDES}, None, "wrong type", "'prompt' is dict"),
    "ShareGPT with another speaker": (
        {"prompt": [{"from": "bing", "value": "a"}], **SIDES}, None, "invalid roles", "is from 'bing'; expected"),
    "content in two parts": (
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 2}], **SIDES}, None, "wrong type",
        "a list of one part of type 'text'"),
    "content that is an image": (
        {"prompt": [{"role": "user", "content": [{"type": "image", "text": "a"}]}], **SIDES}, None, "wrong type",
        "expected text"),
    "nothing but an empty system message": (
        {"prompt": [{"role": "system", "content": " "}], **SIDES}, None, "empty field", "nothing but an empty system"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_be_a_guess_is_refused_with_the_way_out(kind):
    record, columns, fault, message = REFUSED[kind]
    with pytest.raises(BadRow, match=rf"(?s)f\.jsonl, row 7: .*{message}") as caught:
        parse_pair(record, "f.jsonl", 7, columns=columns)
    assert caught.value.kind == fault


@pytest.mark.parametrize(
    "text", ['[{"role": "manager", "name": "Ann"}]', '{"content": "x"}', '[{"from": "Rome", "to": "Oslo"}]', "[1, 2]"]
)
def test_a_reply_may_be_json_of_something_else(text):
    pair = parse_pair({"prompt": USER, "chosen": text, "rejected": CAR}, "f.jsonl", 1)
    assert pair.chosen == text


def test_replies_may_begin_like_a_transcript_or_with_the_words_of_a_short_prompt():
    pair = parse_pair({"prompt": USER, "chosen": "Human: who knows?", "rejected": "User: not I."}, "f.jsonl", 1)
    assert (pair.chosen, pair.rejected) == ("Human: who knows?", "User: not I.")
    pair = parse_pair({"prompt": "Hello", "chosen": "Hello! How are you?", "rejected": "Hellos."}, "f.jsonl", 1)
    assert (pair.prompt[0]["content"], pair.chosen) == ("Hello", "Hello! How are you?")


def test_words_of_another_template_are_counted():
    reading = Reading()
    for prompt, end in ((USER, "<|im_end|>\n"), (f"A chat. USER: {USER} ASSISTANT:", ""), ("### Response:\n", "")):
        replies = {side: text + end for side, text in SIDES.items()}
        parse_pair({"prompt": prompt, **replies}, "f.jsonl", 1, reading=reading)
    assert reading.layouts == {
        "a reply ends with '<|im_end|>', which a chat template writes, too": 1,
        "prompt asks for a reply in another template's words, and is read as a turn of the user": 2,
    }


def test_an_end_token_in_a_response_is_counted_and_scored_as_it_stands(tmp_path):
    reading = Reading()
    path = write(tmp_path / "rows.jsonl", [{"prompt": USER, "response": text} for text in (BLUE, f"{BLUE}</s>")])
    rows = list(score_rows_or_faults(path, reading=reading))
    assert [row.response for row in rows] == [BLUE, f"{BLUE}</s>"]
    assert reading.layouts == {"a reply ends with '</s>', which a chat template writes, too": 1}


def test_ids_of_whole_numbers_lose_their_point_and_gaps_are_numbered_by_row():
    ids = [
        parse_pair({"prompt": USER, **SIDES, "id": id}, "f.jsonl", 4).id for id in (1.0, 7, "a", float("nan"), None)
    ]
    assert ids == ["1", "7", "a", "f/4", "f/4"]


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_whether_sides_hold_the_prompt_is_decided_by_most_rows_of_the_source(tmp_path):
    def rows(kinds: str) -> list:
        prompts = [f"Is {number} a large number?" for number in range(len(kinds))]
        starts = {"w": ("{} ", "{} "), "o": ("{} ", ""), "r": ("", "")}
        return [
            {"prompt": prompt, **{side: starts[kind][at].format(prompt) + text for at, (side, text) in
                                  enumerate(SIDES.items())}}
            for kind, prompt in zip(kinds, prompts, strict=True)
        ]  # fmt: skip

    whole = load_preferences(write(tmp_path / "whole.jsonl", rows("wwwwww")))
    assert set(whole.dataset["chosen"]) == {BLUE}
    assert whole.reading.layouts["the prompt is cut off both sides, which begin with it"] == 6
    # One reply of many repeats its question, on one side or on both: all are replies, and it is said.
    replies = load_preferences(write(tmp_path / "replies.jsonl", rows("r" * 19 + "o" + "r" * 10 + "w")))
    assert replies.dataset["chosen"][19] == f"Is 19 a large number? {BLUE}" and replies.dataset["rejected"][19] == CAR
    assert replies.reading.layouts["a reply begins with the prompt, and is left as it is"] == 2
    for kinds, row in (("wwwwow", 5), ("wwwwrw", 5), ("rrow", 3), ("rrrw", 4)):
        path = write(tmp_path / "mixed.jsonl", rows(kinds))
        with pytest.raises(BadRow, match=rf"row {row}: .*Say columns sides=reply or sides=whole"):
            load_preferences(path)
        assert len(load_preferences(path, columns={"sides": "reply"}).dataset) == len(kinds)
    with pytest.raises(BadRow, match="row 1: no side begins with the prompt"):
        load_preferences(write(tmp_path / "not.jsonl", rows("rr")), columns={"sides": "whole"})


def test_what_was_read_and_what_was_not_is_counted(tmp_path):
    rows = [{"question": USER, **SIDES, "score": 1, "note": None, "system": "Be brief."}, {"question": USER, **SIDES}]
    data = load_preferences(write(tmp_path / "a.jsonl", rows), columns={"prompt": "question", "ignore": "score"})
    assert data.reading.to_dict() == {
        "columns": {"prompt": "question", "chosen": "chosen", "rejected": "rejected", "system": "system"},
        "layouts": {"'system' is the first message": 1},
        "unread_columns": {"score": 1},
    }


def test_wrong_mappings_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": USER, **SIDES}])
    for columns, message in (
        ({"promt": "prompt"}, "'promt' is no field; expected FIELD=COLUMN with one of prompt, chosen"),
        ({"prompt": ""}, "'prompt' is ''; expected the name of a column"),
        ({"margin": "scroe"}, "columns names 'scroe' for 'margin', which no row has"),
        ({"sides": "both"}, "sides is 'both'; expected one of reply, whole"),
    ):
        with pytest.raises(InputError, match=message):
            load_preferences(path, columns=columns)


def test_rows_to_score_are_read_by_the_same_rules(tmp_path):
    def read(row: dict, **options):
        (found,) = score_rows_or_faults(write(tmp_path / "rows.jsonl", [row]), **options)
        return found

    reading = Reading()
    row = read({"question": USER, "answer": BLUE, "system": "Be brief.", "x": 1}, reading=reading,
               columns={"prompt": "question", "response": "answer"})  # fmt: skip
    assert (row.prompt, row.response, reading.to_dict()["unread_columns"]) == ([SYSTEM, *ASKED], BLUE, {"x": 1})
    assert read({"prompt": json.dumps(DIALOGUE), "response": reply(BLUE)}).prompt == DIALOGUE
    assert read({"prompt": LF.replace(" {}", ""), "response": ""}).response == ""
    for bad, message in (
        ({"question": USER, "response": BLUE}, "--columns prompt=question"),
        ({"prompt": USER, "completion": BLUE}, "--columns response=completion"),
        ({"prompt": USER, "response": BLUE, "images": ["a"]}, "--columns ignore=images"),
    ):
        found = read(bad)
        assert isinstance(found, RowFault) and re.search(rf"row 1: .*{message}", found.reason)


# Every layout in every container gives the same token ids.

text = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Cf", "Cn", "Co")), min_size=1, max_size=12
).filter(lambda found: found.strip() and found == found.strip())
blanks = st.sampled_from(["", " ", "\n", "\r\n", "  \t"])
conversations = st.tuples(
    st.booleans(), st.lists(st.tuples(text, text), max_size=2), text, text, text, blanks, blanks
).filter(lambda parts: parts[3] != parts[4])


def layouts(system: bool, turns: list, question: str, chosen: str, rejected: str) -> dict[str, list[dict]]:
    """The rows that mean the same, by their container's needs: nested values, or text only."""
    earlier = [message for one, other in turns for message in (
        {"role": "user", "content": one}, reply(other))]  # fmt: skip
    prompt = [*earlier, {"role": "user", "content": question}]
    lead = [SYSTEM] if system else []
    whole = {"chosen": [*lead, *prompt, reply(chosen)], "rejected": [*lead, *prompt, reply(rejected)]}
    texts = {"chosen": chosen, "rejected": rejected}
    beside = {"system": SYSTEM["content"]} if system else {}
    nested = [
        {"prompt": [*lead, *prompt], **texts},
        whole,
        {"prompt": [*lead, *prompt], **{key: [reply(value)] for key, value in texts.items()}},
        {"prompt": [*lead, *prompt], **whole},
        {**beside, "prompt": prompt, **texts},
        {**beside, "prompt": question, "history": [list(turn) for turn in turns], **texts},
        {key: sharegpt(value) for key, value in whole.items()},
        {key: columns_of(value) for key, value in whole.items()},
    ]
    speaker = {"user": "Human", "assistant": "Assistant"}
    transcript = "".join(f"\n\n{speaker[message['role']]}: {message['content']}" for message in prompt)
    plain = [
        as_text(row) for row in nested[:7]
    ] + [
        {**beside, "prompt": transcript + "\n\nAssistant:", **texts},
        {**beside, **{key: f"{transcript}\n\nAssistant: {value}" for key, value in texts.items()}},
        {**beside, **{key: f"{transcript}\n\nAssistant: {value}".replace("\n", "\r\n")
                      for key, value in texts.items()}},
    ]  # fmt: skip
    return {"nested": nested, "text": plain}


def save(rows: list, kind: str, folder: Path) -> str:
    path = folder / f"rows.{kind}"
    if kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif kind == "saved":
        DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(path)
        return f"{path}[train]"
    else:
        write(path, rows)
    return str(path)


def ids_of(pair, tokenizer):
    """Token ids of both sides of a row of a data set."""
    return [encode(tokenizer, pair["prompt"], pair[side]).input_ids for side in ("chosen", "rejected")]


@given(parts=conversations)
@settings(max_examples=15)
def test_every_layout_gives_the_same_token_ids(parts, tokenizer):
    *parts, before, after = parts
    rows = [json.loads(json.dumps(row)) for rows in layouts(*parts).values() for row in rows]
    pairs = [vars(parse_pair(row, "f", 1, columns={"sides": "reply"})) for row in rows]
    expected = ids_of(pairs[0], tokenizer)
    for row, pair in zip(rows, pairs, strict=True):
        same_texts = [(pair["prompt"], pair[side]) == (pairs[0]["prompt"], pairs[0][side]) for side in SIDES]
        assert all(same_texts) or ids_of(pair, tokenizer) == expected, row
    # Blanks around the question of plain text are the user's own, and stay.
    pair = parse_pair({"prompt": before + parts[2] + after, "chosen": parts[3], "rejected": parts[4]}, "f", 1,
                      columns={"sides": "reply"})  # fmt: skip
    assert pair.prompt[-1]["content"] == before + parts[2] + after


@pytest.mark.parametrize("kind", ["csv", "parquet", "saved"])  # the others hold the same JSON
def test_every_layout_in_a_container_with_types_gives_the_same_token_ids(kind, tokenizer, tmp_path):
    parts = True, [("Grüße", 'Two\nlines, "quoted"')], "A, b?", "[1] Yes.", "No"
    expected = None
    for form, rows in layouts(*parts).items():
        for number, row in enumerate(rows if (form, kind) != ("nested", "csv") else []):
            place = tmp_path / f"{form}{number}"
            place.mkdir()
            ids = ids_of(load_preferences(save([row], kind, place), columns={"sides": "reply"}).dataset[0], tokenizer)
            expected = expected or ids
            assert ids == expected, (form, number)


def test_splits_have_one_notation_for_files_folders_and_saved_data_sets(tmp_path):
    rows = [{"prompt": f"Is {number} large?", **SIDES} for number in range(5)]
    write(tmp_path / "flat" / "train.jsonl", rows[:3])
    write(tmp_path / "flat" / "test.jsonl", rows[3:])
    write(tmp_path / "shards" / "data" / "train-00000-of-00002.jsonl", rows[:2])
    write(tmp_path / "shards" / "data" / "train-00001-of-00002.jsonl", rows[2:3])
    write(tmp_path / "shards" / "data" / "test-00000-of-00001.jsonl", rows[3:])
    DatasetDict({"train": Dataset.from_list(rows[:3]), "test": Dataset.from_list(rows[3:])}).save_to_disk(
        tmp_path / "saved"
    )
    for name in ("flat", "shards", "saved"):
        train = load_preferences(f"{tmp_path / name}[train]")
        assert [row[0]["content"] for row in train.dataset["prompt"]] == [row["prompt"] for row in rows[:3]]
        assert set(train.dataset["subset"]) == {name} and len(set(train.dataset["id"])) == 3
        assert len(load_preferences(f"{tmp_path / name}[test]").dataset) == 2
        with pytest.raises(InputError, match=rf"no split was named. Name one: .*{name}\[t"):
            load_preferences(tmp_path / name)
        with pytest.raises(InputError, match=rf"there is no split 'dev'. Name one: .*{name}\[t"):
            load_preferences(f"{tmp_path / name}[dev]")
    with pytest.raises(BadRow, match=r"train-00001-of-00002\.jsonl, row 1: "):
        write(tmp_path / "shards" / "data" / "train-00001-of-00002.jsonl", [{"prompt": "x", **SIDES, "rejected": ""}])
        load_preferences(f"{tmp_path / 'shards'}[train]")


def test_configurations_of_a_folder_are_named_before_the_split(tmp_path):
    write(tmp_path / "d" / "en" / "train.jsonl", [{"prompt": USER, **SIDES}])
    write(tmp_path / "d" / "de" / "train.jsonl", [{"prompt": "Farbe?", **SIDES}])
    (tmp_path / "d" / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files: en/train.jsonl\n- config_name: de\n"
        "  data_files: de/train.jsonl\n---\n"
    )
    assert load_preferences(f"{tmp_path}/d[de/train]").dataset["prompt"][0][0]["content"] == "Farbe?"
    with pytest.raises(InputError, match=r"not clear what to read .*\['en', 'de'\].*\[CONFIG/SPLIT\]"):
        load_preferences(tmp_path / "d")


def test_a_file_whose_name_has_brackets_is_that_file(tmp_path):
    path = write(tmp_path / "pairs[train].jsonl", [{"prompt": USER, **SIDES}])
    assert len(load_preferences(path).dataset) == 1


def test_a_prompt_in_python_takes_every_form():
    for prompt in (DIALOGUE, json.dumps(DIALOGUE), LF.replace(" {}", ""), sharegpt(DIALOGUE), columns_of(DIALOGUE)):
        assert to_messages(prompt) == DIALOGUE
