"""RRM augmentation: what is added, and that a run learns from it."""

import dataclasses
import json

import pytest
from datasets import Dataset

from inform_rm.data.preferences import load_preferences
from inform_rm.errors import InputError
from inform_rm.training.augmentation import add_non_contextual_pairs
from inform_rm.training.reward_arguments import RewardTrainingArguments
from inform_rm.training.run import train


@pytest.fixture
def pairs_file(tmp_path):
    rows = [
        {"prompt": f"Name fruit {number % 7}.", "chosen": f"Apple {number}.", "rejected": f"Pear {number}!"}
        for number in range(30)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_response_is_preferred_to_one_of_another_prompt(pairs_file):
    pairs = load_preferences(pairs_file).dataset
    more = add_non_contextual_pairs(pairs, seed=0)
    assert len(more) == 90 and more.features == pairs.features
    assert more.select(range(30)).to_list() == pairs.to_list()
    prompt_of = {row[side]: row["prompt"] for row in pairs for side in ("chosen", "rejected")}
    for number, side in enumerate(("chosen", "rejected"), start=1):
        for original, added in zip(pairs, more.select(range(30 * number, 30 * number + 30)), strict=True):
            assert added["prompt"] == original["prompt"] and added["chosen"] == original[side]
            assert prompt_of[added["rejected"]] != original["prompt"]
            assert added["id"] == f"{original['id']}/rrm-{side}" and added["row"] == original["row"]
    foreign = more["rejected"][30:]
    assert 15 < sum(text.startswith("Apple") for text in foreign) < 45  # of both sides


def test_the_draw_has_a_seed(pairs_file):
    pairs = load_preferences(pairs_file).dataset
    one, same, other = (add_non_contextual_pairs(pairs, seed)["rejected"][:] for seed in (0, 0, 1))
    assert one == same and one != other


def test_equal_responses_are_not_paired(pairs_file):
    pairs = load_preferences(pairs_file).dataset
    rows = pairs.to_list()
    for row in rows[:-1]:
        row["chosen"] = "Yes."
    more = add_non_contextual_pairs(Dataset.from_list(rows, features=pairs.features), seed=0)
    assert all(row["chosen"].strip() != row["rejected"].strip() for row in more)


def test_one_prompt_or_one_response_is_refused(pairs_file):
    pairs = load_preferences(pairs_file).dataset
    same = [{**row, "prompt": pairs[0]["prompt"]} for row in pairs]
    with pytest.raises(InputError, match="at least two prompts"):
        add_non_contextual_pairs(Dataset.from_list(same, features=pairs.features), seed=0)
    same = [{**row, "chosen": "Yes.", "rejected": "Yes."} for row in pairs]
    with pytest.raises(InputError, match=r"no other response for .*pairs.jsonl, row 1"):
        add_non_contextual_pairs(Dataset.from_list(same, features=pairs.features), seed=0)


def test_a_run_trains_on_the_added_pairs_and_evaluates_without(pairs_file, causal_lm_dir, tmp_path):
    config = RewardTrainingArguments(
        model=str(causal_lm_dir("llama")), data=(str(pairs_file),), eval_data=(str(pairs_file),),
        output_dir=str(tmp_path / "run"), latent_dim=4, augmentation="rrm", per_device_train_batch_size=10,
        gradient_accumulation_steps=1, use_cpu=True,
    )  # fmt: skip
    result = train(config)
    assert result["train_pairs"]["pairs"] == 90 and result["steps"] == 9
    assert result["evaluation"]["num_pairs"] == 30
    plain = train(dataclasses.replace(config, augmentation="none", output_dir=str(tmp_path / "plain")))
    assert plain["train_pairs"]["pairs"] == 30
