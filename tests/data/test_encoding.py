import copy
import json
import logging

import pytest
from datasets import Dataset, disable_progress_bars
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from inform_rm.data.encoding import TokenGroup, encode, encode_many, encode_pairs, fit_group
from inform_rm.data.pairs import BadRow, shared_prefix_length
from inform_rm.data.preferences import FEATURES, load_preferences
from inform_rm.data.tokenizer import check_vocabulary, load_tokenizer
from inform_rm.errors import InputError

REAL_TOKENIZERS = {"smollm2-135m-first6-v16k": None, "stories260K": "plain"}
# As in Llama 3: the content is trimmed, and the template itself writes the BOS token.
TRIMMING_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STRICT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
)
NOTHING_LOST = {"not_as_written": {"n": 0, "examples": []}}

texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cf")), min_size=1).filter(lambda t: t.strip())


def pairs_dataset(rows: list[dict]) -> Dataset:
    """Preference pairs given by what matters in a test; the rest is filled in."""
    filled = [
        {
            "prompt": [{"role": "user", "content": row.get("prompt", "Name a colour.")}],
            "chosen": row.get("chosen", "Blue."),
            "rejected": row.get("rejected", "A car."),
            "margin": row.get("margin"),
            "subset": "s",
            "id": str(number),
            "file": "pairs.jsonl",
            "row": number,
        }
        for number, row in enumerate(rows, start=1)
    ]
    return Dataset.from_list(filled, features=FEATURES)


@pytest.fixture(autouse=True)
def quiet():
    """No progress bars between the test results."""
    disable_progress_bars()


@pytest.fixture
def bare(tokenizer) -> PreTrainedTokenizerFast:
    """No chat template, no BOS added: the tokenizer of GPT-2 and Pythia."""
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = None
    return copied


@pytest.fixture
def with_bos(bare) -> PreTrainedTokenizerFast:
    """No chat template, BOS added: the tokenizer of Llama 2."""
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bare.bos_token_id)]
    )
    return bare


@pytest.fixture
def word_level(tmp_path):
    """A tokenizer that knows six words; the others become <unk>."""
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "Name": 2, "a": 3, "Blue": 4, "Red": 5}, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>")


def assert_is_the_template(tokenizer, encoded, messages, response):
    full = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": response}], tokenize=True, return_dict=True
    )["input_ids"]
    assert encoded.input_ids == full
    asked = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)
    length = len(encoded.prompt_ids)
    assert encoded.prompt_ids == asked["input_ids"][:length] and encoded.response_ids
    assert length == len(asked["input_ids"]) or asked["input_ids"][length] != full[length]


@given(turns=st.lists(texts, min_size=1, max_size=3), response=texts)
@settings(max_examples=25)
def test_ids_are_those_of_the_chat_template(tokenizer, turns, response):
    messages = []
    for number, turn in enumerate(turns):
        messages += [{"role": "assistant", "content": f"reply {number}"}] if number else []
        messages.append({"role": "user", "content": turn})
    assert_is_the_template(tokenizer, encode(tokenizer, messages, response), messages, response)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("smollm2-135m-first6-v16k", "oasst-sample/test"),
        ("stories260K", "xstest/test"),
    ],
)
def test_ids_are_those_of_the_chat_template_on_real_data(name, data, shared_dir):
    tokenizer = load_tokenizer(shared_dir / "models" / name, chat_template=REAL_TOKENIZERS[name])
    rows = load_preferences(shared_dir / "data" / f"{data}.jsonl.gz").dataset.select(range(0, 75, 4))
    pairs = encode_pairs(rows, tokenizer, max_length=None).dataset
    for row, pair in zip(rows, pairs, strict=True):
        shared = pair["prompt_length"]
        assert pair["chosen_input_ids"][:shared] == pair["rejected_input_ids"][:shared]
        for side in ("chosen", "rejected"):
            encoded = encode(tokenizer, row["prompt"], row[side])
            assert pair[f"{side}_input_ids"] == encoded.input_ids and shared <= len(encoded.prompt_ids)
            assert_is_the_template(tokenizer, encoded, row["prompt"], row[side])


def test_ids_without_a_template_are_prompt_response_end_on_real_data(shared_dir):
    tokenizer = load_tokenizer(shared_dir / "models" / "stories260K")
    rows = load_preferences(shared_dir / "data" / "truthfulqa" / "test.jsonl.gz").dataset.select(range(60))
    reference = AutoTokenizer.from_pretrained(shared_dir / "models" / "stories260K").backend_tokenizer
    for row in rows:
        ids = encode(tokenizer, row["prompt"], row["chosen"]).input_ids
        text = row["prompt"][0]["content"] + row["chosen"]
        assert ids == [1, *reference.encode(text, add_special_tokens=False).ids, 2]


