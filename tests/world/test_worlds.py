import dataclasses
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from inform_rm.data.encoding import encode
from inform_rm.data.preferences import load_preferences
from inform_rm.errors import InputError
from inform_rm.world.backbone import train_tokenizer, write_backbone
from inform_rm.world.text import FAMILIES, FILLERS, HEDGES, POLITE_CLOSERS, POLITE_OPENERS, SLOT_WORDS
from inform_rm.world.worlds import (
    SPLITS,
    WorldConfig,
    gold_prompt_related,
    gold_reward,
    gold_style,
    make_pairs,
    sample_prompts,
    sample_responses,
)

WORLDS = st.builds(
    WorldConfig,
    style_bias=st.floats(-1, 1),
    label_noise=st.floats(0, 0.49),
    adversarial_share=st.floats(0, 0.5),
    equal_content_share=st.floats(0, 0.5),
    off_topic_share=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
CLEAN = WorldConfig(label_noise=0.0, equal_content_share=0.0, adversarial_share=0.0)


@pytest.fixture(scope="module")
def world_tokenizer():
    return train_tokenizer()


def words_of(text):
    return re.findall(r"[a-z]+", text.lower())


@given(world=WORLDS, split=st.sampled_from(SPLITS))
@settings(max_examples=40)
def test_gold_rewards_are_counted_again_and_decide_the_preference(world, split):
    """A second implementation that, unlike the first, knows the family and so which slots to look at."""
    for row in make_pairs(world, split, 20):
        for side in ("chosen", "rejected"):
            right = 0
            for slot in FAMILIES[row["family"]].slots:
                asked, said = ([w for w in words_of(row[key]) if w in SLOT_WORDS[slot]] for key in ("prompt", side))
                right += asked == said
            assert row[f"gold_r1_{side}"] == right
        chosen, rejected = (row[f"gold_r1_{side}"] + row[f"gold_r2_{side}"] for side in ("chosen", "rejected"))
        assert (chosen < rejected) if row["label_flipped"] else (chosen > rejected)
        assert split == "train" or not row["label_flipped"]


@given(world=WORLDS, split=st.sampled_from(SPLITS), few=st.integers(1, 6), more=st.integers(0, 6))
@settings(max_examples=20)
def test_a_shorter_run_is_a_prefix_of_a_longer_one(world, split, few, more):
    few, more = 2 * few, 2 * more
    assert make_pairs(world, split, few) == make_pairs(dataclasses.replace(world), split, few + more)[:few]


def test_another_seed_or_split_gives_other_rows():
    runs = [
        [(row["prompt"], row["chosen"]) for row in make_pairs(WorldConfig(seed=seed), split, 50)]
        for seed in (0, 1)
        for split in ("train", "validation", "in_distribution")
    ]
    assert all(len(set(a) & set(b)) < 10 for i, a in enumerate(runs) for b in runs[:i])


@pytest.mark.parametrize("style_bias", [-1.0, -0.4, 1.0])
def test_style_bias_sets_how_often_the_right_response_is_the_one_with_more_filler(style_bias):
    rows = make_pairs(dataclasses.replace(CLEAN, style_bias=style_bias), "train", 2000)
    longer = [count_fillers(row["chosen"]) > count_fillers(row["rejected"]) for row in rows]
    # Three standard errors of 2,000 draws.
    assert sum(longer) / 2000 == pytest.approx((1 + style_bias) / 2, abs=0.034 if abs(style_bias) < 1 else 0)


def count_fillers(text):
    return sum(filler in text for filler in FILLERS)


def test_bias_reversed_pairs_always_prefer_the_response_with_less_filler():
    rows = make_pairs(WorldConfig(), "bias_reversed", 300)
    assert all(count_fillers(row["chosen"]) < count_fillers(row["rejected"]) for row in rows)
    assert all(row["gold_r1_chosen"] > row["gold_r1_rejected"] for row in rows)


def test_style_is_distributed_alike_on_both_sides_of_any_bias():
    """The bias is in who gets the longer style, not in which styles there are: only then is it a shortcut."""
    for split in ("in_distribution", "bias_reversed"):
        rows = make_pairs(CLEAN, split, 1000)
        count = sum(count_fillers(row[side]) for row in rows for side in ("chosen", "rejected")) / 2000
        assert count == pytest.approx(1.5, abs=0.08)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_label_noise_and_shares_are_what_was_asked(share):
    world = WorldConfig(label_noise=share / 2, adversarial_share=share, equal_content_share=0.25)
    rows = make_pairs(world, "train", 3000)
    assert sum(row["label_flipped"] for row in rows) / 3000 == pytest.approx(share / 2, abs=0.03)
    equal = sum(row["gold_r1_chosen"] == row["gold_r1_rejected"] for row in rows) / 3000
    assert equal == pytest.approx(0.25, abs=0.03)
    responses = [frozenset((row["chosen"], row["rejected"])) for row in rows]
    twins = sum(a == b for a, b in zip(responses[1:], responses[:-1], strict=True)) * 2 / 3000
    assert twins == pytest.approx(share, abs=0.04)


def test_adversarial_twins_share_their_responses_and_reverse_the_preference():
    """A reward blind to the prompt is then right on exactly half of them."""
    rows = make_pairs(WorldConfig(), "adversarial_prompt", 200)
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert (first["chosen"], first["rejected"]) == (second["rejected"], second["chosen"])
        assert first["prompt"] != second["prompt"]


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_off_topic_share_is_that_of_rejected_responses_of_another_family(share):
    rows = make_pairs(dataclasses.replace(CLEAN, off_topic_share=share), "train", 2000)
    off_topic = 0
    for row in rows:
        said = {slot for slot, words in SLOT_WORDS.items() if set(words) & set(words_of(row["rejected"]))}
        off_topic += said != set(FAMILIES[row["family"]].slots)
    assert off_topic / 2000 == pytest.approx(share, abs=0.034 if share else 0)


def test_unseen_families_occur_in_their_own_set_only():
    world = WorldConfig(unseen_families=("trip", "shop"))
    for split in SPLITS:
        families = {row["family"] for row in make_pairs(world, split, 200)}
        expected = {"trip", "shop"} if split == "unseen_family" else set(FAMILIES) - {"trip", "shop"}
        assert families == expected


def test_words_of_unseen_families_are_seen_in_others():
    world = WorldConfig()
    seen = {slot for name, family in FAMILIES.items() if name not in world.unseen_families for slot in family.slots}
    assert all(slot in seen for name in world.unseen_families for slot in FAMILIES[name].slots)


def test_each_slot_word_names_one_slot_and_style_says_nothing():
    words = [word for slot in SLOT_WORDS.values() for word in slot]
    assert len(words) == len(set(words))
    style = [word for text in (*FILLERS, *HEDGES, *POLITE_OPENERS, *POLITE_CLOSERS) for word in words_of(text)]
    assert not set(style) & set(words)
    for family in FAMILIES.values():
        for template in family.prompts + family.bodies:
            assert sorted(re.findall(r"{(\w+)}", template)) == sorted(family.slots)
            assert not set(words_of(re.sub(r"{\w+}", "", template))) & set(words)
    assert len({frozenset(family.slots) for family in FAMILIES.values()}) == len(FAMILIES)


@pytest.mark.parametrize(
    ("response", "r1", "r2"),
    [
        # 8 words of 40: 0.3 * 8 / 40
        ("A red fox is easy to know by", 2.0, 0.06),
        ("A red wolf is easy to know by", 1.0, 0.06),
        ("A blue wolf is easy to know by", 0.0, 0.06),
        # names the right animal and a rival: contradicts itself
        ("A red fox or wolf, easy to know", 1.0, 0.06),
        ("- A red fox\n- is easy to", 2.0, 0.06 + 0.15),
        ("A red fox. I hope this helps.", 2.0, 0.3 * 7 / 40 + 0.15),
        ("I may be wrong. A red fox.", 2.0, 0.3 * 7 / 40 - 0.15),
        ("red fox " * 40, 2.0, 0.3),
    ],
)
def test_gold_reward_of_a_response_written_by_hand(response, r1, r2):
    gold = gold_reward("Describe a red fox.", response)
    assert (gold.prompt_related, gold.style) == (r1, pytest.approx(r2))
    assert gold.total == pytest.approx(r1 + r2)


@given(prompt_seed=st.integers(0, 10**6), seed=st.integers(0, 10**6), unseen=st.booleans())
@settings(max_examples=30)
def test_policy_meets_each_word_with_the_given_accuracy_at_its_ends(prompt_seed, seed, unseen):
    prompt = sample_prompts(WorldConfig(), 1, seed=prompt_seed, unseen=unseen)[0]
    right, wrong = (sample_responses(prompt, 5, seed=seed, word_accuracy=accuracy) for accuracy in (1.0, 0.0))
    assert [gold_prompt_related(prompt, response) for response in right] == [2.0] * 5
    assert [gold_prompt_related(prompt, response) for response in wrong] == [0.0] * 5
    assert sample_responses(prompt, 3, seed=seed, word_accuracy=1.0) == right[:3]


def test_policy_draws_style_and_content_apart_and_its_best_of_n_gains_gold():
    prompts = sample_prompts(WorldConfig(), 150, seed=3)
    draws = [sample_responses(prompt, 16, seed=1) for prompt in prompts]
    golds = [[gold_reward(p, r).total for r in responses] for p, responses in zip(prompts, draws, strict=True)]
    mean_of_first, mean_of_best = (sum(g[0] for g in golds) / 150, sum(max(g) for g in golds) / 150)
    assert mean_of_best > mean_of_first + 0.5
    pairs = [(gold_prompt_related(p, r), gold_style(r)) for p, rs in zip(prompts, draws, strict=True) for r in rs]
    style = {value: [s for r1, s in pairs if r1 == value] for value in (0.0, 2.0)}
    assert sum(style[0.0]) / len(style[0.0]) == pytest.approx(sum(style[2.0]) / len(style[2.0]), abs=0.03)


def test_style_never_outweighs_what_was_asked():
    rows = [row for split in SPLITS for row in make_pairs(CLEAN, split, 300)]
    styles = [row[f"gold_r2_{side}"] for row in rows for side in ("chosen", "rejected")]
    assert max(styles) - min(styles) < 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"style_bias": 1.5}, r"style_bias=1.5 must lie in \[-1, 1\]"),
        ({"label_noise": 0.5}, r"label_noise=0.5 must lie in \[0, 0.5\)"),
        ({"label_noise": float("nan")}, "label_noise=nan"),
        ({"adversarial_share": -0.1}, "adversarial_share=-0.1"),
        ({"adversarial_share": 0.6, "equal_content_share": 0.6}, "must not exceed 1"),
        *(
            ({"unseen_families": names}, "unseen_families=.* must be some of")
            for names in (("verse", "opera"), (), tuple(FAMILIES))
        ),
        ({"style_bias": 2, "label_noise": 1}, "style_bias=2 .*label_noise=1 "),
    ],
)
def test_impossible_worlds_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        WorldConfig(**settings)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_pairs(WorldConfig(), "test", 4), "split='test' is not one of train, "),
        (lambda: make_pairs(WorldConfig(), "train", 0), "num_pairs=0 must be positive"),
        (lambda: make_pairs(WorldConfig(), "adversarial_prompt", 3), "even for adversarial_prompt"),
        (lambda: gold_reward("Name a prime number.", "Seven."), "asks for nothing this world knows"),
        (lambda: sample_responses("Describe a red clock lamp fox.", 1), "is not one of this world"),
    ],
)
def test_bad_calls_say_what_is_wrong(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_rows_are_preference_data(tmp_path):
    rows = make_pairs(WorldConfig(), "train", 50)
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    loaded = load_preferences(path).dataset
    for column in ("chosen", "rejected", "subset", "id"):
        assert loaded[column] == [row[column] for row in rows]
    assert [prompt[0]["content"] for prompt in loaded["prompt"]] == [row["prompt"] for row in rows]


def test_tokenizer_has_distinct_special_tokens_and_one_token_per_slot_word(world_tokenizer):
    specials = [world_tokenizer.convert_tokens_to_ids(t) for t in ("<|user|>", "<|assistant|>")]
    specials += [world_tokenizer.pad_token_id, world_tokenizer.bos_token_id, world_tokenizer.eos_token_id]
    assert len(set(specials)) == 5
    assert len(world_tokenizer) <= 2048
    for word in (word for words in SLOT_WORDS.values() for word in words):
        assert len(world_tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1, word


TEXTS = st.text().filter(lambda text: "<|" not in text).map(lambda text: "a" + text)


@given(prompt=TEXTS, response=TEXTS)
@settings(max_examples=30)
def test_any_text_is_encoded_with_one_bos_and_a_final_eos(world_tokenizer, prompt, response):
    ids = encode(world_tokenizer, prompt, response).input_ids
    assert ids[0] == world_tokenizer.bos_token_id and ids.count(world_tokenizer.bos_token_id) == 1
    assert ids[-1] == world_tokenizer.eos_token_id and ids.count(world_tokenizer.eos_token_id) == 1
    assert world_tokenizer.decode(ids) == f"<|bos|><|user|>{prompt}<|assistant|>{response}<|eos|>"


def test_backbone_is_a_small_llama_that_its_seed_decides(tmp_path, world_tokenizer, monkeypatch):
    monkeypatch.setattr("inform_rm.world.backbone.train_tokenizer", lambda: world_tokenizer)
    models = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_backbone(tmp_path / name, seed=seed)
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / name))
    assert 1_000_000 <= models[0].num_parameters() <= 5_000_000
    assert models[0].config.vocab_size == len(world_tokenizer)
    assert models[0].config.pad_token_id == world_tokenizer.pad_token_id
    first, second, other = (model.state_dict()["model.embed_tokens.weight"] for model in models)
    assert first.equal(second) and not first.equal(other)
