"""The world behind docs/results/hacking.md: exact figures by enumeration, many models at once as alone."""

import itertools
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from inform_rm.eval.best_of_n.simulate import best_of_n_expectation

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
if not FOLDER.is_dir():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)
sys.path.insert(0, str(FOLDER))

import mechanism  # noqa: E402
import mechanism_detection_report as detection_report  # noqa: E402
import mechanism_models as models  # noqa: E402
import mechanism_penalty as penalty  # noqa: E402
import mechanism_world as world  # noqa: E402

WORTH = torch.tensor([0.9, -0.4, 0.0, 0.2], dtype=torch.float64)
BASE = torch.tensor([0.1, 0.2, 0.4, 0.3], dtype=torch.float64)
POLICY = torch.tensor([0.5, 0.1, 0.0, 0.4], dtype=torch.float64)
LENGTH = 3
RESPONSES = torch.tensor(list(itertools.product(range(len(WORTH)), repeat=LENGTH)))


def probability(policy):
    """Of each response, word by word."""
    return torch.tensor([math.prod(policy[word].item() for word in row) for row in RESPONSES.tolist()])


def gold_by_hand(response, cost=0.3):
    """A second program for the gold reward, from the words' counts."""
    counts = Counter(response)
    return sum(WORTH[word].item() * number for word, number in counts.items()) - cost * sum(
        number - 1 for number in counts.values()
    )


@pytest.fixture
def _three_words_a_response(monkeypatch):
    monkeypatch.setattr(world, "LENGTH", LENGTH)


def test_gold_is_that_of_a_second_program():
    by_hand = torch.tensor([gold_by_hand(row) for row in RESPONSES.tolist()], dtype=torch.float64)
    torch.testing.assert_close(world.gold(RESPONSES, WORTH), by_hand)


@pytest.mark.usefixtures("_three_words_a_response")
def test_mean_gold_and_kl_of_a_policy_are_those_of_the_enumerated_responses():
    own, base = probability(POLICY), probability(BASE)
    by_hand = torch.tensor([gold_by_hand(row) for row in RESPONSES.tolist()])
    possible = own > 0
    kl = (own[possible] * (own[possible] / base[possible]).log()).sum()
    assert world.expected_gold(POLICY, WORTH).item() == pytest.approx((own * by_hand).sum().item(), abs=1e-6)
    assert world.policy_kl(POLICY, BASE).item() == pytest.approx(kl.item(), abs=1e-6)


@pytest.mark.usefixtures("_three_words_a_response")
def test_tilted_words_are_the_best_of_all_policies_at_a_kl_penalty(monkeypatch):
    monkeypatch.setattr(world, "REPETITION_COST", 0.0)  # the reward is then a sum over words
    penalty = 0.7
    rewards = world.gold(RESPONSES, WORTH)
    best_of_all = penalty * (probability(BASE) * (rewards / penalty).exp()).sum().log()  # over responses, not words
    tilted = BASE * (WORTH / penalty).exp()
    tilted /= tilted.sum()
    reached = world.expected_gold(tilted, WORTH) - penalty * world.policy_kl(tilted, BASE)
    assert reached.item() == pytest.approx(best_of_all.item(), abs=1e-6)


def test_draws_have_the_policys_shares():
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    drawn = world.draw(torch.stack([BASE, POLICY]), uniform.expand(2, -1))
    for row, policy in zip(drawn, (BASE, POLICY), strict=True):
        torch.testing.assert_close(torch.bincount(row, minlength=4) / 1000, policy.float())


def test_labels_follow_gold_but_for_the_flipped_ones():
    pairs = world.make_pairs(made := world.make_world(3, world.Dials()), 4000, noise=0.25)
    gaps = world.gold(pairs.chosen, made.worth) - world.gold(pairs.rejected, made.worth)
    assert torch.equal(gaps < 0, pairs.flipped)
    assert abs(pairs.flipped.float().mean().item() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)


