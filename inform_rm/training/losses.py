"""The training loss as pure functions of tensors. The two formulas that the model itself needs live with the model."""

from torch import Tensor

from inform_rm.modeling_inform import bradley_terry_loss, kl_to_standard_normal

__all__ = ["bradley_terry_loss", "kl_to_standard_normal", "kl_weight", "reward_centering_loss", "reward_model_loss"]


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
    beta: float = 0.1,
    margin: Tensor | None = None,
    label_smoothing: float = 0.0,
    center_rewards_coefficient: float = 0.0,
) -> Tensor:
    """The whole loss of one batch, mean over pairs (arXiv:2402.09345, eq. 25, with two optional additions).

    ``(1 - e) BT + e BT(labels swapped) + beta (KL_w + KL_l) + c mean((r_w + r_l)^2)``, with the margin m inside
    ``BT = -log sigmoid(r_w - r_l - m)``; the swapped term uses ``-log sigmoid(-(r_w - r_l - m))``, so that both speak
    of one probability.

    Args:
        chosen_rewards: ``(B,)`` rewards of the preferred responses.
        rejected_rewards: ``(B,)`` rewards of the other responses.
        chosen_kl: ``(B,)`` KL of the chosen responses' posteriors in nats; ``None`` for a standard reward model.
        rejected_kl: ``(B,)`` likewise for the rejected ones.
        beta: weight of the KL term.
        margin: ``(B,)`` margins or ``None``.
        label_smoothing: e, the assumed probability that a label is wrong.
        center_rewards_coefficient: c.

    Returns:
        Scalar float32.
    """
    loss = bradley_terry_loss(chosen_rewards, rejected_rewards, margin)
    if label_smoothing:
        swapped = bradley_terry_loss(rejected_rewards, chosen_rewards, None if margin is None else -margin)
        loss = (1 - label_smoothing) * loss + label_smoothing * swapped
    if chosen_kl is not None and rejected_kl is not None:
        loss = loss + beta * (chosen_kl + rejected_kl).mean()
    if center_rewards_coefficient:
        loss = loss + center_rewards_coefficient * reward_centering_loss(chosen_rewards, rejected_rewards)
    return loss


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
