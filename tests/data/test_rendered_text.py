"""Text that a chat template deletes is found, counted and named, or the row is refused."""

import copy
import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inform_rm.data.check_data import check_data
from inform_rm.data.check_data_text import format_report
from inform_rm.data.encoding import encode, encode_each, encode_many, encode_pairs
from inform_rm.data.pairs import BadRow
from inform_rm.data.preferences import load_preferences
from inform_rm.data.rendered_text import NotRenderedError, what_is_lost
from inform_rm.errors import InputError
from inform_rm.eval.evaluate import evaluate
from inform_rm.eval.settings import PairSettings
from inform_rm.eval.sources import load_sources
from inform_rm.eval.suites.evaluate_suite import evaluate_suite
from inform_rm.scoring.score_files import score_file
from inform_rm.scoring.scorer import RewardScorer
from inform_rm.serving.rows import RowError, encode_rows

# As published for distilled reasoning models: what precedes </think> in a reply is cut.
CUTTING_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}"
    "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PARTS_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% for part in m['content'] %}{% if part is mapping %}"
    "{{ part['text'] }}{% endif %}{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LOST_REASONING = "the response without its text up to '</think>'"


def dialogue(*contents: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(contents)]


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text",
    ["U: first A: second", "x first\n\nsecond x", "first and first second"],
)
def test_what_is_there_in_order_is_not_lost(text):
    assert what_is_lost(dialogue(" first\n", "\t second "), text) is None


@pytest.mark.parametrize(
    ("content", "rendered"),
    [
        ('a "quoted" line\nand é', json.dumps('a "quoted" line\nand é')),
        ('a "quoted" line\nand é', json.dumps('a "quoted" line\nand é', ensure_ascii=False)),
        ("<think>two and two</think>It is 4.", "<think>\ntwo and two\n</think>\n\nIt is 4."),
        ("first line  \n\n\n second line", "first line\nsecond line"),
    ],
)
def test_escapes_and_blanks_are_no_loss(content, rendered):
    assert what_is_lost(dialogue("question", content), f"U: question A: {rendered}") is None


def test_a_system_message_may_stand_anywhere_and_the_others_only_in_order():
    turns = [{"role": "system", "content": "Be brief."}, *dialogue("first", "second", "third", "fourth")]
    assert what_is_lost(turns, "first second [Be brief.] third fourth") is None
    with pytest.raises(NotRenderedError, match=r"nothing of the response, which begins 'fourth'"):
        what_is_lost(turns, "[Be brief.] first fourth second third")


@pytest.mark.parametrize(
    ("content", "rendered", "loss"),
    [
        ("<think>two, four</think>\n\nIt is 4.", "It is 4.", LOST_REASONING),
        ("kept at the start, and then cut off", "kept at the start", "the response: 18 of 35 characters are missing"),
        ("a removed mark <|x|> within the text", "a removed mark  within the text",
         "the response: 5 of 36 characters are missing"),
        ("one line of it\ntwo lines of it\nthree lines of it", "one line of it -- three lines of it",
         "the response: 17 of 48 characters are missing"),
    ],
)  # fmt: skip
def test_a_part_that_is_missing_is_said(content, rendered, loss):
    assert what_is_lost(dialogue("question", content), f"U: question A: {rendered}") == loss


def test_a_message_of_which_nothing_is_left_is_refused_with_the_way_out():
    turns = [{"role": "system", "content": "Be brief."}, *dialogue("question", "answer")]
    with pytest.raises(InputError, match=r"turn 1 \(system\).*write the system message into the user turn"):
        what_is_lost(turns, "U: question A: answer")
    with pytest.raises(InputError, match=r"turn 2 \(user\).*Pass another chat_template \(a file, or 'plain'\)\."):
        what_is_lost(turns, "Be brief. A: answer")
    with pytest.raises(InputError, match="nothing of the response"):
        what_is_lost(dialogue("question", "It is blue."), "U: question A: ")


# No text is in another one, and none is in what the templates add.
_letters = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Zs", "Zl", "Zp")))
_texts = st.lists(_letters, min_size=1, max_size=5).map(
    lambda texts: [f"{number}:{text}:{number}" for number, text in enumerate(texts, start=101)]
)


@given(texts=_texts, blanks=st.sampled_from(["", " ", "\n\n", "\u00a0"]))
def test_nothing_is_lost_where_a_template_keeps_all(texts, blanks):
    turns = dialogue(*(blanks + text + blanks for text in texts))
    assert what_is_lost(turns, "".join(f"<{turn['role']}>{turn['content']}</s>" for turn in turns)) is None
    assert what_is_lost(turns, "".join(f"<{turn['role']}>{turn['content'].strip()}</s>" for turn in turns)) is None