def test_biased_labels_like_words_that_gold_does_not():
    shares = []
    for bias in (0.0, 50.0):
        pairs = world.make_pairs(world.make_world(3, world.Dials()), 2000, noise=0.0, bias=bias)
        counts = [((x >= 24) & (x < 28)).sum(dim=1) for x in (pairs.chosen, pairs.rejected)]
        shares.append((counts[0] > counts[1])[counts[0] != counts[1]].float().mean().item())
    assert shares[1] == 1.0
    assert shares[0] < 0.6


def test_best_of_n_is_that_of_every_set_and_of_the_package():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    found = models.expected_best(rewards, values, (1, 3, 7))
    for row, (own, value) in enumerate(zip(rewards, values, strict=True)):
        best = [value[max(chosen, key=lambda place: own[place])] for chosen in itertools.combinations(range(7), 3)]
        assert found[row, 1].item() == pytest.approx(sum(best).item() / len(best))
    torch.testing.assert_close(found, torch.tensor(best_of_n_expectation(rewards.numpy(), values.numpy(), [1, 3, 7])))


def test_policy_slope_is_the_gradient_of_the_surrogate():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    words = torch.randint(5, (2, 7, 3), generator=generator)
    advantage = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    log_policy = logits.log_softmax(dim=-1)
    chosen = torch.stack([row[each].sum(dim=-1) for row, each in zip(log_policy, words, strict=True)])
    (-(advantage * chosen).mean(dim=1)).sum().backward()
    found = models.policy_slope(logits.softmax(dim=-1).detach(), words, advantage)
    torch.testing.assert_close(found, logits.grad)


