"""Best-of-n curves against enumeration, simulation and planted truths; whole runs on tiny models; bad input."""

import copy
import itertools
import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from inform_rm import InfoRMConfig, InfoRMForSequenceClassification
from inform_rm.errors import InputError
from inform_rm.eval.best_of_n.policies import CausalLMPolicy, choose_prompts
from inform_rm.eval.best_of_n.simulate import (
    best_of_n_expectation,
    best_of_n_weights,
    kl_nats,
    overoptimization_curves,
)
from inform_rm.eval.settings import SimulationSettings
from inform_rm.scoring.scorer import NonFiniteRewardError, RewardScorer
from inform_rm.world.policy import WorldGold, WorldPolicy, attack, world_prompts
from inform_rm.world.worlds import WorldConfig, gold_reward, make_pairs, sample_prompts

POWERS = [2**power for power in range(11)]
WORDS = ["apple", "sky", "sea", "rose", "basket"]


def by_enumeration(proxy, values, n):
    """Mean over all n-subsets of the mean value of those with the highest proxy."""
    means = []
    for subset in itertools.combinations(range(len(proxy)), n):
        highest = max(proxy[i] for i in subset)
        means.append(np.mean([values[i] for i in subset if proxy[i] == highest]))
    return np.mean(means)


@settings(max_examples=40)
@given(st.data())
def test_expectation_is_the_mean_over_all_subsets(data):
    number = data.draw(st.integers(1, 7))
    column = st.lists(st.integers(-2, 2), min_size=number, max_size=number)  # few values: many ties
    prompts = data.draw(st.lists(st.tuples(column, column), min_size=1, max_size=3))
    proxy, values = np.array(prompts, dtype=float).transpose(1, 0, 2)
    ns = list(range(1, number + 1))
    expected = [[by_enumeration(*prompt, n) for n in ns] for prompt in prompts]
    found = best_of_n_expectation(proxy, values, ns)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(found[:, 0], values.mean(axis=1), atol=1e-12)
    np.testing.assert_allclose(best_of_n_expectation(proxy, proxy, ns)[:, -1], proxy.max(axis=1), atol=1e-12)


def test_only_the_order_of_the_proxy_matters():
    rng = np.random.default_rng(0)
    proxy, gold = rng.integers(0, 9, (5, 40)) / 4, rng.normal(size=(5, 40))
    expected = best_of_n_expectation(proxy, gold, [1, 3, 40])
    for transform in (np.exp, lambda x: 5 * x - 100, lambda x: x**3):
        np.testing.assert_array_equal(best_of_n_expectation(transform(proxy), gold, [1, 3, 40]), expected)


def test_expectation_agrees_with_a_simulation():
    rng = np.random.default_rng(1)
    proxy = np.round(rng.normal(size=30), 1)  # some ties
    gold = 0.5 * proxy + rng.normal(size=30)
    ns, repeats = [1, 2, 7, 30], 20_000
    for n, expected in zip(ns, best_of_n_expectation(proxy[None], gold[None], ns)[0], strict=True):
        subsets = rng.random((repeats, 30)).argsort(axis=1)[:, :n]
        highest = proxy[subsets] == proxy[subsets].max(axis=1, keepdims=True)
        draws = np.where(highest, gold[subsets], 0).sum(axis=1) / highest.sum(axis=1)
        assert abs(draws.mean() - expected) <= 5 * draws.std() / math.sqrt(repeats) + 1e-12