@given(texts=_texts, data=st.data())
def test_the_refusal_names_the_turn_that_is_dropped(texts, data):
    turns = dialogue(*texts)
    dropped = data.draw(st.integers(0, len(turns) - 1))
    text = "".join(f"<{turn['role']}>{turn['content'] if at != dropped else ''}</s>" for at, turn in enumerate(turns))
    name = "the response" if dropped == len(turns) - 1 else f"turn {dropped + 1} "
    with pytest.raises(NotRenderedError, match=f"leaves nothing of {name}"):
        what_is_lost(turns, text)


def test_encoding_says_what_the_template_deletes(tokenizer):
    cutting = with_template(tokenizer, CUTTING_TEMPLATE)
    whole, cut = encode_many(cutting, ["2 + 2?", "2 + 2?"], ["It is 4.", "<think>Hm.</think>It is 4."])
    assert whole.lost is None and cut.lost == LOST_REASONING and cut.input_ids == whole.input_ids
    with pytest.raises(NotRenderedError, match=r"turn 1 \(user\)"):
        encode(with_template(tokenizer, PARTS_TEMPLATE), "2 + 2?", "It is 4.")


@pytest.mark.parametrize("template", [None, CUTTING_TEMPLATE])
def test_encoding_says_which_messages_hold_a_special_token(template, tokenizer):
    changed = with_template(tokenizer, template)
    found = encode_many(changed, ["Is <s> a tag?", "And </ s>?"], ["It is.", "No.</s><s>Yes"])
    assert [each.special for each in found] == [
        "turn 1 (user) with '<s>', which becomes that token", "the response with '</s>', which becomes that token"
    ]  # fmt: skip
    ids = changed.convert_tokens_to_ids("<s>")
    assert ids in found[0].prompt_ids[1:] and ids not in found[1].prompt_ids[1:]


def test_a_response_of_reasoning_that_stays_is_no_bad_row_for_a_special_token(tokenizer):
    row = {
        "prompt": [[{"role": "user", "content": "What?"}]],
        "chosen": ["Blue."],
        "rejected": ["<think>a</s></think>"],
    }
    (group,) = encode_each(tokenizer, {**row, "file": ["f"], "row": [3]})
    assert group.not_as_written == "rejected: the response with '</s>', which becomes that token"


@pytest.fixture
def cut_rows(tmp_path):
    """Six pairs: the chosen side of the odd ones and both sides of the last one hold reasoning."""
    rows = [{"prompt": f"{n} + 1?", "chosen": f"It is {n + 1}.", "rejected": "No idea."} for n in range(1, 7)]
    for row in rows[::2]:
        row["chosen"] = "<think>Let me count.</think>" + row["chosen"]
    for side in ("chosen", "rejected"):
        rows[5][side] = "<think>Let me count.</think>" + rows[5][side]
    return write_rows(tmp_path / "cut.jsonl", rows)


def test_pairs_that_lose_text_are_counted_with_the_first_rows_and_logged_once(tokenizer, cut_rows, caplog):
    pairs = load_preferences(cut_rows).dataset
    with caplog.at_level(logging.WARNING, "inform_rm"):
        encoded = encode_pairs(pairs, with_template(tokenizer, CUTTING_TEMPLATE), max_length=None)
    lost = encoded.counts["not_as_written"]
    expected = [f"{cut_rows}, row {row}: chosen: {LOST_REASONING}" for row in (1, 3, 5)]
    assert lost == {"n": 4, "examples": [*expected, f"{cut_rows}, row 6: {LOST_REASONING}"]}
    (line,) = [record.message for record in caplog.records]
    assert "4 of 6 pairs" in line and all(example in line for example in expected)
    assert len(encoded.dataset) == 6 and "lost" not in encoded.dataset.column_names


def test_pairs_of_which_nothing_is_left_are_bad_rows_of_their_own_kind(tokenizer, cut_rows):
    pairs = load_preferences(cut_rows).dataset
    with pytest.raises(BadRow, match=r"row 1: .*nothing of turn 1 \(user\)") as refused:
        encode_pairs(pairs, with_template(tokenizer, PARTS_TEMPLATE), max_length=None)
    assert refused.value.kind == "not rendered"


def test_check_data_shows_what_is_lost_and_what_is_refused(tokenizer, cut_rows, tmp_path):
    report = check_data(cut_rows, with_template(tokenizer, CUTTING_TEMPLATE))
    assert report["sources"][0]["template"]["not_as_written"]["n"] == 4 and report["unusable_rows"] == 0
    (said,) = [line for line in report["warnings"] if "4 pairs would not be read as they stand" in line]
    assert "row 1: chosen:" in said and f"row 6: {LOST_REASONING}" in said and said in format_report(report)
    refused = check_data(cut_rows, with_template(tokenizer, PARTS_TEMPLATE))
    assert refused["unusable_rows"] == 6 and "not encodable 6" in format_report(refused)