def test_models_trained_at_once_are_those_trained_alone_with_torchs_adamw(monkeypatch):
    monkeypatch.setattr(  # transformers' own computes in float32 whatever the weights are
        LlamaRMSNorm,
        "forward",
        lambda norm, states: torch.nn.functional.rms_norm(
            states, states.shape[-1:], norm.weight, norm.variance_epsilon
        ),
    )
    dials = world.Dials(pairs=96, noise=0.1, epochs=1)
    variants = [models.Variant(beta=0.1, kl_warmup_steps=0.0), models.Variant(beta=0.3, weight_decay=2.0)]
    sets, device = [models.training_set(seed, dials) for seed in (0, 1)], torch.device("cpu")
    proxies = models.Proxies(variants, [0, 1], device)
    proxies.model.double()  # in float32 Adam makes much of the rounding of gradients near 0
    proxies.weights = {name: value.double() for name, value in proxies.weights.items()}
    models.train(proxies, variants, [0, 1], sets)

    model = models.Proxies(variants[1:], [1], device).model.double().train()  # the second alone, step by step
    optimizer = torch.optim.AdamW(model.parameters(), lr=models.LEARNING_RATE, weight_decay=2.0)
    for step, (words, noise) in enumerate(models.batches(sets[1:], [1], 128, device)):
        ids = torch.cat([words[0], torch.full((64, 1), world.VOCABULARY + 1)], dim=1)
        out = model(input_ids=ids, latent_noise=noise[0])
        chosen, rejected = out.logits[:, 0].chunk(2)
        weight = models.KLWarmup(0.3, 0.25).weight(step, 3)
        loss = torch.nn.functional.softplus(rejected - chosen).mean() + 2 * weight * out.kl.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = (
            models.LEARNING_RATE * (step + 1) / models.WARMUP_STEPS * 0.5 * (1 + math.cos(math.pi * step / 3))
        )
        optimizer.step()
    for name, value in model.named_parameters():
        torch.testing.assert_close(proxies.weights[name][1], value.detach(), atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("architecture", ["inform", "standard"])
def test_rewards_are_those_of_the_packages_model(architecture):
    variants, device = [models.Variant(architecture)] * 2, torch.device("cpu")
    proxies = models.Proxies(variants, [0, 1], device)
    words = torch.randint(world.VOCABULARY, (2, 700, 16), generator=torch.Generator().manual_seed(0))
    rewards = proxies.score(words)
    ids = torch.cat([words, words.new_full((2, 700, 1), world.VOCABULARY + 1)], dim=2)
    for place in range(2):
        out = models.fresh_model(variants[0].shape(), place).eval()(input_ids=ids[place])
        torch.testing.assert_close(rewards[place], out.logits[:, 0], atol=2e-6, rtol=0)
        if architecture == "inform":
            torch.testing.assert_close(proxies.score(words, kl=True)[place], out.kl, atol=1e-3, rtol=1e-5)


def test_a_policy_under_a_kl_penalty_reaches_the_optimum(monkeypatch):
    monkeypatch.setattr(world, "REPETITION_COST", 0.0)  # the reward is then a sum over words: the optimum is a tilt
    monkeypatch.setattr(
        penalty, "RESPONSES", 2048
    )  # few draws stay around the optimum, how near is the processor's matter
    worth, base, penalties = WORTH.float(), BASE.float(), torch.tensor([0.3, 1.0])
    found = penalty.maximize(
        lambda words: world.gold(words, worth), base, penalties, torch.Generator().manual_seed(0), steps=400
    )
    tilted = base * (worth / penalties[:, None]).exp()
    tilted /= tilted.sum(dim=-1, keepdim=True)
    value, best = (world.expected_gold(each, worth) - penalties * world.policy_kl(each, base)
                   for each in (found, tilted))  # fmt: skip
    assert (value <= best + 1e-5).all()  # that of all policies, see the test of the tilt
    torch.testing.assert_close(value, best, atol=0.02, rtol=0)


def test_area_under_roc_is_that_of_scikit_learn():
    from sklearn.metrics import roc_auc_score

    generator = np.random.default_rng(0)
    values, labels = generator.integers(5, size=60).astype(float), generator.random(60) < 0.3
    found = detection_report.area(values[labels], values[~labels])
    assert found == pytest.approx(roc_auc_score(labels, values))


def test_what_a_stop_keeps_is_gold_at_the_first_crossing():
    run = {"gold": [0.0, 2.0, 4.0, 3.0, 1.0], "values": {"s": [9.0] * detection_report.NULL_SETS + [0, 1, 5, 3, 7]}}
    kept = [detection_report.kept_by(run, "s", level) for level in (-1.0, 0.5, 4.0, 6.0, 8.0)]
    assert kept == [0.0, 0.5, 1.0, 0.25, 0.25]  # at the first crossing, else at the end


def test_states_of_a_run_come_together_and_the_attacked_one_stays(tmp_path):
    (tmp_path / "results").mkdir()
    rows = [
        {"key": "a", "end": {"accuracy": 1}, "best": {"accuracy": 2}},
        {"key": "a", "best": {"accuracy": 2, "policy": {}}},
        {"key": "a", "best": {"accuracy": 3}},
    ]
    text = "\n".join(map(json.dumps, rows)) + '\n{"key": "a", "en'
    (tmp_path / "results" / "1.jsonl").write_text(text)
    found = mechanism.read_results(tmp_path)
    assert found == {"a": {"key": "a", "end": {"accuracy": 1}, "best": {"accuracy": 2, "policy": {}}}}


def test_validation_pairs_of_the_selection_seeds_choose():
    variants, dials = [models.Variant(beta=0.1), models.Variant(beta=0.2), models.Variant(beta=0.3)], world.Dials()
    results = {}
    for variant, right in zip(variants, (0.6, 0.7, 0.9), strict=True):
        for seed in [*mechanism.SELECTION_SEEDS][: 2 if right == 0.9 else 4]:  # the third was not run on all
            states = {"end": {"validation_accuracy": right}, "best": {"validation_accuracy": right + 0.05}}
            results[mechanism.key_of(variant, seed, dials)] = states
    for seed in mechanism.REPORT_SEEDS:  # these have no say
        results[mechanism.key_of(variants[0], seed, dials)] = {"end": {"validation_accuracy": 1.0}}
    assert mechanism.chosen(results, variants, dials) == (variants[1], "best")