@pytest.mark.parametrize(("num_responses", "ns"), [(4096, POWERS), (3000, [1, 999, 2999, 3000]), (1, [1])])
def test_weights_sum_to_one_and_are_the_binomial_ratios(num_responses, ns):
    weights = best_of_n_weights(num_responses, ns)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-12, rtol=0)
    assert (weights >= 0).all()
    for row, n in enumerate(ns):
        total = math.comb(num_responses, n)
        for i in {max(1, n - 1), n, (n + num_responses) // 2, num_responses}:
            exact = math.comb(i - 1, n - 1) / total  # integers of any size: the quotient is rounded once
            assert weights[row, i - 1] == pytest.approx(exact, rel=1e-10, abs=1e-300)


def test_kl_of_best_of_n_is_that_of_the_chosen_distribution():
    """Of a fine discretisation: the best of n has density n u^(n-1) in the quantile u."""
    assert kl_nats([1, 2, 1024]) == pytest.approx([0, math.log(2) - 0.5, math.log(1024) - 1023 / 1024])
    edges = np.linspace(0, 1, 200_001)
    for n in (2, 5, 50):
        chosen = np.diff(edges**n)
        chosen = chosen[chosen > 0]
        assert kl_nats(n) == pytest.approx((chosen * np.log(chosen * 200_000)).sum(), abs=1e-3)


def test_a_proxy_that_is_the_gold_reward_never_falls():
    gold = np.random.default_rng(4).normal(size=(20, 64))
    curve = overoptimization_curves(gold, gold, [1, 2, 8, 64])
    assert (np.diff(curve["gold"]["mean"]) > 0).all()
    assert curve["peak"]["n"] == 64 and curve["peak"]["fall"] == 0 and curve["peak"]["fall_interval"] == [0, 0]
    assert curve["gold"] == curve["proxy"]


def planted(num_prompts, number, seed=0):
    """Length is worth its size up to 0.5, where the gold reward turns; the proxy goes on."""
    length = np.random.default_rng(seed).random((num_prompts, number))
    return length, np.minimum(length, 1 - length)


def test_a_proxy_of_length_past_the_cap_of_gold_peaks_where_it_is_planted():
    """E min(U, 1 - U) of the largest of n uniform lengths is 1/4 at n = 1 and at n = 2, less from there on."""
    proxy, gold = planted(400, 512)
    ns = [1, 2, 4, 16, 64, 512]
    curve = overoptimization_curves(proxy, gold, ns, lengths=100 * proxy)
    # The largest of n uniform lengths has density n u^(n-1).
    u = (np.arange(100_000) + 0.5) / 100_000
    expected = [(np.minimum(u, 1 - u) * n * u ** (n - 1)).mean() for n in ns]
    assert curve["gold"]["mean"] == pytest.approx(expected, abs=0.01)
    assert curve["words"]["mean"] == pytest.approx([100 * n / (n + 1) for n in ns], abs=1)
    assert curve["peak"]["n"] in (1, 2) and curve["peak"]["fall"] == pytest.approx(0.25, abs=0.02)
    low, high = curve["peak"]["fall_interval"]
    assert 0.2 < low <= curve["peak"]["fall"] <= high < 0.3
    assert (np.diff(curve["proxy"]["mean"]) > 0).all() and curve["gold"]["gain"][0] == pytest.approx(0, abs=1e-12)
    assert curve["gold"]["gain_interval"][-1][1] < 0
    assert curve["proxy_deviation"] == pytest.approx(math.sqrt(1 / 12), abs=0.01)


def test_a_gold_reward_that_nothing_moves_peaks_at_once():
    proxy = np.random.default_rng(8).random((6, 33))
    peak = overoptimization_curves(proxy, np.full_like(proxy, 0.1), [1, 2, 5, 33])["peak"]
    assert peak["n"] == 1 and peak["kl_nats_interval"] == [0, 0] and peak["fall"] == pytest.approx(0, abs=1e-12)


def test_bootstrap_intervals_cover_the_truth():
    """Gold is uniform and the proxy is gold: the best of n has mean n / (n + 1)."""
    ns, hits = [1, 4, 16], np.zeros(3)
    for seed in range(40):
        values = np.random.default_rng(seed).random((40, 16))
        intervals = np.array(overoptimization_curves(values, values, ns, seed=seed)["gold"]["interval"])
        truth = np.array(ns) / (np.array(ns) + 1)
        hits += (intervals[:, 0] <= truth) & (truth <= intervals[:, 1])
    assert (hits >= 32).all()  # 38 expected of 40; fewer than 32 have a probability below 0.001


@pytest.fixture(scope="module")
def build(backbone_configs, tokenizer):
    """Scorer of a tiny InfoRM or standard model that takes the world's responses in bytes."""

    def build(seed, architecture="inform"):
        torch.manual_seed(seed)
        text_config = copy.deepcopy(backbone_configs["llama"])
        text_config.max_position_embeddings = 2048
        config = InfoRMConfig(text_config=text_config, latent_dim=8, architecture=architecture)
        model = InfoRMForSequenceClassification(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        return RewardScorer(model.eval(), tokenizer, tokens_per_batch=4000)

    return build


def test_the_world_end_to_end(build, tmp_path, drawn):
    scorers = {"inform": build(1), "other": build(2, "standard")}
    options = {"num_prompts": 3, "num_responses": 8, "ns": [1, 3, 8], "seed": 7, "progress": False}
    result = attack(scorers, tmp_path / "run", **options)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "responses.parquet", "curves.png", "result.html", "result.md", "result.json",
    }  # fmt: skip
    table = pq.read_table(tmp_path / "run" / "responses.parquet").to_pydict()
    assert table["prompt_id"] == [number for number in range(3) for _ in range(8)]
    gold = [gold_reward(*row).total for row in zip(table["prompt"], table["response"], strict=True)]
    assert table["gold"] == gold
    for name, scorer in scorers.items():
        rewards = scorer.score(table["prompt"], table["response"]).tolist()
        assert table[name] == pytest.approx(rewards, abs=1e-4)
        grid = np.array(table[name]).reshape(3, 8)
        means = best_of_n_expectation(grid, np.reshape(gold, (3, 8)), [1, 3, 8]).mean(axis=0)
        curve = result.proxies[name]
        assert curve["gold"]["mean"] == pytest.approx(means.tolist())
        assert curve["proxy"]["mean"][-1] == pytest.approx(grid.max(axis=1).mean())
        words = np.mean([len(text.split()) for text in table["response"]])
        assert curve["words"]["mean"][0] == pytest.approx(words)
        assert curve["identity"] == scorer.identity()
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written == result.to_dict()
    assert (written["num_prompts"], written["num_responses"], written["seed"]) == (3, 8, 7)
    page = (tmp_path / "run" / "result.html").read_text()
    assert "<img src=" in page and "inform" in page and "http" not in page.partition("<img")[0]
    assert "inform" in result._repr_html_()
    again, other = (attack(WorldGold(), **options | {"seed": seed}) for seed in (7, 8))
    assert again.prompts_fingerprint == result.prompts_fingerprint != other.prompts_fingerprint
    assert again.responses["response"] == table["response"]


def test_a_file_of_responses_stands_for_the_policy_that_wrote_them(tmp_path):
    prompts, number = world_prompts(4), 8
    written = {prompt: WorldPolicy().sample(prompt, number, 0) for prompt in prompts}
    rows = [
        {"prompt": prompt, "response": texts[n], "finish_reason": "length" if n == 0 else "stop"}
        for n in range(number) for prompt, texts in written.items()
    ]  # fmt: skip
    path = tmp_path / "responses.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"num_responses": number, "gold": WorldGold(), "progress": False}
    recorded = attack(WorldGold(), policy=str(path), **options)
    drawn = attack(WorldGold(), policy=WorldPolicy(), prompts=prompts, **options)
    assert recorded.proxies == drawn.proxies and recorded.cut_responses == 4 and drawn.cut_responses is None
    assert recorded.policy["identity"]["name"] == str(path)
    with pytest.raises(InputError, match=r"has 8 responses to the prompt .*; asked for are 9"):
        attack(WorldGold(), policy=str(path), **options | {"num_responses": 9})
    path.write_text(json.dumps({"prompt": "?"}) + "\n")
    with pytest.raises(InputError, match="row 1: no 'response'"):
        attack(WorldGold(), policy=str(path), **options)


def test_a_language_model_as_policy_and_a_reward_model_as_gold(build, causal_lm_dir, tokenizer, tmp_path):
    proxy, gold = build(1), build(2)
    proxy.model.save_pretrained(tmp_path / "proxy")
    tokenizer.save_pretrained(tmp_path / "proxy")
    prompts = [f"Name a {word}." for word in WORDS]
    options = {
        "gold": gold, "policy": causal_lm_dir("llama"), "num_responses": 8, "ns": [1, 4, 8], "max_new_tokens": 4,
        "progress": False,
    }  # fmt: skip
    result = attack(str(tmp_path / "proxy"), tmp_path / "run", prompts=prompts, **options)
    table = pq.read_table(tmp_path / "run" / "responses.parquet").to_pydict()
    assert table["gold"] == pytest.approx(gold.score(table["prompt"], table["response"]).tolist(), abs=1e-4)
    assert table["proxy"] == pytest.approx(proxy.score(table["prompt"], table["response"]).tolist(), abs=1e-4)
    assert len(set(table["response"])) > 20 and 0 < result.cut_responses <= 40
    assert result.policy["identity"]["max_new_tokens"] == 4
    assert attack(str(tmp_path / "proxy"), prompts=prompts, **options) == result

    rows = [{"prompt": prompt, "chosen": "a", "rejected": side} for prompt in prompts for side in "bc"]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    from_data, from_rows = (attack(proxy, data=source, num_prompts=3, **options) for source in (data, rows))
    assert from_data.num_prompts == 3 and from_data.settings == {"data": str(data)}
    assert from_rows.proxies == from_data.proxies and from_rows.settings == {"data": "list in memory"}


@pytest.mark.parametrize("template", (True, False))
def test_a_cold_policy_writes_what_the_model_finds_most_likely(causal_lm_dir, tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    if not template:
        tokenizer.chat_template = None
    model = AutoModelForCausalLM.from_pretrained(causal_lm_dir("llama")).eval()
    model.generation_config.update(top_k=50, repetition_penalty=1.0)
    ids = tokenizer("<|user|>Name a sea.</s><|assistant|>" if template else "Name a sea.")["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + 5 and ids[-1] != tokenizer.eos_token_id:
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    expected = tokenizer.decode(ids[start:], skip_special_tokens=True)
    policy = CausalLMPolicy(model, tokenizer, temperature=1e-4, max_new_tokens=5)
    assert policy.sample("Name a sea.", 3, seed=0) == [expected.strip() if template else expected] * 3


def test_a_policy_samples_from_the_models_distribution(causal_lm_dir, tokenizer):
    """First tokens against the softmax, also of tokens beyond a top_k that the folder may ask for."""
    model = AutoModelForCausalLM.from_pretrained(causal_lm_dir("llama")).eval()
    model.generation_config.update(top_k=3)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    ids = tokenizer("<|user|>Name a sea.</s><|assistant|>")["input_ids"]
    with torch.no_grad():
        probabilities = model(torch.tensor([ids])).logits[0, -1].softmax(dim=0)
    policy = CausalLMPolicy(model, tokenizer, max_new_tokens=1)
    texts = policy.sample("Name a sea.", 2000, seed=0)
    assert texts == policy.sample("Name a sea.", 2000, seed=0) != policy.sample("Name a sea.", 2000, seed=1)
    expected: dict[str, float] = {}
    for token, probability in enumerate(probabilities.tolist()):
        text = tokenizer.decode([token], skip_special_tokens=True).strip()
        expected[text] = expected.get(text, 0.0) + probability
    for text, probability in expected.items():
        spread = math.sqrt(probability * (1 - probability) / 2000)
        assert abs(texts.count(text) / 2000 - probability) <= 5 * spread + 1e-3
    # The end token alone is a response that ended.
    ended = policy.num_cut / (3 * 2000)
    assert ended == pytest.approx(1 - probabilities[tokenizer.eos_token_id].item(), abs=0.02)


def test_prompts_of_the_world_and_of_data(tmp_path):
    world = world_prompts(150, seed=3)
    assert len(set(world)) == 150 == len(world)
    assert world_prompts(20, seed=3) == world[:20]
    rows = make_pairs(WorldConfig(), "adversarial_prompt", 20)
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [[{"role": "user", "content": text}] for text in dict.fromkeys(row["prompt"] for row in rows)]
    assert choose_prompts(data=path) == prompts
    with pytest.raises(InputError, match=r"num_prompts: 20000; there are \d+ distinct"):
        world_prompts(20_000)
    part = choose_prompts(data=[path], num_prompts=5, seed=1)
    assert len(part) == 5 and all(prompt in prompts for prompt in part)
    result = attack(WorldGold(), data=path, num_prompts=5, num_responses=8, progress=False)
    assert result.proxies["proxy"]["peak"]["fall"] == 0 and result.ns == [1, 2, 4, 8]


class Broken:
    """A reward that is not a number for some responses."""

    name = "broken"

    def score(self, prompts, responses):
        return [math.nan if len(text) % 2 else 1.0 for text in responses]

    def identity(self):
        return {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "there are 0 distinct"),
        ({"prompts": ["Describe a red fox."]}, "there are 1 distinct"),
        ({"prompts": "Describe a red fox."}, "single text"),
        ({"prompts": ["Describe a red fox."] * 2}, r"number 1 .* repeats number 0"),
        ({"prompts": ["Describe a red fox.", " "]}, "prompt: .*only whitespace"),
        (
            {"prompts": ["Describe a red fox.", "Describe a red wolf."], "num_prompts": 3},
            "there are 2 .* least 3",
        ),
        ({"prompts": ["Describe a red fox.", "Who was Plato?"]}, "gold: without a gold reward model"),
        ({"prompts": ["a", "b"], "data": "x.jsonl"}, "prompts and data"),
        ({"data": "missing.jsonl"}, "missing.jsonl"),
        ({"temprature": 0.5}, "temprature: no setting"),
        ({"tokenizer": "x"}, "tokenizer: no setting"),
        ({"policy": 3}, "policy: got a int"),
        ({"policy": "/no/such/folder"}, "model: /no/such/folder"),
        ({"gold": torch.nn.Linear(1, 1)}, "gold: got a Linear"),
        ({"proxy": {}}, "proxy: names"),
        ({"proxy": {"gold": WorldGold()}}, "proxy: names"),
        ({"proxy": Broken()}, "proxy: response .* has nan"),
        ({"gold": Broken()}, "gold: response .* has nan"),
    ],
)
def test_bad_input_is_named(options, message, tmp_path):
    number = None if "prompts" in options else 2
    arguments = {"proxy": WorldGold(), "num_prompts": number, "num_responses": 8, "progress": False, **options}
    with pytest.raises(InputError, match=message):
        attack(arguments.pop("proxy"), tmp_path / "run", **arguments)
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ns": [1, 2, 16]}, r"ns: \[1, 2, 16\].*8 responses"),
        ({"ns": [2, 1]}, r"ns: \[2, 1\].*rising"),
        ({"ns": [0, 1]}, r"ns: \[0, 1\]"),
        ({"ns": []}, r"ns: \[\]"),
        ({"num_responses": 1}, "num_responses: 1"),
        ({"num_responses": True}, "num_responses: True"),
        ({"num_prompts": 0}, "num_prompts: 0"),
        ({"num_prompts": 1}, "num_prompts: 1"),
        ({"seed": -1}, "seed: -1"),
    ],
)
def test_a_wrong_setting_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        SimulationSettings(**{"num_responses": 8} | changes)