@given(prompt=texts, response=texts)
@settings(max_examples=30)
def test_without_a_template_the_text_survives_between_bos_and_end(shared_tokenizers, prompt, response):
    with_bos, bare = shared_tokenizers
    for tokenizer, bos in ((with_bos, [1]), (bare, [])):
        ids = encode(tokenizer, [{"role": "user", "content": prompt}], response).input_ids
        assert ids[: len(bos)] == bos and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[len(bos) : -1], clean_up_tokenization_spaces=False) == prompt + response


@pytest.fixture(scope="module")
def shared_tokenizers(tokenizer):
    """`with_bos` and `bare`, made once for property tests."""
    plain, adding = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    plain.chat_template = adding.chat_template = None
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", adding.bos_token_id)]
    )
    return adding, plain


def test_bos_and_end_are_never_doubled(with_bos):
    ids = encode(with_bos, "Hi", " there</s>").input_ids  # the text brings its own end token
    assert ids.count(1) == 1 and ids.count(2) == 1
    with_bos.chat_template = TRIMMING_TEMPLATE
    assert encode(with_bos, "Hi", "there").input_ids.count(1) == 1


def test_a_tokenizer_that_adds_bos_and_end_itself(bare):
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    encoded = encode(bare, "Hi", " you")
    assert encoded.prompt_ids == [1, *bare.convert_tokens_to_ids(bare.tokenize("Hi"))]
    assert encoded.response_ids[-1] == 2 and encoded.input_ids.count(2) == 1


def test_a_tokenizer_without_end_token_gets_none(bare):
    bare.eos_token = None
    assert encode(bare, "Hi", " you").input_ids == bare("Hi you")["input_ids"]


def test_text_prompts_are_read_as_in_data_files(tokenizer):
    dialogue = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    by_text = encode(tokenizer, "Human: a\n\nAssistant: b\n\nHuman: c", "d")
    assert by_text == encode(tokenizer, dialogue, "d")
    assert encode_many(tokenizer, [], []) == []
    with pytest.raises(InputError, match="prompt: 'prompt' is empty"):
        encode(tokenizer, "", "c")


def test_several_turns_without_a_template_are_refused_with_the_way_out(bare):
    with pytest.raises(InputError, match=r"3 messages needs a chat template .* chat_template='plain'"):
        encode(bare, "Human: a\n\nAssistant: b\n\nHuman: c", "d")


