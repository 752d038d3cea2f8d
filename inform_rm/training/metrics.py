"""Metrics of a training run: counts and sums over processes, divided once."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from inform_rm.training.losses import PAIR_LOSSES
from inform_rm.util.intervals import expected_calibration_error


def pair_sums(chosen: Tensor, rejected: Tensor, kl: Tensor | None) -> Tensor:
    """Additive statistics of a batch: pairs, wins (a tie is half), margin, rewards, squared rewards, KL sums.

    Args:
        chosen: ``(B,)`` rewards.
        rejected: ``(B,)`` rewards.
        kl: ``(2 B,)`` KL in nats or ``None``.

    Returns:
        ``(6,)`` float64; adding the results of two batches gives the result of their union.
    """
    chosen, rejected = chosen.detach().double(), rejected.detach().double()
    margin = chosen - rejected
    return torch.stack(
        [
            margin.new_tensor(float(len(margin))),
            (0.5 + 0.5 * margin.sign()).sum(),
            margin.sum(),
            (chosen + rejected).sum(),
            (chosen.square() + rejected.square()).sum(),
            margin.new_zeros(()) if kl is None else kl.detach().double().sum(),
        ]
    )


def metrics_from_sums(sums: Tensor, has_kl: bool) -> dict[str, float]:
    """Means from `pair_sums`, summed over batches and processes: accuracy, margin, reward mean and spread, KL.

    ``kl_nats`` is the mean over sequences; the loss holds twice that (chosen and rejected).
    """
    pairs, correct, margin, total, squares, kl = sums.tolist()
    reward_mean = total / (2 * pairs)
    metrics = {
        "accuracy": correct / pairs,
        "margin": margin / pairs,
        "reward_mean": reward_mean,
        "reward_std": math.sqrt(max(0.0, squares / (2 * pairs) - reward_mean**2)),
    }
    if has_kl:
        metrics["kl_nats"] = kl / (2 * pairs)
    return metrics


def compute_eval_metrics(
    loss_type: str, further: Callable[..., dict[str, float]] | None, prediction: EvalPrediction
) -> dict[str, float]:
    """Metrics of an evaluation's gathered rows.

    The loss, ``{loss_type}_loss``, is the pair loss alone, so that it compares models with and without a bottleneck.

    Args:
        loss_type: a name of `inform_rm.training.losses.PAIR_LOSSES`.
        further: gives the caller's own metrics beside these.
        prediction: ``predictions`` ``(N, 3)``: chosen reward, rejected reward and ``KL_w + KL_l`` (NaN in every row
            of a standard reward model); ``label_ids`` ``(N,)``: margin targets.
    """
    rows = torch.from_numpy(np.asarray(prediction.predictions, dtype=np.float64))
    chosen, rejected, kl = rows.unbind(dim=1)
    has_kl = not bool(kl.isnan().all())
    margins = (chosen - rejected).numpy()
    return {
        f"{loss_type}_loss": float(PAIR_LOSSES[loss_type](chosen, rejected, torch.as_tensor(prediction.label_ids))),
        **metrics_from_sums(pair_sums(chosen, rejected, kl if has_kl else None), has_kl),
        "calibration_error": expected_calibration_error(margins),
        "num_pairs": len(rows),
        **({} if further is None else further(prediction)),
    }
