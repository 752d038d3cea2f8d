"""Metrics of a training run: counts and sums over processes, divided once."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import EvalPrediction

from inform_rm.errors import InputError
from inform_rm.training.losses import PAIR_LOSSES, group_loss
from inform_rm.util.intervals import expected_calibration_error
from inform_rm.util.rankings import agreement, untied_gaps


def pair_sums(chosen: Tensor, rejected: Tensor, kl: Tensor | None) -> Tensor:
    """Additive statistics of a batch of pairs, a tie half right: ``(12,)`` float64 as `metrics_from_sums` reads them.

    Shapes: ``(B,)`` rewards of either side, ``(2 B,)`` KL in nats.
    """
    chosen, rejected = chosen.detach().double(), rejected.detach().double()
    margin = chosen - rejected
    number, none = margin.new_tensor(float(len(margin))), margin.new_zeros(())
    of_pairs = [number, (0.5 + 0.5 * margin.sign()).sum(), margin.sum(), -functional.logsigmoid(margin).sum()]
    total, squares = (chosen + rejected).sum(), (chosen.square() + rejected.square()).sum()
    total_kl = none if kl is None else kl.detach().double().sum()
    return torch.stack([*of_pairs, none, none, none, none, 2 * number, total, squares, total_kl])


def group_sums(rewards: Tensor, labels: Tensor, groups: Tensor, kl: Tensor | None) -> Tensor:
    """The same of a batch of groups, of which a response alone in its group is a scored one.

    Shapes: ``(N,)``, for each response its reward, label, number of its group, and KL in nats.
    """
    values, targets, number = (part.detach().cpu().double().numpy() for part in (rewards, labels, groups))
    of_rankings, of_scores = np.zeros(6), np.zeros(2)
    for group in np.unique(number):
        r, y = values[number == group], targets[number == group]
        if len(r) == 1:
            of_scores += (1, float(r[0] - y[0]) ** 2)
        else:
            found = agreement(r, y)
            losses = np.logaddexp(0, -untied_gaps(r, y)).sum()
            of_rankings += (found.num_pairs, found.num_right, found.margin, losses, 1, found.tau)
    total_kl = 0.0 if kl is None else float(kl.detach().double().sum())
    of_all = (len(values), values.sum(), np.square(values).sum(), total_kl)
    return torch.from_numpy(np.concatenate([of_rankings, of_scores, of_all])).to(rewards.device)


def metrics_from_sums(sums: Tensor, has_kl: bool) -> dict[str, float]:
    """Metrics from `pair_sums` or `group_sums`, added up over batches and processes.

    ``accuracy`` and ``margin`` are means over (untied) pairs, ``kendall_tau`` (tau-b) over rankings, ``rmse`` is about
    scored responses, ``reward_mean``, ``reward_std`` and ``kl_nats`` about all responses.

    With a bottleneck there are two sides of it (arXiv:2402.09345, eq. 5), in nats. S are the latents of a pair, Y
    is which of its responses is preferred, a fair coin for pairs in random order, so that ``H(Y) = ln 2``:

    - ``label_information_nats``: ``ln 2 - mean(-log sigmoid(r_w - r_l))``, at most ``I(S; Y)`` for any decoder (Barber
      and Agakov 2003), below 0 for one that is worse than a coin. It is about the pairs it is measured on: on training
      pairs it counts what was learnt by heart, too. In evaluation S is the mean of the latents. Of groups there is
      none.
    - ``kl_nats``: the mean over *responses* of the KL, at least ``I(X; S)`` of one response with the whole text X. The
      loss holds twice that, which bounds ``I(S; Y)`` of a pair from above.
    """
    pairs, right, margin, losses, rankings, tau, scored, errors, responses, total, squares, kl = sums.tolist()
    metrics = {"accuracy": right / pairs, "margin": margin / pairs} if pairs else {}
    if rankings:
        metrics["kendall_tau"] = tau / rankings
    if scored:
        metrics["rmse"] = math.sqrt(errors / scored)
    mean = total / responses
    metrics |= {"reward_mean": mean, "reward_std": math.sqrt(max(0.0, squares / responses - mean**2))}
    if has_kl:
        metrics["kl_nats"] = kl / responses
        if not (rankings or scored):
            metrics["label_information_nats"] = math.log(2) - losses / pairs
    return metrics


def padded_predictions(rewards: Tensor, kl: Tensor | None, labels: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """``(G, K, 4)`` of a batch: reward, label, KL (NaN without one) and 1; where no response is, NaN and 0."""
    before = torch.ones(len(groups), len(groups), device=groups.device).tril(-1)
    places = ((groups[:, None] == groups) * before).sum(dim=1).long()
    found = rewards.new_full((num_groups, int(places.max()) + 1, 4), float("nan"))
    found[..., 3] = 0.0
    kl = torch.full_like(rewards, float("nan")) if kl is None else kl
    found[groups, places] = torch.stack([rewards, labels.to(rewards), kl, torch.ones_like(rewards)], dim=1)
    return found


def compute_eval_metrics(
    loss_type: str, further: Callable[..., dict[str, float]] | None, prediction: EvalPrediction
) -> dict[str, float]:
    """Metrics of an evaluation's gathered rows.

    The loss, ``{loss_type}_loss``, is the pair loss alone, so that it compares models with and without a bottleneck.

    Args:
        loss_type: a name of `inform_rm.training.losses.PAIR_LOSSES`.
        further: gives the caller's own metrics beside these.
        prediction: ``predictions`` ``(N, 3)``: chosen reward, rejected reward and ``KL_w + KL_l`` (NaN in every row
            of a standard reward model); ``label_ids`` ``(N,)``: margin targets. Of groups ``(N, K, 4)``: see
            `padded_predictions`; the loss is the mean over rankings of that of their
            untied pairs.
    """
    rows = torch.from_numpy(np.asarray(prediction.predictions, dtype=np.float64))
    margins = torch.as_tensor(prediction.label_ids)
    found = (_group_metrics if rows.dim() == 3 else _pair_metrics)(loss_type, rows, margins)
    return {**found, **({} if further is None else further(prediction))}


def _pair_metrics(loss_type: str, rows: Tensor, margins: Tensor) -> dict[str, float]:
    chosen, rejected, kl = rows.unbind(dim=1)
    has_kl = not bool(kl.isnan().all())
    return {
        f"{loss_type}_loss": float(PAIR_LOSSES[loss_type](chosen, rejected, margins)),
        **metrics_from_sums(pair_sums(chosen, rejected, kl if has_kl else None), has_kl),
        "calibration_error": expected_calibration_error((chosen - rejected).numpy()),
        "num_pairs": len(rows),
    }


def _group_metrics(loss_type: str, rows: Tensor, margins: Tensor) -> dict[str, float]:
    groups, places = torch.where(rows[..., 3] == 1)  # the Trainer fills up with -100
    rewards, labels, kl, _ = rows[groups, places].unbind(dim=1)
    has_kl = not bool(kl.isnan().all())
    metrics = metrics_from_sums(group_sums(rewards, labels, groups, kl if has_kl else None), has_kl)
    is_ranked = groups.bincount()[groups] > 1
    if is_ranked.any():
        kept, number = groups[is_ranked].unique(return_inverse=True)
        rewards, labels = rewards[is_ranked], labels[is_ranked]
        loss = group_loss(rewards, labels, number, margin=margins[kept], loss=PAIR_LOSSES[loss_type])
        gaps = [untied_gaps(rewards[number == group], labels[number == group]) for group in range(len(kept))]
        metrics |= {
            f"{loss_type}_loss": float(loss),
            "calibration_error": expected_calibration_error(np.concatenate(gaps)),
            "num_pairs": sum(map(len, gaps)),
            "num_prompts": len(kept),
        }
    if not is_ranked.all():
        metrics["num_scored"] = int((~is_ranked).sum())
    return metrics


def check_best_metric(name: str | None, loss_type: str) -> None:
    """Refuse a metric to choose or stop by that no evaluation gives, before the run rather than at its first one."""
    of_pairs = compute_eval_metrics(loss_type, None, EvalPrediction(np.zeros((1, 3)), np.zeros(1)))
    names = [*of_pairs, "kendall_tau", "rmse"]  # the last two of rankings and of scored responses
    if name is not None and name.removeprefix("eval_") not in names:
        listed = ", ".join(f"eval_{each}" for each in names)
        raise InputError(f"metric_for_best_model: an evaluation gives no {name!r}. Choose one of {listed}.")
