"""Rankings and scored responses: what is read, what is refused, and their token ids."""

import json

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from inform_rm.data.check_data import check_data
from inform_rm.data.check_data_text import format_report
from inform_rm.data.encoding import encode, encode_pairs
from inform_rm.data.groups import pairs_of_rankings
from inform_rm.data.pairs import BadRow
from inform_rm.data.preferences import FEATURES, load_preferences
from inform_rm.errors import InputError
from inform_rm.training.data import as_groups

PROMPT = [{"role": "user", "content": "Name a colour."}]
TEXTS = ["Blue.", "A car.", "Red."]
RANKING = {"prompt": "Name a colour.", "responses": TEXTS, "ranks": [1, 3, 1]}
SCORED = {"prompt": "Name a colour.", "response": "Blue.", "score": 3.5}
PAIR = {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "A car."}


def reply(text):
    return [{"role": "assistant", "content": text}]


@pytest.fixture
def write(tmp_path):
    def to(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return to


def only_row(data):
    assert len(data.dataset) == 1
    return data.dataset[0]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (RANKING, None),
        ({**RANKING, "prompt": PROMPT, "responses": list(map(reply, TEXTS))}, None),
        ({**RANKING, "responses": json.dumps(TEXTS), "ranks": "[1, 3, 1]"}, None),
        ({"question": "Name a colour.", "answers": TEXTS, "places": [1, 3, 1]},
         {"prompt": "question", "responses": "answers", "ranks": "places"}),
        ({**RANKING, "scores": [1, 2, 3]}, {"ignore": "scores"}),
        ({**RANKING, "chosen": "x", "rejected": "y"}, {"ignore": "chosen+rejected"}),
    ],
)  # fmt: skip
def test_every_form_of_a_ranking_gives_the_same_group(write, row, columns):
    data = load_preferences(write([row]), columns=columns)
    found = only_row(data)
    assert data.layout == "ranking" and found["prompt"] == PROMPT
    assert found["responses"] == TEXTS and found["labels"] == [-1, -3, -1]
    assert (found["subset"], found["id"], found["row"]) == ("rows", "rows/1", 1)
    assert load_preferences([RANKING]).dataset[0]["labels"] == [-1, -3, -1]


def test_scores_are_labels_as_they_are(write):
    data = load_preferences(write([{"prompt": "Name a colour.", "responses": TEXTS, "scores": [0.5, "-1", 7]}]))
    assert only_row(data)["labels"] == [0.5, -1, 7]
    found = only_row(load_preferences(write([{**SCORED, "response": reply("Blue."), "system": "Be brief."}])))
    assert found["responses"] == ["Blue."] and found["labels"] == [3.5] and len(found["prompt"]) == 2


def test_attributes_are_weighed_and_named_in_the_reading(write):
    rows = [{"prompt": "Name a colour.", "response": "Blue.", "helpfulness": 4, "correctness": 2, "verbosity": 1}]
    data = load_preferences(write(rows), score_weights={"helpfulness": 0.65, "correctness": 0.8})
    assert only_row(data)["labels"] == [pytest.approx(4.2)] and data.layout == "scored"
    assert data.reading.to_dict()["unread_columns"] == {"verbosity": 1}
    assert data.reading.to_dict()["columns"]["helpfulness"] == "helpfulness"
    with pytest.raises(BadRow, match=r"row 1: no column 'coherence', which score_weights names. Its fields are .*"):
        load_preferences(write(rows), score_weights={"helpfulness": 1.0, "coherence": 1.0})
    with pytest.raises(BadRow, match=r"row 1: no 'score'.*--score-weights helpfulness=0.65"):
        load_preferences(write(rows))
    with pytest.raises(InputError, match=r"score_weights: got {'a': 'b'}; expected columns with a finite number each"):
        load_preferences(write(rows), score_weights={"a": "b"})