@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_plain_template(adds_bos, with_bos, bare, tmp_path):
    if not adds_bos:
        bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    bare.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path, chat_template="plain")
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " a "}]
    prompt += [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    encoded = encode(tokenizer, prompt, "d")
    start = "<s>" if adds_bos else ""
    expected = f"{start}Be kind.\n\nHuman:  a \n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert tokenizer.decode(encoded.prompt_ids) == expected
    assert tokenizer.decode(encoded.response_ids) == " d</s>"


def test_a_conversation_that_the_template_refuses_names_the_row(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = STRICT_TEMPLATE
    dataset = pairs_dataset([{}, {}, {}])
    rows = dataset.to_list()
    rows[1]["prompt"].insert(0, {"role": "system", "content": "Be kind."})
    dataset = Dataset.from_list(rows, features=FEATURES)
    with pytest.raises(BadRow, match=r"pairs\.jsonl, row 2: the chat template cannot .*System role not supported"):
        encode_pairs(dataset, strict, max_length=None)


def test_sides_that_become_the_same_tokens_are_an_error(word_level):
    dataset = pairs_dataset([{"chosen": "Blue", "rejected": "Red"}, {"chosen": "Green", "rejected": "Pink"}])
    with pytest.raises(BadRow, match=r"row 2: both sides become the same tokens .* Remove the row"):
        encode_pairs(dataset, word_level, max_length=None)


def test_a_response_that_the_template_discards_is_an_error(tokenizer):
    deaf = copy.deepcopy(tokenizer)
    deaf.chat_template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(
        BadRow, match=r"row 1: the chat template leaves nothing of the response, which begins 'Blue\.'"
    ):
        encode_pairs(pairs_dataset([{}]), deaf, max_length=None)


def test_columns_and_counts_when_everything_fits(tokenizer):
    rows = [{"margin": 1.5}, {"chosen": "Quite blue.", "rejected": "Red"}]
    encoded = encode_pairs(pairs_dataset(rows), tokenizer, max_length=200, overlong="drop")
    assert encoded.counts == {"pairs": 2, "overlong": 0, "dropped": 0, "truncated": 0, **NOTHING_LOST}
    first, second = encoded.dataset
    assert set(first) == {
        "chosen_input_ids", "rejected_input_ids", "prompt_length", "length", "margin", "subset", "id",
        "chosen_characters", "rejected_characters",
    }  # fmt: skip
    assert (first["margin"], second["margin"], second["id"]) == (1.5, None, "2")
    assert (second["chosen_characters"], second["rejected_characters"]) == (11, 3)


def test_overlong_policies(tokenizer):
    dataset = pairs_dataset([{}, {"prompt": "Name a colour, please. " * 9}, {"prompt": "Red?"}])
    whole = encode_pairs(dataset, tokenizer, max_length=None).dataset
    lengths = [max(len(row["chosen_input_ids"]), len(row["rejected_input_ids"])) for row in whole]
    limit = lengths[1] - 5
    assert lengths[0] < limit and lengths[2] < limit
    with pytest.raises(BadRow, match=rf"row 2: {lengths[1]} tokens, over max_length {limit}\. Raise max_length, or"):
        encode_pairs(dataset, tokenizer, max_length=limit)
    dropped = encode_pairs(dataset, tokenizer, max_length=limit, overlong="drop")
    assert dropped.counts == {"pairs": 3, "overlong": 1, "dropped": 1, "truncated": 0, **NOTHING_LOST}
    assert dropped.dataset["id"][:] == ["1", "3"]
    cut = encode_pairs(dataset, tokenizer, max_length=limit, overlong="truncate_prompt")
    assert cut.counts == {"pairs": 3, "overlong": 1, "dropped": 0, "truncated": 1, **NOTHING_LOST}
    assert cut.dataset[0] == whole[0] and cut.dataset[2] == whole[2]
    assert cut.dataset[1]["prompt_length"] == whole[1]["prompt_length"] - 5
    exact = encode_pairs(dataset, tokenizer, max_length=lengths[1])  # a limit is the longest allowed length
    assert exact.counts["overlong"] == 0
    with pytest.raises(InputError, match="max_length: 1 leaves none of the 3 pairs"):
        encode_pairs(dataset, tokenizer, max_length=1, overlong="drop")
    with pytest.raises(BadRow, match=r"row 1: its longer response alone takes \d+ of max_length 2 tokens"):
        encode_pairs(dataset, tokenizer, max_length=2, overlong="truncate_prompt")


ids = st.lists(st.integers(0, 3), max_size=6)


@given(prompt=ids, chosen=ids, rejected=ids, bos=st.sampled_from([None, 0]), limit=st.integers(1, 14))
@settings(max_examples=100)
def test_truncation_keeps_bos_and_responses_and_the_difference(prompt, chosen, rejected, bos, limit):
    whole = TokenGroup([[*prompt, *chosen], [*prompt, *rejected]], len(prompt))
    keep = int(prompt[:1] == [bos])
    responses = max(len(chosen), len(rejected))
    if keep + responses > limit and len(prompt) + responses > limit:
        with pytest.raises(BadRow, match=f"alone takes {keep + responses} of max_length {limit} tokens"):
            fit_group(whole, limit, "truncate_prompt", bos, "f", 1)
        return
    cut = fit_group(whole, limit, "truncate_prompt", bos, "f", 1)
    left = min(len(prompt), limit - responses)
    kept = [*prompt[:keep], *prompt[len(prompt) - left + keep :]]  # BOS and the prompt's end, as much as fits
    assert cut == TokenGroup([[*kept, *chosen], [*kept, *rejected]], len(kept)) and len(kept) == left
    assert (cut.ids[0] == cut.ids[1]) == (whole.ids[0] == whole.ids[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 0}, "max_length: 0; expected a whole number"),
        ({"max_length": -4}, "max_length: -4"),
        ({"max_length": 8.5}, "max_length: 8.5"),
        ({"max_length": True}, "max_length: True"),
        ({"max_length": "512"}, "max_length: '512'"),
        ({"max_length": 8, "overlong": "cut"}, "overlong: got 'cut'; expected one of error, drop, truncate_prompt"),
    ],
)
def test_wrong_arguments(arguments, message, tokenizer):
    with pytest.raises(InputError, match=message):
        encode_pairs(pairs_dataset([{}]), tokenizer, **arguments)


