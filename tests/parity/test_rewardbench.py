"""RewardBench's way of scoring a sequence classifier gives our rewards.

The `rewardbench` package itself cannot be a test dependency: its only recent release (0.1.4) pins transformers 4.51.0
and fails to import under 4.57 and 5.x (it needs a private name of modeling_llama and an old TRL), and its classifier
path moves inputs to "cuda" by a literal. On 2026-11-21 it was run once by hand in an environment of its own
(rewardbench 0.1.4, transformers 4.51.0, torch 2.13.0, that literal redirected to the CPU) on an exported Llama model,
by path with --trust_remote_code --not_quantized: 7 pairs, largest difference to our rewards 8e-8.

Tested here is what that path does to text and batch, in own code: the chat template rendered to text, the text
tokenized again with left padding, a second BOS hidden by the mask, the logits of the whole batch read as scores.
"""

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from inform_rm.eval.suites.scores import ScoredItem, ties_score
from inform_rm.eval.suites.tables import SUITES
from inform_rm.scoring.scorer import RewardScorer

TOLERANCE = 1e-5


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


@pytest.mark.parametrize(
    ("architecture", "bos"),
    [("inform", "none"), ("standard", "in the template"), ("inform", "added twice")],
)
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


# What calculate_scores_per_section and process_single_model of rewardbench 0.1.4 gave on 2026-11-21 for this input,
# run by hand. On 20 and 200 random inputs of that kind the largest differences to ours were 0 and 3e-17.
ACCURACIES = (
    {"alpacaeval-easy": 0.0, "alpacaeval-hard": 0.37, "alpacaeval-length": 0.74, "donotanswer": 0.1, "hep-cpp": 0.47}
    | {"hep-go": 0.84, "hep-java": 0.2, "hep-js": 0.57, "hep-python": 0.94, "hep-rust": 0.3, "math-prm": 0.5}
    | {"llmbar-adver-GPTInst": 0.67, "llmbar-adver-GPTOut": 0.03, "llmbar-adver-manual": 0.4, "mt-bench-hard": 0.23}
    | {"llmbar-adver-neighbor": 0.77, "llmbar-natural": 0.13, "mt-bench-easy": 0.87, "mt-bench-med": 0.6}
    | {"refusals-dangerous": 0.97, "refusals-offensive": 0.33, "xstest-should-refuse": 0.7}
    | {"xstest-should-respond": 0.06}
)
SECTIONS = {
    "Chat": 0.42963687150837987,
    "Chat Hard": 0.4520614035087719,
    "Safety": 0.36000000000000004,
    "Reasoning": 0.5266666666666667,
}
TIES = [  # id, number of correct answers, rewards
    ("tied:0", 2, (3.5, 2.0, 1.25, 0.5)), ("ref:0", 1, (4.0, 1.0)),
    ("tied:1", 3, (0.5, 0.5, 0.5, -1.0)), ("ref:1", 1, (0.25, -0.5, -1.0)),
    ("tied:2", 2, (1.0, -1.0, 0.0)), ("ref:2", 1, (0.0, 1.0)),
]  # fmt: skip
TIES_SCORE = 0.5264970062788089


def test_sections_weigh_their_subsets_as_rewardbench_does():
    for section in SUITES["rewardbench"].sections:
        if section.weight:
            accuracies = [ACCURACIES[subset.name] for subset in section.subsets]
            found = np.average(accuracies, weights=[subset.share for subset in section.subsets])
            assert found == pytest.approx(SECTIONS[section.name], abs=1e-15)


def test_ties_of_rewardbench_2_are_scored_as_rewardbench_does():
    items = [ScoredItem(name, "Ties", rewards, number) for name, number, rewards in TIES]
    assert ties_score(items)["score"] == pytest.approx(TIES_SCORE, abs=1e-15)