BAD = [
    ({**RANKING, "ranks": [1, 1, 1]}, "all responses are tied"),
    ({**RANKING, "ranks": [0, 1, 2]}, r"'ranks' is list \[0, 1, 2\]; expected whole numbers with 1 for the best"),
    ({**RANKING, "ranks": [2, 3, 4]}, "Count from 1, or give 'scores'"),
    ({**RANKING, "ranks": [1, 1.5, 2]}, "whole numbers"),
    ({**RANKING, "ranks": [1, 2]}, "expected 3 numbers, one for each response"),
    ({**RANKING, "ranks": [1, 2, None]}, "'ranks' holds null; expected a finite number"),
    ({**RANKING, "ranks": [1, 2, True]}, "'ranks' holds bool True"),
    ({**RANKING, "ranks": None}, "neither 'ranks' nor 'scores'. Its fields are 'prompt'"),
    ({**RANKING, "scores": [1, 2, 3]}, "both 'ranks' and 'scores': which counts"),
    ({**RANKING, "ranks": None, "scores": [1, 2, float("inf")]}, "'scores' holds float inf"),
    ({**RANKING, "responses": ["a"]}, "a list of at least two responses"),
    ({**RANKING, "responses": "a"}, "'responses' is str 'a'"),
    ({**RANKING, "responses": ["Blue.", " ", "Red."]}, "response 2 of 'responses' is only whitespace"),
    ({**RANKING, "responses": ["Blue.", "Blue. ", "Red."]}, "two responses are identical but ranked differently"),
    ({**RANKING, "responses": [*TEXTS[:2], [PROMPT[0], *reply("Red.")]]}, "response 3 of 'responses' holds several"),
    ({**RANKING, "prompt": None}, "no 'prompt', and a row with responses needs one"),
    ({**RANKING, "images": ["x.png"]}, "'images' is not encoded"),
    ({**RANKING, "responses": [f"Name a colour. {text}" for text in TEXTS]}, "begin with the prompt: whole dialogues"),
    (PAIR, r"this row is a pair \(chosen, rejected\), unlike the rows before it, a ranking \(responses\)"),
    (SCORED, r"this row is scored \(response\), unlike"),
    ({"prompt": "Name a colour.", "ranks": [1, 2]}, "'responses' is null"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_bad_row_is_refused_by_its_row_or_left_out(write, row, message):
    path = write([RANKING, row])
    with pytest.raises(BadRow, match=message) as caught:
        load_preferences(path)
    assert str(caught.value).startswith(f"{path}, row 2: ")
    data = load_preferences(path, on_bad_row="skip")
    assert len(data.dataset) == 1 and [bad.row for bad in data.bad_rows] == [2]


@pytest.mark.parametrize(
    ("row", "message"),
    [({**SCORED, "score": "good"}, "'score' holds str 'good'"), ({**SCORED, "response": ""}, "'response' is empty"),
     (RANKING, "unlike the rows before it, scored")],
)  # fmt: skip
def test_a_bad_scored_row_is_refused(write, row, message):
    with pytest.raises(BadRow, match=message):
        load_preferences(write([SCORED, row]))


def test_a_ranking_among_pairs_is_told_where_rankings_belong(write):
    with pytest.raises(BadRow, match=r"row 2: no 'chosen'.*Rankings and scored responses have a file of their own"):
        load_preferences(write([PAIR, RANKING]))


def test_a_reader_of_pairs_refuses_other_layouts(write):
    with pytest.raises(InputError, match="rows are of the layout 'ranking', where pair is needed"):
        load_preferences(write([RANKING]), layouts=("pair",))


def test_a_pair_with_further_columns_stays_a_pair(write):
    data = load_preferences(write([{**PAIR, "response": "x", "responses": ["x", "y"], "score": 1}]))
    assert data.layout == "pair" and data.fingerprint == load_preferences(write([PAIR])).fingerprint


def test_replies_that_repeat_the_prompt_are_read_on_demand(write):
    row = {**RANKING, "responses": [f"Name a colour. {text}" for text in TEXTS]}
    assert len(load_preferences(write([row]), columns={"sides": "reply"}).dataset) == 1


def test_columns_of_other_layouts_are_named_and_not_missed(write, caplog):
    data = load_preferences(write([PAIR]), columns={"responses": "answers"})
    assert data.layout == "pair" and "columns of responses not used" in caplog.text
    with pytest.raises(InputError, match="columns names 'sub' for 'subset', which no row has"):
        load_preferences(write([RANKING]), columns={"subset": "sub"})


def test_the_fingerprint_is_of_content_not_of_format(write):
    same = {**RANKING, "responses": list(map(reply, TEXTS))}
    first = load_preferences(write([RANKING])).fingerprint
    assert load_preferences(write([same])).fingerprint == first
    assert load_preferences(write([{**RANKING, "ranks": [1, 2, 1]}])).fingerprint != first


def test_pairs_of_a_ranking_are_its_untied_ones_better_first(write):
    pairs = pairs_of_rankings(load_preferences(write([RANKING])).dataset, FEATURES)
    assert [(pair["chosen"], pair["rejected"], pair["id"]) for pair in pairs] == [
        ("Blue.", "A car.", "rows/1/1>2"), ("Red.", "A car.", "rows/1/3>2"),
    ]  # fmt: skip


def test_ids_of_responses_are_those_of_encode(write, tokenizer):
    encoded = encode_pairs(load_preferences(write([RANKING])).dataset, tokenizer, max_length=None)
    (row,) = encoded.dataset
    assert row["responses_input_ids"] == [encode(tokenizer, PROMPT, text).input_ids for text in TEXTS]
    assert row["labels"] == [-1, -3, -1] and row["characters"] == [5, 6, 4]
    assert row["length"] == max(map(len, row["responses_input_ids"])) and row["margin"] is None


def test_the_limit_of_length_does_to_groups_what_it_does_to_pairs(write, tokenizer):
    ranking = load_preferences(write([{**RANKING, "responses": TEXTS[:2], "ranks": [1, 2]}])).dataset
    pair = load_preferences(write([PAIR], "pairs.jsonl")).dataset
    whole = encode_pairs(pair, tokenizer, max_length=None).dataset[0]["length"]
    limit = {"max_length": whole - 3, "overlong": "truncate_prompt"}
    cut = as_groups(encode_pairs(pair, tokenizer, **limit).dataset)[0]
    found = encode_pairs(ranking, tokenizer, **limit)
    for name in ("responses_input_ids", "prompt_length", "length", "characters"):
        assert found.dataset[0][name] == cut[name]
    assert found.counts["truncated"] == 1
    with pytest.raises(BadRow, match=f"row 1: {whole} tokens, over max_length {whole - 3}"):
        encode_pairs(ranking, tokenizer, max_length=whole - 3)
    two = Dataset.from_list([ranking[0], {**ranking[0], "prompt": [{"role": "user", "content": "?"}]}])
    dropped = encode_pairs(two, tokenizer, max_length=whole - 3, overlong="drop")
    assert dropped.counts["dropped"] == 1 and len(dropped.dataset) == 1


def test_responses_that_become_the_same_tokens_are_a_bad_row(write):
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "Blue": 2, "Red": 3, "car": 4, ".": 5}, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    word_level = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>")
    alike = {**RANKING, "responses": ["Green.", "Pink.", "Red."], "ranks": [1, 2, 3]}
    rows = load_preferences(write([RANKING, alike])).dataset
    with pytest.raises(BadRow, match="row 2: two responses with different labels become the same tokens"):
        encode_pairs(rows, word_level, max_length=None)
    kept = encode_pairs(rows, word_level, max_length=None, on_bad_row="skip")
    assert len(kept.dataset) == 1 and [bad.row for bad in kept.bad_rows] == [2]


def test_check_data_tells_the_layouts_apart(write, tokenizer):
    rankings = write([RANKING, {**RANKING, "ranks": [1, 1, 1]}], "rankings.jsonl")
    rows = [{**SCORED, "response": f"Blue {'and green ' * at}.", "score": at} for at in range(40)]
    scored = write([*rows, rows[3], {**rows[4], "score": 9}, {**SCORED, "score": None}], "scored.jsonl")
    report = check_data([rankings, scored], tokenizer, max_length=100)
    one, other = report["sources"]
    assert (one["layout"], one["rankings"], one["responses"], one["pairs"]) == ("ranking", 1, 3, 2)
    assert (one["tied_pairs"], one["rows"], one["bad_rows"]["by_kind"]) == (1, 2, {"all tied": 1})
    assert one["chosen_longer_characters"]["longer"] == 0
    assert (other["layout"], other["scored"], other["rows"]) == ("scored", 42, 43)
    assert other["duplicates"] == {"n": 1, "examples": [41]}
    assert other["conflicting_labels"] == {"n": 2, "examples": [5, 42]}
    assert other["score_length_correlation"] > 0.9 and other["scores"]["100%"] == 39
    whole = [len(encode(tokenizer, PROMPT, row["response"]).input_ids) for row in [*rows, rows[3], rows[4]]]
    assert other["max_length"]["overlong"] == sum(length > 100 for length in whole) == other["tokens"]["unusable"]
    assert report["unusable_rows"] == 2 + other["tokens"]["unusable"]
    assert report["overlap"][0]["shared_prompts"] == 1
    said = "\n".join(report["warnings"])
    assert "score and length are related" in said and "1 rows repeat an earlier one" in said
    text = format_report(report)
    assert "rankings 1 with 3 responses (1 of 3), tied pairs 1" in text and "scores: mean" in text


def test_a_ranking_that_training_would_stop_at_counts_once(write, tokenizer):
    source = write([RANKING, {**RANKING, "ranks": [1, 2, 3]}])
    report = check_data(source, tokenizer, max_length=5)
    (one,) = report["sources"]
    assert (one["rows"], one["pairs"], one["max_length"]["overlong"]) == (2, 5, 5)
    assert one["tokens"]["unusable"] == report["unusable_rows"] == 2


def test_check_data_weighs_attributes(write):
    path = write([{"prompt": "Name a colour.", "response": "Blue.", "a": 1, "b": 2}])
    report = check_data(path, score_weights={"a": 1.0, "b": 10.0})
    assert report["sources"][0]["scores"]["mean"] == 21 and report["settings"]["score_weights"] == {
        "a": 1.0,
        "b": 10.0,
    }
