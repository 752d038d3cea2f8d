"""Losses of rankings and scores against sums over all orders, over all pairs, and the pair loss."""

import itertools
import math

import pytest
import torch

from inform_rm.errors import InputError
from inform_rm.training.losses import (
    MOST_TIED,
    PAIR_LOSSES,
    RANKING_LOSSES,
    bradley_terry_loss,
    group_loss,
    plackett_luce_loss,
    reward_model_loss,
    score_loss,
)

LABELS = [
    [4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 2.0, 1.0, 0.0], [0.0, 5.0, 5.0, 5.0, -1.0], [1.0, 0.0, 0.0, 0.0],
    [3.0, 1.0, 3.0, 1.0, 2.0], [1.0, 1.0, 1.0, 0.0, 2.0, 2.0],
]  # fmt: skip


def draw(number, seed=0):
    return 2 * torch.randn(number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probability_of_ranking(rewards, labels):
    """Each order's probability, drawn one response after the other; those without a worse response before a better."""
    total = 0.0
    for order in itertools.permutations(range(len(rewards))):
        if any(labels[one] < labels[other] for one, other in itertools.pairwise(order)):
            continue
        left, probability = list(order), 1.0
        for place in order:
            probability *= math.exp(rewards[place]) / sum(math.exp(rewards[other]) for other in left)
            left.remove(place)
        total += probability
    return total


@pytest.mark.parametrize("labels", LABELS)
def test_plackett_luce_is_the_probability_of_all_orders_that_agree(labels):
    rewards = draw(len(labels)).requires_grad_()
    loss = plackett_luce_loss(rewards, torch.tensor(labels))
    assert loss.item() == pytest.approx(-math.log(probability_of_ranking(rewards.tolist(), labels)), rel=1e-9)
    assert torch.autograd.gradcheck(plackett_luce_loss, (rewards, torch.tensor(labels)))


def test_plackett_luce_of_a_chance_model_counts_the_orders():
    labels = torch.tensor([3.0] * 4 + [2.0] * 3 + [1.0] * 2)
    orders = math.factorial(9) / (math.factorial(4) * math.factorial(3) * math.factorial(2))
    assert plackett_luce_loss(torch.full((9,), 7.0), labels).item() == pytest.approx(math.log(orders), rel=1e-6)


def test_plackett_luce_stays_finite_and_refuses_sets_that_are_too_large():
    rewards = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    loss = plackett_luce_loss(rewards, torch.tensor([1.0, 1.0, 0.0]))
    loss.backward()
    assert loss.item() == pytest.approx(1e4) and rewards.grad.isfinite().all()
    as_many = torch.tensor([1.0] * MOST_TIED + [0.0])
    assert plackett_luce_loss(torch.zeros(len(as_many)), as_many).item() == pytest.approx(
        math.log(len(as_many)), rel=1e-6
    )
    many = torch.zeros(MOST_TIED + 2)
    worst = torch.tensor([1.0] + [0.0] * (MOST_TIED + 1))
    assert plackett_luce_loss(many, worst).item() == pytest.approx(math.log(MOST_TIED + 2), rel=1e-6)
    with pytest.raises(ValueError, match=f"{MOST_TIED + 1} tied responses above others; at most {MOST_TIED}"):
        plackett_luce_loss(many, -worst)


def all_pairs(rewards, labels, loss=bradley_terry_loss):
    """The mean over untied pairs, one after the other."""
    each = [
        loss(rewards[one : one + 1], rewards[other : other + 1], None)
        for one, other in itertools.permutations(range(len(labels)), 2)
        if labels[one] > labels[other]
    ]
    return torch.stack(each).mean()


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("labels", LABELS)
def test_all_pairs_is_the_mean_over_untied_pairs(labels, name):
    rewards, groups, loss = draw(len(labels)), torch.zeros(len(labels), dtype=torch.long), PAIR_LOSSES[name]
    found = group_loss(rewards, torch.tensor(labels), groups, loss=loss)
    assert found.item() == pytest.approx(all_pairs(rewards, labels, loss).item())


def test_of_two_responses_it_is_bradley_terry():
    rewards, labels = draw(2), torch.tensor([-2.0, -1.0])
    pair = bradley_terry_loss(rewards[1:], rewards[:1])
    torch.testing.assert_close(plackett_luce_loss(rewards, labels), pair)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("ranking_loss", RANKING_LOSSES)
def test_prompts_of_two_responses_have_exactly_the_loss_and_gradient_of_pairs(ranking_loss):
    rewards, kl = torch.randn(2, 12).unbind()
    rewards.requires_grad_(), kl.requires_grad_()
    margin = torch.rand(6)
    pairs = reward_model_loss(*rewards.chunk(2), *kl.chunk(2), margin=margin, beta=0.3)
    groups, labels = torch.arange(6).repeat(2), torch.tensor([-1.0] * 6 + [-2.0] * 6)
    found = group_loss(rewards, labels, groups, kl, margin=margin, beta=0.3, ranking_loss=ranking_loss)
    torch.testing.assert_close(found, pairs, rtol=1e-6, atol=0)
    for one, other in zip(gradients(found, rewards, kl), gradients(pairs, rewards, kl), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_pairs_of_two_keep_smoothing_centering_and_their_loss():
    rewards = torch.randn(8)
    settings = {"loss": PAIR_LOSSES["hinge"], "label_smoothing": 0.1, "center_rewards_coefficient": 0.2}
    groups, labels = torch.arange(4).repeat(2), torch.tensor([1.0] * 4 + [0.0] * 4)
    torch.testing.assert_close(
        group_loss(rewards, labels, groups, **settings), reward_model_loss(*rewards.chunk(2), **settings)
    )


@pytest.mark.parametrize("ranking_loss", RANKING_LOSSES)
def test_a_mixed_batch_is_the_mean_over_its_prompts(ranking_loss):
    one = {"all_pairs": all_pairs, "plackett_luce": plackett_luce_loss}[ranking_loss]
    labels = [torch.tensor(values) for values in (*LABELS, [1.0, 0.0], [2.5], [0.5])]
    rewards = [draw(len(values), seed).float() for seed, values in enumerate(labels)]
    kl = [draw(len(values), 50 + seed).float().abs() for seed, values in enumerate(labels)]
    each = [
        (one(r, y) if len(y) > 1 else 0.7 * (r[0] - y[0]) ** 2) + 0.2 * k.sum()
        for r, y, k in zip(rewards, labels, kl, strict=True)
    ]
    groups = torch.cat([torch.full((len(values),), place) for place, values in enumerate(labels)])
    shuffled = torch.randperm(len(groups), generator=torch.Generator().manual_seed(1))
    parts = (torch.cat(values)[shuffled] for values in (rewards, labels))
    found = group_loss(
        *parts, groups[shuffled], torch.cat(kl)[shuffled], ranking_loss=ranking_loss, score_loss_coefficient=0.7,
        beta=0.2,
    )  # fmt: skip
    torch.testing.assert_close(found, torch.stack(each).mean())


def test_half_precision_rewards_lose_nothing_more():
    rewards, labels = draw(5).bfloat16(), torch.tensor([3.0, 1.0, 3.0, 1.0, 2.0])
    assert plackett_luce_loss(rewards, labels).item() == plackett_luce_loss(rewards.float(), labels).item()
    tied = group_loss(rewards, torch.zeros(5), torch.zeros(5, dtype=torch.long))
    assert tied.item() == 0 and tied.dtype == torch.float32


def test_by_default_a_score_weighs_as_much_as_a_pair_and_a_nat_a_tenth():
    one = torch.zeros(1, dtype=torch.long)
    assert group_loss(torch.tensor([2.0]), torch.tensor([0.0]), one, torch.tensor([3.0])).item() == pytest.approx(4.3)
    three = torch.zeros(3, dtype=torch.long)
    assert group_loss(torch.zeros(3), torch.tensor([2.0, 1.0, 0.0]), three).item() == pytest.approx(math.log(2))
    with pytest.raises(InputError, match="ranking_loss: got 'listwise'; expected one of all_pairs, plackett_luce"):
        group_loss(torch.zeros(3), torch.tensor([2.0, 1.0, 0.0]), three, ranking_loss="listwise")


def test_score_loss_is_the_squared_error():
    rewards, scores = draw(5), draw(5, 1)
    torch.testing.assert_close(
        score_loss(rewards, scores), torch.nn.functional.mse_loss(rewards.float(), scores.float())
    )
