"""Information in the log: a bound of I(S; Y) from below and one from above, against the integral itself."""

import numpy as np
import pytest
import torch

from inform_rm.training.metrics import metrics_from_sums, pair_sums

POINTS = np.linspace(-8, 8, 161)
STEP = POINTS[1] - POINTS[0]


def normal(mean, variance):
    return np.exp(-((POINTS - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)


@pytest.mark.parametrize("seed", range(4))
def test_the_loss_bounds_the_information_from_below_and_the_kl_from_above(seed):
    """Four inputs with one latent each; of each pair, in both orders, the first is preferred with some probability."""
    rng = np.random.default_rng(seed)
    means, variances = rng.normal(size=4) * 1.5, rng.uniform(0.1, 1, 4)
    first_wins = rng.uniform(size=(4, 4))
    first_wins = (first_wins + 1 - first_wins.T) / 2
    slope = rng.uniform(0.2, 2)  # a decoder that is not the best one
    density = [normal(mean, variance) for mean, variance in zip(means, variances, strict=True)]
    pairs = [(a, b) for a in range(4) for b in range(4) if a != b]
    joint = np.zeros((2, len(POINTS), len(POINTS)))  # of Y and both latents
    for a, b in pairs:
        cell = np.outer(density[a], density[b]) * STEP**2 / len(pairs)
        joint += np.stack([first_wins[a, b] * cell, (1 - first_wins[a, b]) * cell])
    of_latents, of_label = joint.sum(0), joint.sum((1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = joint * np.log(joint / (of_latents * of_label[:, None, None]))
    information = np.nansum(terms)
    gaps = slope * (POINTS[:, None] - POINTS)
    loss = (joint[0] * np.logaddexp(0, -gaps) + joint[1] * np.logaddexp(0, gaps)).sum()
    kl = 0.5 * (means**2 + variances - 1 - np.log(variances))
    assert of_label == pytest.approx([0.5, 0.5])
    assert np.log(2) - loss <= information <= 2 * kl.mean()
    best = np.log(joint[0] + 1e-300) - np.log(joint[1] + 1e-300)  # the bound is tight for the best decoder
    loss = (joint[0] * np.logaddexp(0, -best) + joint[1] * np.logaddexp(0, best)).sum()
    assert np.log(2) - loss == pytest.approx(information, abs=1e-6)


def test_what_is_logged_is_ln_2_minus_the_mean_loss_whatever_the_batches():
    chosen, rejected = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([0.0, 0.5, 3.0])
    kl = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 9.0])
    whole = pair_sums(chosen, rejected, kl)
    parts = pair_sums(chosen[:1], rejected[:1], kl[[0, 3]]) + pair_sums(chosen[1:], rejected[1:], kl[[1, 2, 4, 5]])
    torch.testing.assert_close(whole, parts)
    found = metrics_from_sums(whole, has_kl=True)
    gaps = np.array([2.0, -0.5, -4.0])
    assert found["label_information_nats"] == pytest.approx(np.log(2) - np.log1p(np.exp(-gaps)).mean())
    assert found["kl_nats"] == 4.0
    assert "label_information_nats" not in metrics_from_sums(whole, has_kl=False)
