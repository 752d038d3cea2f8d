"""What training says about the chat template: none there, or one that deletes text."""

import dataclasses
import json
import logging
import shutil

import pytest
from transformers import AutoTokenizer

from inform_rm.scoring.scorer import RewardScorer
from inform_rm.training.reward_arguments import RewardTrainingArguments
from inform_rm.training.run import train

CUTTING_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'].split('</think>')[-1] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def settings(causal_lm_dir, tmp_path):
    """One step on eight pairs, two of them with reasoning on the chosen side."""
    rows = [{"prompt": f"{n} + 1?", "chosen": f"It is {n + 1}.", "rejected": "No idea."} for n in range(8)]
    for row in rows[:2]:
        row["chosen"] = "<think>Let me count.</think>" + row["chosen"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return RewardTrainingArguments(
        model=str(causal_lm_dir("llama")), data=(str(tmp_path / "pairs.jsonl"),), output_dir=str(tmp_path / "run"),
        latent_dim=4, max_steps=1, per_device_train_batch_size=8, gradient_accumulation_steps=1, save_steps=1,
        logging_steps=1, use_cpu=True,
    )  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
def test_training_counts_and_names_pairs_that_lose_text_also_from_the_cache(settings, streaming, tmp_path, caplog):
    for name in ("first", "second"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "inform_rm"):
            result = train(
                dataclasses.replace(
                    settings, chat_template=CUTTING_TEMPLATE, streaming=streaming, output_dir=str(tmp_path / name)
                )
            )
        counts = result["train_pairs"]
        number = counts["num_not_as_written"] if streaming else counts["not_as_written"]["n"]
        examples = counts["not_as_written"] if streaming else counts["not_as_written"]["examples"]
        rows = sorted(example.partition(": ")[0].rpartition("row ")[2] for example in examples)
        assert number == 2 and rows == ["1", "2"]
        assert sum("text of 2 of 8 pairs" in record.message for record in caplog.records) == 1


def test_a_tokenizer_without_template_gets_the_plain_one_for_good(settings, tmp_path, caplog):
    folder = tmp_path / "bare"
    shutil.copytree(settings.model, folder)
    (folder / "chat_template.jinja").unlink()
    with caplog.at_level(logging.WARNING, "inform_rm"):
        train(dataclasses.replace(settings, model=str(folder)))
        told = [record.message for record in caplog.records if "no chat template" in record.message]
        assert len(told) == 1 and "Training uses the plain one" in told[0]
        caplog.clear()
        scorer = RewardScorer(settings.output_dir, device="cpu")
        assert not [record for record in caplog.records if "no chat template" in record.message]
    saved = AutoTokenizer.from_pretrained(settings.output_dir)
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "It is 2."}]
    assert saved.apply_chat_template(turns, tokenize=False) == "\n\nHuman: 1 + 1?\n\nAssistant: It is 2.</s>"
    ids = saved.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    assert scorer.encode("1 + 1?", "It is 2.", "row").input_ids == ids


def test_going_on_from_a_reward_model_without_template_says_what_changes(settings, reward_dir, tmp_path, caplog):
    folder = tmp_path / "own"
    shutil.copytree(reward_dir, folder)
    (folder / "chat_template.jinja").unlink()
    with caplog.at_level(logging.WARNING, "inform_rm"):
        train(dataclasses.replace(settings, model=str(folder)))
    assert sum("Training uses the plain one" in record.message for record in caplog.records) == 1
