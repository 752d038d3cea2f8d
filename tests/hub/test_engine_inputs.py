"""What engines feed to a folded model: each engine's rule, by tokens written out by hand."""

import copy
import json
import logging
import shlex

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from inform_rm import InfoRMConfig, InfoRMForSequenceClassification, export_model
from inform_rm.cli import main
from inform_rm.data.encoding import encode
from inform_rm.data.tokenizer import load_tokenizer
from inform_rm.errors import InputError
from inform_rm.hub import engine_inputs, folding
from inform_rm.hub.engine_inputs import (
    compare_engine_inputs,
    drop_bos_token,
    feed_messages,
    feed_openrlhf,
    feed_trl,
    feed_verl,
    feed_with_special_tokens,
    reads_the_same,
    vllm_command,
)

PROMPT, RESPONSE = [{"role": "user", "content": "hello"}], "bye"
# Each turn is role, text, end token; BOS in front as the template's variable.
TURNS = "{% for turn in messages %}{{ turn['role'] + turn['content'] + '</s>' }}{% endfor %}"
ASKS = "{% if add_generation_prompt %}assistant{% endif %}"
WITH_BOS = "{{ bos_token }}" + TURNS + ASKS
# As SmolLM2: every turn opens with the token that is also BOS, and a line break follows the end token.
CHATML = (
    "{% for turn in messages %}{{ '<s>' + turn['role'] + turn['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant{% endif %}"
)
REASONING = (
    TURNS.replace("turn['role'] +", "turn['role'] + ('<think>' if turn['role'] == 'assistant' else '') +") + ASKS
)
READ = "<s> user hello </s> assistant bye </s>"


def build(template, adds_bos=False):
    """A tokenizer of single characters but for the words of these templates."""
    words = ["<pad>", "<s>", "</s>", "<think>", "user", "assistant", "system", "hello", "bye", "\n", "<unk>"]
    raw = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("assistant|system|user|hello|bye|\n|."), "isolated")
    if adds_bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<think>"],
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