@pytest.mark.parametrize("settings", ({"temperature": 0}, {"temperature": math.nan}, {"max_new_tokens": 0}))
def test_bad_settings_of_a_policy_are_named(causal_lm_dir, settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        CausalLMPolicy(causal_lm_dir("llama"), **settings)


def test_a_prompt_without_room_for_the_response_is_named(causal_lm_dir, tokenizer):
    policy = CausalLMPolicy(causal_lm_dir("llama"), max_new_tokens=120)
    with pytest.raises(InputError, match="max_new_tokens=120 exceed the 128"):
        policy.sample("Name a sea, please.", 2, seed=0)
    with pytest.raises(InputError, match="tokenizer"):
        CausalLMPolicy(policy.model)


def test_a_model_that_gives_nan_is_named_with_its_response(build):
    scorer = build(1)
    torch.nn.init.constant_(list(scorer.model.score.parameters())[-1], math.nan)
    with pytest.raises(NonFiniteRewardError, match=r"proxy: the response .* to prompt"):
        attack(scorer, num_prompts=2, num_responses=2, progress=False)


def test_the_worlds_policy_does_what_is_asked_as_often_as_it_is_told_to():
    prompts = sample_prompts(WorldConfig(), 40, seed=3)
    done = {}
    for word_accuracy in (0.2, 0.6):
        policy = WorldPolicy(word_accuracy)
        assert policy.identity() == {"name": "world", "word_accuracy": word_accuracy}
        rows = [(prompt, text) for prompt in prompts for text in policy.sample(prompt, 50, 0)]
        done[word_accuracy] = np.mean([gold_reward(*row).prompt_related for row in rows]) / 2
    # 4000 words each: a standard error of 0.008.
    assert done[0.2] == pytest.approx(0.2, abs=0.03) and done[0.6] == pytest.approx(0.6, abs=0.03)