def test_loading_again_sees_a_changed_template(tokenizer):
    dataset = pairs_dataset([{}])
    changed = copy.deepcopy(tokenizer)
    before = encode_pairs(dataset, changed, max_length=None).dataset[0]["chosen_input_ids"]
    changed.chat_template = TRIMMING_TEMPLATE
    after = encode_pairs(dataset, changed, max_length=None).dataset[0]["chosen_input_ids"]
    assert after == [tokenizer.bos_token_id, *before]  # the same but for BOS: not an old encoding from a cache


def test_shared_prefix_of_a_sequence_and_its_start():
    assert shared_prefix_length([1, 2], [1, 2, 3]) == shared_prefix_length([1, 2, 3], [1, 2]) == 2
    assert shared_prefix_length([], [1]) == shared_prefix_length([2], [1]) == 0


def _saved(tokenizer, folder, **changes):
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in changes}
    path.write_text(json.dumps(config | {key: value for key, value in changes.items() if value is not None}))
    return folder


def test_loading_keeps_a_pad_token_and_pads_right(tokenizer, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "inform_rm"):
        loaded = load_tokenizer(_saved(tokenizer, tmp_path, padding_side="left"))
    assert (loaded.pad_token, loaded.padding_side, caplog.text) == ("<pad>", "right", "")


@pytest.mark.parametrize(("missing", "used"), [(["pad"], "<unk>"), (["pad", "unk"], "</s>")])
def test_a_missing_pad_token_is_replaced_and_said(missing, used, tokenizer, tmp_path, caplog):
    folder = _saved(tokenizer, tmp_path, **{f"{name}_token": None for name in missing})
    with caplog.at_level(logging.WARNING, "inform_rm"):
        loaded = load_tokenizer(folder)
    assert loaded.pad_token == used and f"no pad token; its {'unk' if used == '<unk>' else 'eos'}_token" in caplog.text
    assert len(loaded) == len(tokenizer)  # no new id that the model could not embed


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(tokenizer, tmp_path):
    folder = _saved(tokenizer, tmp_path, pad_token=None, unk_token=None, eos_token=None)
    with pytest.raises(InputError, match="no pad, unk or eos token"):
        load_tokenizer(folder)


def test_unloadable_tokenizers(tmp_path, tokenizer):
    with pytest.raises(InputError, match=r"no loadable tokenizer .* holds one \(tokenizer.json\)"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    # Earlier versions of transformers make an empty one of this.
    with pytest.raises(InputError, match=r"no loadable tokenizer|its tokenizer has no vocabulary"):
        load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(InputError, match="no loadable tokenizer"):
        load_tokenizer(tmp_path)


def test_chat_templates_come_from_file_text_or_name(tokenizer, tmp_path):
    _saved(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).chat_template == tokenizer.chat_template
    (tmp_path / "mine.jinja").write_text(TRIMMING_TEMPLATE, encoding="utf-8")
    assert load_tokenizer(tmp_path, chat_template=str(tmp_path / "mine.jinja")).chat_template == TRIMMING_TEMPLATE
    assert load_tokenizer(tmp_path, chat_template=TRIMMING_TEMPLATE).chat_template == TRIMMING_TEMPLATE
    with pytest.raises(InputError, match=r"'nowhere.jinja' is neither 'plain', nor Jinja text, nor a readable file"):
        load_tokenizer(tmp_path, chat_template="nowhere.jinja")
    with pytest.raises(InputError, match="the chat template cannot render"):
        load_tokenizer(tmp_path, chat_template="{% for m in %}")


def test_vocabulary_larger_than_the_model(tokenizer):
    check_vocabulary(tokenizer, len(tokenizer))
    check_vocabulary(tokenizer, len(tokenizer) + 64)  # embeddings are often padded to a round size
    with pytest.raises(InputError, match=f"ids go up to {len(tokenizer) - 1}, but the model embeds only 100"):
        check_vocabulary(tokenizer, 100)


def test_remote_code_without_a_revision_is_warned_of(tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: copy.deepcopy(tokenizer))
    with caplog.at_level(logging.WARNING, "inform_rm"):
        load_tokenizer("someone/model", trust_remote_code=True, revision="a" * 40)
        assert not caplog.records
        load_tokenizer("someone/model", trust_remote_code=True)
    assert "Pass revision=<commit>" in caplog.text
