"""RewardBench's way of scoring a sequence classifier gives our rewards.

The `rewardbench` package itself cannot be a test dependency: its only recent release (0.1.4) pins transformers 4.51.0
and fails to import under 4.57 and 5.x (it needs a private name of modeling_llama and an old TRL), and its classifier
path moves inputs to "cuda" by a literal. On 2026-11-21 it was run once by hand in an environment of its own
(rewardbench 0.1.4, transformers 4.51.0, torch 2.13.0, that literal redirected to the CPU) on an exported Llama model,
by path with --trust_remote_code --not_quantized: 7 pairs, largest difference to our rewards 8e-8.

Tested here is what that path does to text and batch, in own code: the chat template rendered to text, the text
tokenized again with left padding, a second BOS hidden by the mask, the logits of the whole batch read as scores.
"""

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from inform_rm.scoring import RewardScorer

TOLERANCE = 1e-5  # DESIGN's "one score"


def rewardbench_scores(model, tokenizer, texts: list[str]) -> torch.Tensor:
    tokenizer.padding_side = "left"
    inputs = tokenizer(texts, padding=True, truncation=False, return_tensors="pt")
    rows = torch.arange(len(texts))
    first = inputs["attention_mask"].argmax(dim=1)
    is_bos = inputs["input_ids"] == tokenizer.bos_token_id
    doubled = is_bos[rows, first] & is_bos[rows, first + 1]
    inputs["attention_mask"][rows[doubled], first[doubled]] = 0
    with torch.no_grad():
        return model(**inputs).logits.float()[:, 0]


@pytest.mark.parametrize("architecture", ["inform", "standard"])
@pytest.mark.parametrize("bos", ["none", "in the template", "added twice"])
def test_rewardbench_and_scorer_agree(architecture, bos, save_reward_model, preference_rows):
    folder = save_reward_model(architecture)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if bos != "none":
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    if bos == "added twice":
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    prompts = [row["prompt"] for row in preference_rows]
    for side in ("chosen", "rejected"):
        responses = [row[side] for row in preference_rows]
        ours = RewardScorer(model, tokenizer).score(prompts, responses)
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}], tokenize=False
            )
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        torch.testing.assert_close(rewardbench_scores(model, tokenizer, texts), ours, rtol=0, atol=TOLERANCE)
        assert ours.std() > 100 * TOLERANCE  # the rewards differ between rows, or agreement would mean little

        if bos != "added twice":  # the pipeline keeps what the tokenizer adds
            classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu", batch_size=5)
            scores = torch.tensor([row["score"] for row in classify(texts, function_to_apply="none")])
            torch.testing.assert_close(scores, ours, rtol=0, atol=TOLERANCE)
