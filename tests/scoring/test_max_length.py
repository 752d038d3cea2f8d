"""The model's own limit of positions: found for each kind of model, and the default of scoring and training."""

import dataclasses
import json
import logging

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CodeGenConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    OPTConfig,
)

from inform_rm import InfoRMConfig, InfoRMForSequenceClassification
from inform_rm.data.encoding import encode_pairs
from inform_rm.data.preferences import load_preferences
from inform_rm.errors import InputError
from inform_rm.scoring.reward_models import checked_max_length, table_length, trained_length
from inform_rm.scoring.scorer import RewardScorer
from inform_rm.training.models import check_max_length
from inform_rm.training.reward_arguments import RewardTrainingArguments
from inform_rm.training.run import train

LIMIT = 40
IDS = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": LIMIT, **IDS}
TABLES = {
    "gpt2": GPT2Config(**GPT),
    "opt": OPTConfig(hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2,
                     max_position_embeddings=LIMIT, **{**IDS, "pad_token_id": 1}),
    "gptj": GPTJConfig(**GPT, rotary_dim=8),
    "codegen": CodeGenConfig(**{**GPT, "n_head": 4}, rotary_dim=8),
}  # fmt: skip
LLAMA = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=LIMIT,
    **IDS,
)  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_positions_is_as_long_as_the_longest_input_that_works(name):
    model = AutoModelForCausalLM.from_config(TABLES[name]).eval()
    assert table_length(model) == checked_max_length(model, None) == LIMIT
    with torch.no_grad():
        model(input_ids=torch.full((1, LIMIT), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, LIMIT + 1), 5))
    with pytest.raises(InputError, match=f"max_length: {LIMIT + 1}, but the model has positions for {LIMIT} tokens"):
        checked_max_length(model, LIMIT + 1)
    assert checked_max_length(model, LIMIT) == LIMIT


def test_a_table_counts_and_not_what_the_config_says():
    model = AutoModelForCausalLM.from_config(TABLES["gpt2"])
    model.transformer.wpe = torch.nn.Embedding(30, 32)
    assert checked_max_length(model, None) == 30
    with pytest.raises(InputError, match="positions for 30 tokens"):
        check_max_length(model, LIMIT)
    with pytest.raises(InputError, match=r"positions for 30 tokens and its config does not say so\. Set max_length"):
        check_max_length(model, None)


def test_a_computed_position_may_lie_beyond_what_the_model_was_made_for_and_a_log_line_says_so(caplog):
    model = AutoModelForCausalLM.from_config(LLAMA)
    assert (table_length(model), trained_length(model.config), checked_max_length(model, None)) == (None, LIMIT, LIMIT)
    with caplog.at_level(logging.WARNING):
        assert checked_max_length(model, LIMIT) == LIMIT and not caplog.messages
        assert checked_max_length(model, 999) == 999
    assert any("made for 40 tokens" in message for message in caplog.messages)


def test_scoring_refuses_what_has_no_position(tokenizer):
    model = InfoRMForSequenceClassification(InfoRMConfig(text_config=TABLES["gpt2"], latent_dim=4)).eval()
    assert RewardScorer(model, tokenizer).max_length == LIMIT
    with pytest.raises(InputError, match=f"row 0 .* has {LIMIT + 1} tokens; the limit is {LIMIT}"):
        RewardScorer(model, tokenizer).score_encoded([[5] * (LIMIT + 1)])
    with pytest.raises(InputError, match=f"positions for {LIMIT} tokens"):
        RewardScorer(model, tokenizer, max_length=LIMIT + 1)


def write_pairs(path, long_row):
    rows = [{"prompt": "Hi", "chosen": f"Yes {n}", "rejected": "No"} for n in range(8)]
    if long_row is not None:
        rows[long_row - 1]["prompt"] = "xq" * LIMIT
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def settings(tokenizer, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(TABLES["gpt2"]).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return RewardTrainingArguments(
        model=str(tmp_path / "model"), data=(write_pairs(tmp_path / "pairs.jsonl", 3),),
        output_dir=str(tmp_path / "run"),
        latent_dim=4, max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=1, use_cpu=True,
    )  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
def test_training_without_max_length_names_a_row_that_the_model_has_no_positions_for(settings, streaming, caplog):
    config = dataclasses.replace(settings, streaming=streaming, overwrite=True)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(InputError, match=rf"row 3: \d+ tokens, over max_length {LIMIT}"),
    ):
        train(config)
    assert sum(f"max_length: {LIMIT}, the model's own limit" in message for message in caplog.messages) == 1
    if streaming:
        skipped = train(dataclasses.replace(config, on_bad_row="skip"))
        assert skipped["steps"] == 1 and "row 3" in skipped["train_pairs"]["bad_rows"][0]
    else:
        dropped = train(dataclasses.replace(config, overlong="drop"))
        assert dropped["max_length"] == LIMIT and dropped["train_pairs"]["dropped"] >= 1


def test_eval_data_are_held_to_the_same_limit(settings, tmp_path):
    pairs = tmp_path / "train.jsonl"
    config = dataclasses.replace(settings, data=(write_pairs(pairs, None),), eval_data=settings.data)
    with pytest.raises(InputError, match=r"pairs.jsonl, row 3: \d+ tokens, over max_length 40"):
        train(config)


def test_a_max_length_beyond_the_table_is_refused_by_name(settings):
    config = dataclasses.replace(settings, max_length=200)
    with pytest.raises(InputError, match=f"max_length: 200, but the model has positions for {LIMIT} tokens"):
        train(config)


def test_the_limit_decides_the_cached_tokens(settings, tokenizer):
    loaded = load_preferences(settings.data[0]).dataset
    cut = encode_pairs(loaded, tokenizer, max_length=LIMIT, overlong="truncate_prompt")
    assert cut.counts["truncated"] == 1 and max(cut.dataset["length"]) == LIMIT