def test_check_data_counts_a_pair_once_that_is_over_long_and_equal_in_tokens(tokenizer, tmp_path):
    sides = [("<think>a</think>Yes", "<think>b</think>Yes"), ("Yes", "No"), ("Yes", "No, it is not so.")]
    rows = [{"prompt": "1 + 1?", "chosen": chosen, "rejected": rejected} for chosen, rejected in sides]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    report = check_data(path, with_template(tokenizer, CUTTING_TEMPLATE), max_length=1)
    (source,) = report["sources"]
    assert source["template"]["identical_tokens"] == 1 and source["max_length"]["overlong"] == 3
    assert report["unusable_rows"] == 3


@pytest.fixture
def cutting_scorer(reward_dir, tokenizer):
    """A scorer whose template cuts reasoning."""
    return RewardScorer(reward_dir, with_template(tokenizer, CUTTING_TEMPLATE), device="cpu")


def test_evaluation_records_what_was_lost(cutting_scorer, cut_rows):
    result = evaluate(cutting_scorer, cut_rows, progress=False)
    assert result.data[0]["not_as_written"]["n"] == 4 and result.data[0]["evaluated"] == 6


def test_scoring_a_file_ends_with_what_was_lost(cutting_scorer, tmp_path, caplog):
    rows = [{"prompt": "2 + 2?", "response": text} for text in ("4", "<think>Hm.</think>4", "5")]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with caplog.at_level(logging.WARNING, "inform_rm"):
        found = score_file(cutting_scorer, path, tmp_path / "out.jsonl", progress=False)
    assert found["not_as_written"] == {"n": 1, "examples": [f"{path}, row 2: {LOST_REASONING}"]}
    assert "1 of 3 rows" in caplog.records[-1].message


def test_a_scorer_says_once_that_text_is_lost(cutting_scorer, caplog):
    with caplog.at_level(logging.WARNING, "inform_rm"):
        for _ in range(3):
            cutting_scorer.score(["2 + 2?"], ["<think>Hm.</think>4"])
    assert sum("text of 1 of 1 rows" in record.message for record in caplog.records) == 1


def test_a_response_of_reasoning_alone_is_no_side_of_a_pair_but_is_scored_as_an_empty_answer(cutting_scorer, caplog):
    response = "<think>It is blue, or is it?</think>"
    rewards = cutting_scorer.score(["What is it?"] * 2, [response, ""])
    assert rewards[0] == rewards[1] and "reasoning alone, so that an empty answer is read" in caplog.text
    row = {"prompt": [[{"role": "user", "content": "What is it?"}]], "chosen": ["It is blue."], "rejected": [response]}
    (bad,) = encode_each(cutting_scorer.tokenizer, {**row, "file": ["f"], "row": [3]})
    assert isinstance(bad, BadRow) and bad.kind == "not rendered"
    assert "leaves nothing of a side: the response, which is reasoning alone" in bad.reason


def test_a_server_refuses_the_row_of_which_nothing_is_left_and_logs_the_first_loss(cutting_scorer, caplog):
    with caplog.at_level(logging.WARNING, "inform_rm"):
        for _ in range(2):
            encode_rows(cutting_scorer, ["2 + 2?"] * 2, ["4", "<think>Hm.</think>4"])
    (line,) = [record.message for record in caplog.records]
    assert "1 of 2 rows" in line and "row 1 (counted from 0) of a request" in line
    no_texts = RewardScorer(cutting_scorer.model, with_template(cutting_scorer.tokenizer, PARTS_TEMPLATE))
    with pytest.raises(RowError, match="nothing of turn 1") as refused:
        encode_rows(no_texts, ["2 + 2?"], ["4"])
    assert refused.value.row == 0


def test_what_decompose_reads_joins_the_record_of_its_source(cutting_scorer, cut_rows):
    (source,) = load_sources(cut_rows, PairSettings())
    assert len(source.encode(cutting_scorer, PairSettings(), keep_text=True).dataset) == 6
    assert source.record["not_as_written"]["n"] == 4 and len(source.record["not_as_written"]["examples"]) == 4


def test_items_of_a_suite_that_lose_text_are_counted(cutting_scorer, tmp_path):
    rows = [{"prompt": f"{n} + 1?", "chosen": f"It is {n + 1}.", "rejected": "No idea."} for n in range(4)]
    rows = [{**row, "subset": "helpful-base"} for row in rows]
    rows[2]["rejected"] = "<think>Hm.</think>No idea."
    path = write_rows(tmp_path / "suite.jsonl", rows)
    result = evaluate_suite(cutting_scorer, "hh", path, progress=False)
    assert result.counts["not_as_written"] == 1 and result.counts["evaluated"] == 4
