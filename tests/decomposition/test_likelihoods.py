"""Likelihoods of responses: those of plain forward passes, with or without shared prompts."""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Gemma2Config

from inform_rm.data.encoding import encode
from inform_rm.data.preferences import FEATURES
from inform_rm.decomposition.gap_grid import distinct_prompts, gap_grid
from inform_rm.decomposition.likelihoods import ResponseLikelihood
from inform_rm.decomposition.prompt_free_gap import sample_prompts
from inform_rm.errors import InputError

SEQUENCES = [[5, 6, 7, 8, 20, 21, 22], [5, 6, 7, 8, 30], [40, 41], [50], [60, 61, 62]]
PROMPT_LENGTHS = [4, 4, 1, 0, 0]


def build(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def plain(model, ids, prompt_length):
    first = max(prompt_length, 1)
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    return sum(logs[place - 1, ids[place]].item() for place in range(first, len(ids)))


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        *((name, 1000) for name in ("llama", "mistral", "gpt_neox", "gpt2")),
        *(("llama", budget) for budget in (1, 10)),
    ],
)
def test_likelihoods_are_those_of_plain_forward_passes(backbone_configs, name, budget):
    model = build(copy.deepcopy(backbone_configs[name]))
    likelihood = ResponseLikelihood(model, None, tokens_per_batch=budget)
    assert likelihood.batching == "packed"
    found = torch.full((len(SEQUENCES),), float("nan"))
    for rows, values, _ in likelihood.iter_scores(SEQUENCES, PROMPT_LENGTHS):
        found[rows] = values
    for value, ids, length in zip(found.tolist(), SEQUENCES, PROMPT_LENGTHS, strict=True):
        assert value == pytest.approx(plain(model, ids, length), abs=2e-4)
    if budget == 1000:
        assert likelihood.tokens_computed == sum(map(len, SEQUENCES)) - 4


def test_a_model_with_capped_logits_is_run_plainly(caplog):
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = build(
        Gemma2Config(**sizes, intermediate_size=48, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0)
    )
    with caplog.at_level(logging.WARNING):
        likelihood = ResponseLikelihood(model, None)
    assert likelihood.batching == "padded" and "one response at a time" in caplog.text
    for rows, values, _ in likelihood.iter_scores(SEQUENCES, PROMPT_LENGTHS):
        for row, value in zip(rows, values.tolist(), strict=True):
            assert value == pytest.approx(plain(model, SEQUENCES[row], PROMPT_LENGTHS[row]), abs=2e-4)


def test_likelihoods_fill_a_grid(backbone_configs, tokenizer):
    rows = [
        {"prompt": [{"role": "user", "content": f"Name {word}."}], "chosen": f"{word}!", "rejected": "No.",
         "margin": None, "subset": "s", "id": word, "file": "f", "row": 1}
        for word in ("sea", "sky", "rose")
    ]  # fmt: skip
    pairs = Dataset.from_list(rows, features=FEATURES)
    model = build(copy.deepcopy(backbone_configs["llama"]))
    prompt_rows, own = distinct_prompts(pairs)
    choice = sample_prompts(own, 3, 3, seed=0)
    grid = gap_grid(ResponseLikelihood(model, tokenizer), pairs, choice, prompt_rows)
    for pair, prompts in enumerate(choice.tolist()):
        for column, prompt in enumerate(prompts):
            for side, name in enumerate(("chosen", "rejected")):
                encoded = encode(tokenizer, rows[prompt]["prompt"], rows[pair][name])
                expected = plain(model, encoded.input_ids, len(encoded.prompt_ids))
                assert grid.rewards[pair, column, side].item() == pytest.approx(expected, abs=2e-4)


def test_ids_of_another_tokenizer_are_refused(backbone_configs):
    likelihood = ResponseLikelihood(build(copy.deepcopy(backbone_configs["llama"])), None)
    with pytest.raises(InputError, match="token id 400"):
        next(likelihood.iter_scores([[5, 400]], [1]))
