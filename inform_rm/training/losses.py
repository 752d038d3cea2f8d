"""The training loss as pure functions of tensors. The two formulas that the model itself needs live with the model.

Labels of a prompt's responses are numbers of which the higher is better; equal ones are a tie.

A pair loss takes ``(chosen_rewards, rejected_rewards, margin=None)``, B rewards each, and returns a scalar, the mean
over pairs. To add one: write the function here, name it in `PAIR_LOSSES`, and add its formula to the tests.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from inform_rm.errors import check_choice
from inform_rm.modeling_inform import bradley_terry_loss, pair_gaps
from inform_rm.modeling_inform import kl_to_standard_normal as kl_to_standard_normal  # passed on

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
    """``mean((r_w + r_l)^2)``: keeps rewards near 0, which pairs alone leave free (arXiv:2312.09244, eq. 2)."""
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

    Raises:
        ValueError: the KL of one side alone.
    """
    if (chosen_kl is None) != (rejected_kl is None):
        raise ValueError(
            "chosen_kl and rejected_kl: one of them is None; a bottleneck gives both, a standard model none."
        )
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


# What ``ranking_loss`` may name, and the largest set of tied responses above others that `plackett_luce_loss` takes:
# it sums over the subsets of such a set.
RANKING_LOSSES = ("all_pairs", "plackett_luce")
MOST_TIED = 10


def plackett_luce_loss(rewards: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of a ranking under Plackett and Luce, ``-sum_k log(e^r_k / sum_(j >= k) e^r_j)``.

    Plackett 1975, "The Analysis of Permutations"; Luce 1959, "Individual Choice Behavior". A tied set takes its places
    in no order: what counts is the probability that its members come before all worse responses, the sum over all
    their orders, exactly. With two responses it is the Bradley-Terry loss.

    Both are ``(K,)``, of a prompt's responses. Tied sets but the worst may have `MOST_TIED` members; `ValueError` for
    a larger one.

    Example:
        >>> round(plackett_luce_loss(torch.zeros(3), torch.tensor([3.0, 2.0, 1.0])).exp().item(), 4)  # one order of 3!
        6.0
        >>> round(plackett_luce_loss(torch.zeros(3), torch.tensor([2.0, 2.0, 1.0])).exp().item(), 4)  # who is last
        3.0
    """
    rewards = rewards.float() if rewards.dtype != torch.float64 else rewards
    places = labels.argsort(descending=True)
    sizes = torch.unique_consecutive(labels[places], return_counts=True)[1].tolist()
    sets = rewards[places].split(sizes)
    total = rewards.new_zeros(())
    for number, tied in enumerate(sets[:-1]):
        total = total - _log_probability_before(tied, torch.cat(sets[number + 1 :]).logsumexp(0))
    return total


def _log_probability_before(tied: Tensor, worse: Tensor) -> Tensor:
    """Log-probability that m responses, in any order, come before all others, whose rewards' log-sum is ``worse``.

    Of a set A that is left any member i may come first: ``p(A) = sum_i e^r_i / (e^worse + sum_A e^r) p(A - i)``.
    """
    number = len(tied)
    if number > MOST_TIED:
        raise ValueError(f"plackett_luce_loss: {number} tied responses above others; at most {MOST_TIED}.")
    if number == 1:
        return tied[0] - torch.logaddexp(tied[0], worse)
    subsets = sorted(range(2**number), key=int.bit_count)
    place_of = {subset: place for place, subset in enumerate(subsets)}
    found = [tied.new_zeros(1)]  # log p of the subsets, by size; of the empty one 0
    for size in range(1, number + 1):
        of_size = [subset for subset in subsets if subset.bit_count() == size]
        members = [[member for member in range(number) if subset >> member & 1] for subset in of_size]
        smaller = [
            [place_of[subset ^ (1 << member)] for member in those]
            for subset, those in zip(of_size, members, strict=True)
        ]
        chosen = tied[torch.tensor(members)]  # (subsets, size)
        left = torch.logaddexp(chosen.logsumexp(1), worse)
        before = torch.cat(found)[torch.tensor(smaller)]
        found.append((chosen + before).logsumexp(1) - left)
    return found[-1][0]


def score_loss(rewards: Tensor, scores: Tensor) -> Tensor:
    """``mean((r - score)^2)``: regression on scores as they are (HelpSteer2, arXiv:2406.08673)."""
    return (rewards.float() - scores.float()).square().mean()


def group_loss(
    rewards: Tensor,
    labels: Tensor,
    groups: Tensor,
    kl: Tensor | None = None,
    *,
    margin: Tensor | None = None,
    ranking_loss: str = "all_pairs",
    score_loss_coefficient: float = 1.0,
    beta: float = 0.1,
    **pair_settings: Any,
) -> Tensor:
    """The whole loss of a batch of G prompts with one or more responses each, mean over prompts.

    Of a prompt with several responses it is the ranking loss of these; of one with a single response, whose label is
    a score, the squared error times a coefficient. Each response adds ``beta`` times its KL: with two responses for
    every prompt all of it is `reward_model_loss`.

    Args:
        rewards: ``(N,)`` rewards of all responses.
        labels: ``(N,)``.
        groups: ``(N,)`` whole numbers from 0 to G - 1: which prompt's response each is.
        kl: ``(N,)`` KL in nats; ``None`` for a standard reward model.
        margin: ``(G,)`` margins, for prompts with two responses, else 0; or ``None``.
        ranking_loss: one of `RANKING_LOSSES`: ``"all_pairs"`` is the mean of the pair loss over the K (K - 1) / 2
            pairs, tied ones left out (arXiv:2203.02155, eq. 1). Two responses have a pair loss in any case.
        score_loss_coefficient: weight of the squared error.
        beta: weight of the KL term.
        pair_settings: ``loss``, ``label_smoothing`` and ``center_rewards_coefficient`` of `reward_model_loss`.
    """
    check_choice("ranking_loss", ranking_loss, RANKING_LOSSES)
    sizes = groups.bincount()
    total = rewards.new_zeros((), dtype=torch.float32)
    scored = sizes[groups] == 1
    if scored.any():
        error = score_loss(rewards[scored], labels[scored])
        total = total + score_loss_coefficient * error * scored.sum()
    by_pairs = ~scored if ranking_loss == "all_pairs" else sizes[groups] == 2
    is_pair = (labels[:, None] > labels) & (groups[:, None] == groups) & by_pairs
    better, worse = torch.where(is_pair)
    pairs_of_group = groups[better].bincount(minlength=len(sizes))
    # A mean over the pairs of prompts with equally many of them is the mean over these prompts.
    for number in pairs_of_group.unique().tolist():
        chosen = pairs_of_group[groups[better]] == number
        if number:
            one, other = better[chosen], worse[chosen]
            gaps = None if margin is None else margin[groups[one]]
            mean = reward_model_loss(rewards[one], rewards[other], margin=gaps, **pair_settings)
            total = total + mean * (pairs_of_group == number).sum()
    if ranking_loss == "plackett_luce":
        for group in torch.where(sizes > 2)[0]:
            total = total + plackett_luce_loss(rewards[groups == group], labels[groups == group])
    if kl is not None:
        total = total + beta * kl.sum()
    return total / len(sizes)
