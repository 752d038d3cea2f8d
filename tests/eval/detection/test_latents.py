"""Latents are those of single forward passes, in input order, and say what they are."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from inform_rm import InfoRMForSequenceClassification
from inform_rm.data.encoding import encode
from inform_rm.errors import InputError
from inform_rm.eval.detection.latents import collect_latents
from inform_rm.scoring.scorer import RewardScorer

PROMPTS = ["Count to three.", "Count to three.", "Name a colour, please.", "Why?"]
RESPONSES = ["One, two, three.", "No.", "Blue " * 9, "Because."]


@pytest.mark.parametrize(("batching", "tokens_per_batch"), (("packed", 5), ("packed", 2048), ("padded", 2048)))
def test_latents_of_inform_are_the_means_of_single_passes(causal_lm_dir, tokenizer, batching, tokens_per_batch):
    model = InfoRMForSequenceClassification.from_backbone(causal_lm_dir("llama"), latent_dim=8, dtype="float32")
    scorer = RewardScorer(model.eval(), tokenizer, batching=batching, tokens_per_batch=tokens_per_batch)
    found = collect_latents(scorer, PROMPTS, RESPONSES)
    assert found.kind == "latent" and found.values.shape == (4, 8) and found.values.dtype == np.float32
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        with torch.no_grad():
            output = model(input_ids=torch.tensor([encode(tokenizer, prompt, response).input_ids]))
        assert found.values[row] == pytest.approx(output.latent_mean[0].numpy(), abs=1e-5)
        assert found.rewards[row] == pytest.approx(output.logits.item(), abs=1e-5)
    assert not model.score._forward_pre_hooks


@pytest.mark.parametrize("batching", ("packed", "padded"))
@pytest.mark.parametrize("name", ("llama", "gpt_neox", "inform"))
def test_other_models_give_the_hidden_state_behind_the_reward(causal_lm_dir, tokenizer, name, batching):
    if name == "inform":
        model = InfoRMForSequenceClassification.from_backbone(
            causal_lm_dir("llama"), architecture="standard", dtype="float32"
        )
    else:
        model = AutoModelForSequenceClassification.from_pretrained(causal_lm_dir(name), num_labels=1)
    scorer = RewardScorer(model.eval(), tokenizer, batching=batching)
    found = collect_latents(scorer, PROMPTS, RESPONSES)
    assert found.kind == "hidden_state"
    backbone = getattr(model, model.base_model_prefix)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        with torch.no_grad():
            ids = torch.tensor([encode(tokenizer, prompt, response).input_ids])
            state = backbone(input_ids=ids).last_hidden_state[0, -1]
        assert found.values[row] == pytest.approx(state.numpy(), abs=1e-5)
        assert found.rewards[row] == pytest.approx(model.score(state).item(), abs=1e-5)


def test_what_cannot_be_done_is_named(causal_lm_dir, tokenizer):
    model = AutoModelForSequenceClassification.from_pretrained(causal_lm_dir("llama"), num_labels=1)
    scorer = RewardScorer(model, tokenizer)
    with pytest.raises(InputError, match="0 prompts and 0 responses"):
        collect_latents(scorer, [], [])
    with pytest.raises(InputError, match="2 prompts and 1 responses"):
        collect_latents(scorer, ["a", "b"], ["c"])
    padded = RewardScorer(model, tokenizer, batching="padded")
    model.forward = lambda plain=model.forward, **inputs: _shifted(plain(**inputs))
    with pytest.raises(InputError, match="does not read its reward from the hidden state"):
        collect_latents(padded, PROMPTS, RESPONSES)


def _shifted(output):
    output.logits = output.logits + 1.0
    return output