def tokens(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def differences(tokenizer):
    return {item.way: item.difference for item in compare_engine_inputs(tokenizer)}


@pytest.mark.parametrize(
    ("feed", "fed"),
    [
        (feed_messages, READ),
        (feed_trl, READ),
        (feed_with_special_tokens, "<s> " + READ),  # the template's BOS, and the tokenizer's
        (feed_verl, READ),  # takes the template's away, and the tokenizer's comes
        (feed_openrlhf, READ),
    ],
)
def test_each_engine_where_tokenizer_and_template_write_bos(feed, fed):
    tokenizer = build(WITH_BOS, adds_bos=True)
    assert tokens(tokenizer, encode(tokenizer, PROMPT, RESPONSE).input_ids) == READ
    assert tokens(tokenizer, feed(tokenizer, PROMPT, RESPONSE)) == fed


@pytest.mark.parametrize(
    ("feed", "fed"),
    [
        (feed_messages, "<s> user hello </s> \n <s> assistant bye </s> \n"),
        (feed_trl, "<s> user hello </s> \n <s> assistant bye </s> \n"),
        (feed_with_special_tokens, "<s> user hello </s> \n <s> assistant bye </s> \n"),
        (feed_verl, "user hello </s> \n <s> assistant bye </s> \n"),  # nothing brings BOS back
        (feed_openrlhf, "<s> user hello </s> \n <s> assistant bye </s>"),  # a policy ends at its end token
    ],
)
def test_each_engine_where_bos_opens_every_turn(feed, fed):
    tokenizer = build(CHATML)
    assert tokens(tokenizer, feed(tokenizer, PROMPT, RESPONSE)) == fed


def test_differences_are_named_where_they_are():
    none = {"vLLM /classify, messages": None, "TRL": None}
    doubled, trailing = "adds '<s>' in front", "lacks '\\n' at the end"
    text = ("vLLM /classify, text", "SGLang /v1/embeddings, text")
    same = {**none, **dict.fromkeys(text), "verl": None, "OpenRLHF": None}
    assert differences(build(TURNS + ASKS)) == same
    assert differences(build(WITH_BOS, adds_bos=True)) == {**same, **dict.fromkeys(text, doubled)}
    assert differences(build(CHATML)) == {**same, "verl": "lacks '<s>' in front", "OpenRLHF": trailing}
    # BOS that only the tokenizer writes: the template's text has none for verl to take away.
    assert differences(build(TURNS + ASKS, adds_bos=True)) == {
        **same, **dict.fromkeys(text, doubled), "verl": doubled
    }  # fmt: skip
    # After a role, 13 characters, an end token and a role: what a prompt that asks for a reply does not have.
    assert differences(build(REASONING)) == {**same, "OpenRLHF": "lacks '<think>' after 16 tokens"}


def test_only_a_switch_in_the_request_makes_a_difference_avoidable():
    found = {item.way: item for item in compare_engine_inputs(build(TURNS + ASKS, adds_bos=True))}
    assert not found["vLLM /classify, text"].is_wrong and not found["SGLang /v1/embeddings, text"].is_wrong
    assert found["verl"].is_wrong and not found["TRL"].is_wrong


def test_without_a_template_only_texts_and_ids_are_taken():
    tokenizer = build(None, adds_bos=True)
    assert tokens(tokenizer, encode(tokenizer, PROMPT, RESPONSE).input_ids) == "<s> hello bye </s>"
    assert tokens(tokenizer, feed_with_special_tokens(tokenizer, PROMPT, RESPONSE)) == "<s> hello bye </s>"
    assert tokens(tokenizer, feed_openrlhf(tokenizer, PROMPT, RESPONSE)) == "hello bye </s>"
    assert tokens(tokenizer, feed_trl(tokenizer, PROMPT, RESPONSE)) == "hello bye"
    found = differences(tokenizer)
    assert found["vLLM /classify, text"] is None
    for way in ("vLLM /classify, messages", "verl"):
        assert found[way] == "takes nothing: the tokenizer has no chat template"


@pytest.mark.parametrize("template", [CHATML, WITH_BOS])
def test_bos_that_verl_takes_away_is_no_longer_named(template, tmp_path):
    """The token by its text, or the template's variable, which gets that text."""
    tokenizer = build(template)
    assert differences(tokenizer)["verl"] == "lacks '<s>' in front"
    mended, dropped = drop_bos_token(tokenizer)
    assert dropped == "<s>" and mended.bos_token is None and tokenizer.bos_token == "<s>"
    mended.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.bos_token is None and differences(loaded)["verl"] is None
    ids = encode(tokenizer, PROMPT, RESPONSE).input_ids
    assert encode(loaded, PROMPT, RESPONSE).input_ids == feed_messages(loaded, PROMPT, RESPONSE) == ids


@pytest.mark.parametrize(
    ("template", "adds_bos"), [(TURNS + ASKS, False), (WITH_BOS, True), (TURNS + ASKS, True), (None, False)]
)
def test_what_is_right_or_cannot_be_mended_is_left(template, adds_bos):
    tokenizer = build(template, adds_bos)
    assert drop_bos_token(tokenizer) == (tokenizer, None) and tokenizer.bos_token == "<s>"


def test_a_template_without_system_messages_is_compared_on_the_others():
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}" + CHATML
    assert differences(build(refuses))["verl"] == "lacks '<s>' in front"


def test_another_tokenizer_is_seen():
    tokenizer = build(CHATML)
    assert reads_the_same(tokenizer, build(CHATML)) and not reads_the_same(tokenizer, build(WITH_BOS))


