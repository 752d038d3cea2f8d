"""The training loss against NumPy and its limits."""

import numpy as np
import pytest
import torch

from inform_rm.training.losses import (
    PAIR_LOSSES,
    bradley_terry_loss,
    reward_centering_loss,
    reward_model_loss,
    scaled_bradley_terry_loss,
)


@pytest.fixture
def rewards():
    return torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).unbind()


def test_whole_loss_matches_numpy(rewards):
    chosen, rejected = rewards
    generator = torch.Generator().manual_seed(1)
    margin, kl_w, kl_l = torch.rand(3, 16, generator=generator).unbind()
    loss = reward_model_loss(
        chosen, rejected, kl_w, kl_l, beta=0.3, margin=margin, label_smoothing=0.1, center_rewards_coefficient=0.02
    )
    win, lose, gap, kw, kl = (value.double().numpy() for value in (chosen, rejected, margin, kl_w, kl_l))
    probability = 1 / (1 + np.exp(-(win - lose - gap)))
    expected = -0.9 * np.log(probability) - 0.1 * np.log(1 - probability) + 0.3 * (kw + kl) + 0.02 * (win + lose) ** 2
    assert loss.item() == pytest.approx(expected.mean(), rel=1e-6)


def test_without_options_it_is_bradley_terry(rewards):
    torch.testing.assert_close(reward_model_loss(*rewards), bradley_terry_loss(*rewards))


def test_the_kl_of_one_side_alone_is_refused(rewards):
    for kl in ((torch.ones(16), None), (None, torch.ones(16))):
        with pytest.raises(ValueError, match="chosen_kl and rejected_kl: one of them is None"):
            reward_model_loss(*rewards, *kl)


def test_smoothing_needs_no_margin_and_the_default_weight_of_the_kl_is_a_tenth(rewards):
    right, wrong = bradley_terry_loss(*rewards), bradley_terry_loss(*rewards[::-1])
    torch.testing.assert_close(reward_model_loss(*rewards, label_smoothing=0.2), 0.8 * right + 0.2 * wrong)
    torch.testing.assert_close(reward_model_loss(*rewards, torch.ones(16), 2 * torch.ones(16)), right + 0.3)


def test_gradient_of_bradley_terry_is_the_probability_of_being_wrong(rewards):
    chosen, rejected = rewards[0].clone().requires_grad_(), rewards[1]
    bradley_terry_loss(chosen, rejected).backward()
    torch.testing.assert_close(chosen.grad, -torch.sigmoid(rejected - rewards[0]) / 16)


def test_large_margins_neither_overflow_nor_vanish():
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.zeros(2))
    loss.backward()
    assert loss.item() == pytest.approx(5e3)
    assert chosen.grad.tolist() == [0.0, -0.5]


def test_half_precision_rewards_are_compared_in_float32():
    chosen, rejected = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([0.5], dtype=torch.bfloat16)
    assert bradley_terry_loss(chosen, rejected).dtype == torch.float32
    assert bradley_terry_loss(chosen, rejected, torch.ones(1, dtype=torch.float64)).dtype == torch.float32


def test_centering_is_zero_for_opposite_rewards(rewards):
    assert reward_centering_loss(rewards[0], -rewards[0]).item() == 0.0


# Of the gap less the margin, d; and of the gap and the margin where that is a weight.
BY_HAND = {
    "bradley_terry": lambda gap, margin: np.log1p(np.exp(margin - gap)),
    "hinge": lambda gap, margin: np.maximum(0, 1 + margin - gap),
    "margin_exponential": lambda gap, margin: np.exp(margin - gap),
    "scaled_bradley_terry": lambda gap, margin: margin * np.log1p(np.exp(-gap)),
}


def test_every_pair_loss_has_its_formula_here():
    assert set(BY_HAND) == set(PAIR_LOSSES)


@pytest.mark.parametrize("loss_type", PAIR_LOSSES)
def test_a_pair_loss_is_its_formula_smoothed_and_with_kl(loss_type, rewards):
    chosen, rejected = rewards
    margin, kl = torch.rand(2, 16, generator=torch.Generator().manual_seed(1)).unbind()
    gap, by_hand = (chosen - rejected).double().numpy(), BY_HAND[loss_type]
    expected = by_hand(gap, margin.double().numpy())
    torch.testing.assert_close(
        PAIR_LOSSES[loss_type](chosen, rejected, margin).item(), expected.mean(), rtol=1e-5, atol=0
    )
    # Swapped labels: the gap less the margin, or the gap that the margin weighs, changes its sign.
    weighs = loss_type == "scaled_bradley_terry"
    swapped = by_hand(-gap, margin.double().numpy() if weighs else -margin.double().numpy())
    whole = reward_model_loss(
        chosen, rejected, kl, kl, loss=PAIR_LOSSES[loss_type], beta=0.5, margin=margin, label_smoothing=0.2
    )
    total = 0.8 * expected.mean() + 0.2 * swapped.mean() + kl.mean().item()
    assert whole.item() == pytest.approx(total, rel=1e-5)


def test_without_margins_the_weighted_loss_is_bradley_terry(rewards):
    expected = bradley_terry_loss(*rewards)
    torch.testing.assert_close(scaled_bradley_terry_loss(*rewards), expected)
    ones = torch.ones(len(rewards[0]), dtype=torch.float64)  # the loss stays float32
    torch.testing.assert_close(scaled_bradley_terry_loss(*rewards, ones), expected)
