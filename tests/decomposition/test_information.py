"""Mutual information of the decomposition: brute force over the joint table of small discrete cases."""

import itertools

import numpy as np
import pytest
import torch

from inform_rm.decomposition.information import NAMES, information_terms, mutual_information
from inform_rm.decomposition.prompt_free_gap import prompt_free_gap


def sigmoid(value):
    return 1 / (1 + np.exp(-value))


def information(joint, of, given=()):
    """I(first; second | given) of a dictionary outcome -> probability; the three name places in the outcome."""
    first, second = of

    def total(places):
        found = {}
        for outcome, probability in joint.items():
            key = tuple(outcome[place] for place in places)
            found[key] = found.get(key, 0.0) + probability
        return found

    given = tuple(given)
    whole, one, other = total((*first, *second, *given)), total((*first, *given)), total((*second, *given))
    alone = total(given)
    nats = 0.0
    for outcome, probability in whole.items():
        a, b, c = outcome[: len(first)], outcome[len(first) : len(first) + len(second)], outcome[-len(given) :]
        c = c if given else ()
        if probability:
            nats += probability * np.log(probability * alone[c] / (one[a + c] * other[b + c]))
    return nats


def brute_force(gaps, weights):
    """Every outcome (pair, order, prompt, W, W~, Z~, Z) with its probability; then the definitions."""
    free = prompt_free_gap(torch.tensor(gaps), torch.tensor(weights)).numpy()
    joint = {}
    for i, order in itertools.product(range(len(gaps)), (1, -1)):
        shares = weights[i] / weights[i].sum()
        mean = (shares * sigmoid(order * gaps[i])).sum()
        for k in range(gaps.shape[1]):
            coins = (
                sigmoid(order * gaps[i, k]),
                mean,
                sigmoid(order * free[i]),
                sigmoid(order * (gaps[i, k] - free[i])),
            )
            for sides in itertools.product((0, 1), repeat=4):
                chance = np.prod([coin if side else 1 - coin for coin, side in zip(coins, sides, strict=True)])
                joint[(i, order, k, *sides)] = shares[k] * chance / (2 * len(gaps))
    pair, prompt, w, mean_w, free_z, related_z = (0, 1), (2,), (3,), (4,), (5,), (6,)
    return {
        "preference": information(joint, (pair + prompt, w)),
        "responses": information(joint, (pair, w)),
        "prompt": information(joint, (prompt, w), pair),
        "prompt_free": information(joint, (free_z, mean_w)),
        "prompt_related": information(joint, (related_z, mean_w)),
    }, information(joint, (pair, mean_w))


def found(gaps, weights, **options):
    terms = information_terms(torch.tensor(gaps), torch.tensor(weights))
    return mutual_information({name: value.numpy() for name, value in terms.items()}, **options)


@pytest.mark.parametrize(("seed", "scale"), [(0, 1.0), (1, 4.0), (2, 0.2)])
def test_informations_are_those_of_the_joint_table(seed, scale):
    rng = np.random.default_rng(seed)
    gaps, weights = scale * rng.normal(size=(4, 3)) + scale * rng.normal(size=(4, 1)), rng.uniform(0.1, 1, (4, 3))
    expected, of_mean = brute_force(gaps, weights)
    made = found(gaps, weights)
    assert list(made) == list(NAMES) == list(expected)
    for name, value in expected.items():
        assert made[name]["nats"] == pytest.approx(value, abs=1e-9), name
    assert of_mean == pytest.approx(expected["responses"], abs=1e-9)  # of W and of W~ it is the same
    assert expected["prompt_related"] == pytest.approx(0, abs=1e-9)
    assert made["preference"]["nats"] == pytest.approx(made["responses"]["nats"] + made["prompt"]["nats"])


def test_a_reward_of_the_response_alone_has_nothing_from_the_prompt_and_one_of_the_prompt_nothing_from_the_responses():
    ones = np.ones((3, 2))
    blind = found(np.array([[3.0, 3.0], [-1.0, -1.0], [0.5, 0.5]]), ones)
    assert blind["prompt"]["nats"] == pytest.approx(0, abs=1e-12) and blind["responses"]["nats"] > 0.1
    fickle = found(np.array([[5.0, -5.0], [2.0, -2.0], [1.0, -1.0]]), ones)
    assert fickle["responses"]["nats"] == pytest.approx(0, abs=1e-12) and fickle["prompt"]["nats"] > 0.2


def test_a_prompt_without_weight_does_not_count():
    gaps = np.array([[1.0, 2.0, np.nan], [-1.0, 0.5, np.inf]])
    weights = np.array([[1.0, 2.0, 0.0], [1.0, 1.0, 0.0]])
    made, expected = found(gaps, weights), found(gaps[:, :2], weights[:, :2])
    assert {name: part["nats"] for name, part in made.items()} == pytest.approx(
        {name: part["nats"] for name, part in expected.items()}
    )


def test_the_interval_covers_the_information_of_the_population():
    rng = np.random.default_rng(0)
    gaps = rng.normal(size=(4000, 3)) + rng.normal(size=(4000, 1))
    weights = np.ones_like(gaps)
    terms = {
        name: value.numpy() for name, value in information_terms(torch.tensor(gaps), torch.tensor(weights)).items()
    }
    truth = mutual_information(terms, num_resamples=1)
    covered = np.zeros(4)
    for draw in range(60):
        rows = rng.choice(4000, 100)
        made = mutual_information({name: values[rows] for name, values in terms.items()}, num_resamples=60, seed=draw)
        covered += [
            made[name]["interval"][0] <= truth[name]["nats"] <= made[name]["interval"][1] for name in NAMES[:4]
        ]
    assert (covered >= 51).all()