@pytest.fixture
def chatml_model(backbone_configs, tmp_path):
    text_config = copy.deepcopy(backbone_configs["llama"])
    config = InfoRMConfig(text_config=text_config, latent_dim=4, decoder="linear")
    model = InfoRMForSequenceClassification(config)
    torch.nn.init.ones_(model.score.decoder.bias)
    model.save_pretrained(tmp_path / "original")
    build(CHATML).save_pretrained(tmp_path / "original")
    return tmp_path / "original"


def test_export_mends_warns_and_says_so_in_the_card(chatml_model, tmp_path, caplog, capsys):
    with caplog.at_level(logging.WARNING, "inform_rm"):
        assert main(["export", "--model", str(chatml_model), "--output", str(tmp_path / "folded"), "--folded"]) == 0
    assert "verl would take '<s>' away" in caplog.text and "OpenRLHF lacks '\\n' at the end" in caplog.text
    assert AutoTokenizer.from_pretrained(tmp_path / "folded").bos_token is None
    card = (tmp_path / "folded" / "README.md").read_text()
    assert "names no `bos_token`" in card and "| verl | none |" in card and "| OpenRLHF | lacks " in card
    offset = json.loads((tmp_path / "folded" / "config.json").read_text())["reward_offset"]
    command = f"vllm serve {tmp_path / 'folded'} --runner pooling --pooler-config '{{\"logit_mean\": {-offset!r}}}'"
    assert command in capsys.readouterr().out
    assert f"--pooler-config '{{\"logit_mean\": {-offset!r}}}'" in card


def test_export_prints_what_a_request_must_say(backbone_configs, tmp_path, capsys):
    config = InfoRMConfig(text_config=copy.deepcopy(backbone_configs["llama"]), architecture="standard")
    InfoRMForSequenceClassification(config).save_pretrained(tmp_path / "original")
    build(WITH_BOS, adds_bos=True).save_pretrained(tmp_path / "original")
    main(["export", "--model", str(tmp_path / "original"), "--output", str(tmp_path / "folded"), "--folded"])
    printed = capsys.readouterr().out
    assert "vLLM /classify, text: adds '<s>' in front. Send add_special_tokens: false" in printed
    assert "pooler-config" not in printed  # there is no constant


def test_gemma_3_is_served_by_the_class_that_vllm_has():
    command = vllm_command("NAME", "Gemma3TextForSequenceClassification", 0.0)
    words = shlex.split(command)
    assert words[:7] == ["vllm", "serve", "NAME", "--runner", "pooling", "--convert", "classify"]
    assert words[7] == "--hf-overrides" and json.loads(words[8]) == {"architectures": ["Gemma3ForCausalLM"]}


def test_a_tokenizer_that_changes_when_saved_is_refused(chatml_model, tmp_path, monkeypatch):
    monkeypatch.setattr(folding, "reads_the_same", lambda tokenizer, loaded: False)
    with pytest.raises(InputError, match="other tokens of a conversation once it is saved"):
        export_model(str(chatml_model), str(tmp_path / "folded"), folded=True)
    assert not (tmp_path / "folded").exists()


def test_smollm2_reads_its_first_token_in_every_engine_once_folded(shared_dir, tmp_path):
    tokenizer = load_tokenizer(shared_dir / "models" / "smollm2-135m-first6-v16k")
    assert differences(tokenizer)["verl"] == "lacks '<|im_start|>' in front"
    mended, dropped = drop_bos_token(tokenizer)
    assert dropped == "<|im_start|>"
    mended.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for feed in (feed_verl, feed_messages, feed_trl, feed_with_special_tokens):
        assert feed(loaded, PROMPT, RESPONSE) == encode(tokenizer, PROMPT, RESPONSE).input_ids
    assert differences(loaded)["OpenRLHF"] == "lacks '\\n' at the end"


def test_every_rule_is_compared():
    rules = {value for name, value in vars(engine_inputs).items() if name.startswith("feed_")}
    assert {feed for _, feed, _, _ in engine_inputs._WAYS} == rules
