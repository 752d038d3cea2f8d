"""The training loss as pure functions of tensors. The two formulas that the model itself needs live with the model.

A pair loss takes ``(chosen_rewards, rejected_rewards, margin=None)``, B rewards each, and returns a scalar, the mean
over pairs. To add one: write the function here, name it in `PAIR_LOSSES`, and add its formula to the tests.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from inform_rm.modeling_inform import bradley_terry_loss, kl_to_standard_normal, pair_gaps

__all__ = [
    "PAIR_LOSSES",
    "PairLoss",
    "bradley_terry_loss",
    "hinge_loss",
    "kl_to_standard_normal",
    "kl_weight",
    "margin_exponential_loss",
    "pair_gaps",
    "reward_centering_loss",
    "reward_model_loss",
    "scaled_bradley_terry_loss",
]

PairLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def hinge_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, margin: Tensor | None = None) -> Tensor:
    """``max(0, 1 - (r_w - r_l - margin))``: RankSVM (Joachims 2002, eq. 12 and 13); no gradient beyond the margin.

    Example:
        >>> import torch
        >>> hinge_loss(torch.tensor([0.25]), torch.tensor([0.0]))
        tensor(0.7500)
    """
    return functional.relu(1 - pair_gaps(chosen_rewards, rejected_rewards, margin)).mean()


def margin_exponential_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, margin: Tensor | None = None) -> Tensor:
    """``exp(-(r_w - r_l - margin))``: RankBoost (Freund et al. 2003); one wrong label can outweigh the rest.

    Example:
        >>> import torch
        >>> margin_exponential_loss(torch.tensor([1.0]), torch.tensor([1.0]))
        tensor(1.)
    """
    return pair_gaps(chosen_rewards, rejected_rewards, margin).neg().exp().mean()


def scaled_bradley_terry_loss(
    chosen_rewards: Tensor, rejected_rewards: Tensor, margin: Tensor | None = None
) -> Tensor:
    """``-margin log sigmoid(r_w - r_l)``: the margin as weight of its pair (arXiv:2410.01257, section 3.1).

    Without margins it is the Bradley-Terry loss.
    """
    losses = -functional.logsigmoid(pair_gaps(chosen_rewards, rejected_rewards))
    return (losses if margin is None else margin.to(losses).flatten() * losses).mean()


# What ``loss_type`` may name.
PAIR_LOSSES: dict[str, PairLoss] = {
    "bradley_terry": bradley_terry_loss,
    "hinge": hinge_loss,
    "margin_exponential": margin_exponential_loss,
    "scaled_bradley_terry": scaled_bradley_terry_loss,
}


def reward_centering_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """``mean((r_w + r_l)^2)``: keeps rewards near 0, which pairs alone leave free (arXiv:2312.09244, eq. 2).

    Args:
        chosen_rewards: ``(B,)`` rewards of the preferred responses.
        rejected_rewards: ``(B,)`` rewards of the other responses.
    """
    return (chosen_rewards.float() + rejected_rewards.float()).square().mean()


def reward_model_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    chosen_kl: Tensor | None = None,
    rejected_kl: Tensor | None = None,
    *,
    loss: PairLoss = bradley_terry_loss,
    beta: float = 0.1,
    margin: Tensor | None = None,
    label_smoothing: float = 0.0,
    center_rewards_coefficient: float = 0.0,
) -> Tensor:
    """The whole loss of one batch, mean over pairs (arXiv:2402.09345, eq. 25, with two optional additions).

    ``(1 - e) L + e L(labels swapped) + beta (KL_w + KL_l) + c mean((r_w + r_l)^2)``, L a pair loss, by default
    ``-log sigmoid(r_w - r_l - m)``. With the labels swapped the gap ``r_w - r_l - m`` changes its sign as a whole, so
    that both terms speak of one probability; a margin that is a weight stays one.

    Args:
        chosen_rewards: ``(B,)`` rewards of the preferred responses.
        rejected_rewards: ``(B,)`` rewards of the other responses.
        chosen_kl: ``(B,)`` KL of the chosen responses' posteriors in nats; ``None`` for a standard reward model.
        rejected_kl: ``(B,)`` likewise for the rejected ones.
        loss: the pair loss, one of `PAIR_LOSSES` or a function like them.
        beta: weight of the KL term.
        margin: ``(B,)`` margins or ``None``.
        label_smoothing: e, the assumed probability that a label is wrong.
        center_rewards_coefficient: c.

    Returns:
        Scalar float32.
    """
    total = loss(chosen_rewards, rejected_rewards, margin)
    if label_smoothing:
        is_weight = loss is scaled_bradley_terry_loss
        opposite = margin if margin is None or is_weight else -margin
        swapped = loss(rejected_rewards, chosen_rewards, opposite)
        total = (1 - label_smoothing) * total + label_smoothing * swapped
    if chosen_kl is not None and rejected_kl is not None:
        total = total + beta * (chosen_kl + rejected_kl).mean()
    if center_rewards_coefficient:
        total = total + center_rewards_coefficient * reward_centering_loss(chosen_rewards, rejected_rewards)
    return total


def kl_weight(step: int, total_steps: int, beta: float, kl_warmup_steps: float) -> float:
    """Weight of the KL term at a step: 0 for the warm-up, then a line to ``beta`` over as many steps again.

    A fresh head carries no preference yet, while the KL term pulls every latent to the prior from the first step.
    Under Adam, which takes the direction of a gradient and not its size, that empties the latents before preferences
    are learnt: the posterior collapse of variational autoencoders, and the annealing of arXiv:1511.06349, section 3.1,
    is the remedy.

    Args:
        step: finished optimizer steps.
        total_steps: steps of the whole run.
        beta: the final weight.
        kl_warmup_steps: steps without KL term; below 1 a fraction of ``total_steps``.

    Example:
        >>> [kl_weight(step, 100, beta=0.1, kl_warmup_steps=10) for step in (0, 10, 15, 20, 99)]
        [0.0, 0.0, 0.05, 0.1, 0.1]
    """
    warmup = kl_warmup_steps if kl_warmup_steps >= 1 else kl_warmup_steps * total_steps
    return beta if warmup == 0 else beta * min(1.0, max(0.0, step / warmup - 1.0))
