"""How much information pairs can teach, how much of it a beta pays for, and a run whose latents hold too much or none.

The loss of a pair is ``-log sigmoid(r_w - r_l) + beta * share * (KL_w + KL_l)`` (arXiv:2402.09345, eq. 25; ``share``:
`InfoRMConfig.kl_share`). Latents that tell nothing, at a KL of 0, have ``ln 2``. Where a label is wrong with
probability p, no model of unseen pairs is below ``H(p) = -p ln p - (1 - p) ln(1 - p)`` in the first term (Gibbs'
inequality). So a pair teaches at most ``ln 2 - H(p)`` nats, and at a minimum, which is no worse than telling nothing,
the mean KL of a response is at most ``(ln 2 - H(p)) / (2 beta share)``: the *budget*, which one good latent does not
use up. Pairs that are learnt by heart have no noise: for those p = 0. None of this is in the paper; it holds for pairs
without margins.
"""

import logging
import math
from typing import Any

from transformers import TrainerCallback

from inform_rm.training.kl_warmup import KLWarmup
from inform_rm.util.intervals import wilson_interval

logger = logging.getLogger(__name__)

_LEAST_PAIRS = 200  # a verdict rests on so many
# A KL below this, where hardly anything is learnt: an accuracy of at most so much, or preferences that earn fewer nats
# than a calibrated model that is right in 57 of 100 pairs (ln 2 - H(0.43)).
_LITTLE_NATS, _AT_CHANCE, _NOTHING_EARNED = 1.0, 0.55, 0.01
_OVERSPENT = 2.0  # so many times as much as it earns costs the KL term


def teachable_nats(flip_rate: float = 0.0) -> float:
    """Most that a pair teaches about its preference: ``ln 2 - H(p)``, p the probability of a wrong label, 0 to 0.5.

    Example:
        >>> [round(teachable_nats(p), 3) for p in (0.0, 0.25, 0.5)]
        [0.693, 0.131, 0.0]
    """
    if flip_rate == 0:
        return math.log(2)
    return math.log(2) + flip_rate * math.log(flip_rate) + (1 - flip_rate) * math.log1p(-flip_rate)


def kl_budget(beta: float, flip_rate: float = 0.0, kl_share: float = 1.0) -> float:
    """Most nats a response that ``beta`` pays for: ``(ln 2 - H(p)) / (2 beta share)``; infinite for a beta of 0.

    Example:
        >>> [round(kl_budget(0.1, p), 2) for p in (0.0, 0.25)]
        [3.47, 0.65]
    """
    return teachable_nats(flip_rate) / (2 * beta * kl_share) if beta else math.inf


def most_flips(accuracy: float, num_pairs: int) -> tuple[float, float]:
    """Most labels that can be wrong at random, given the accuracy on held-out pairs: that share, and its 95 % limit.

    Of labels that are flipped with probability p, whatever the pair, a model that is right in a share q of the pairs
    agrees with ``(1 - p) q + p (1 - q) <= 1 - p``. So p is at most ``1 - accuracy``: a bound, no estimate, as the
    model may be wrong where the labels are not. Errors that follow a rule, such as a bias to length, are not seen.
    Both are at most 0.5; the limit is from Wilson's interval. The pairs were not trained on, and their labels are like
    those of training.

    Example:
        >>> [round(value, 3) for value in most_flips(0.75, 400)]
        [0.25, 0.295]
    """
    low, _ = wilson_interval(accuracy * num_pairs, num_pairs)
    return min(0.5, 1 - accuracy), min(0.5, 1 - low)


def budget_of_run(
    settings: dict[str, Any], kl_share: float, evaluation: dict[str, Any] | None
) -> dict[str, float] | None:
    """What a run records: the budget without noise and, with an evaluation on pairs, with the most noise there can be.

    ``nats_per_response``; ``flip_rate_at_most``, ``flip_rate_limit`` and ``nats_per_response_at_that``; ``None`` where
    the rule does not hold: without a bottleneck, or where telling nothing does not cost ``ln 2``.
    """
    wanted = {"architecture": "inform", "loss_type": "bradley_terry", "ranking_loss": "all_pairs"}
    if not settings.get("beta") or any(settings.get(name) != value for name, value in wanted.items()):
        return None
    beta = settings["beta"]
    found = {"nats_per_response": kl_budget(beta, 0.0, kl_share)}
    # Rankings' pairs are no such labels.
    if evaluation and "accuracy" in evaluation and "num_prompts" not in evaluation:
        rate, limit = most_flips(evaluation["accuracy"], int(evaluation["num_pairs"]))
        found |= {"flip_rate_at_most": rate, "flip_rate_limit": limit}
        found["nats_per_response_at_that"] = kl_budget(beta, rate, kl_share)
    return found


def budget_lines(settings: dict[str, Any], budget: dict[str, float], kl_nats: float | None = None) -> list[str]:
    """The same in words: what beta pays for and, after an evaluation, how wrong the labels may be."""
    quarter = budget["nats_per_response"] * teachable_nats(0.25) / math.log(2)
    lines = [
        f"beta {settings['beta']:g} pays for at most {budget['nats_per_response']:.3g} nats a response (ln 2 / 2 beta)"
        f", or {quarter:.3g} if a quarter of the labels is wrong"
    ]
    if "flip_rate_at_most" in budget:
        lines.append(
            f"labels: at most {100 * budget['flip_rate_at_most']:.0f} % can be wrong at random (a bound: "
            f"1 - accuracy; 95 % limit {100 * budget['flip_rate_limit']:.0f} %); if so many are, beta pays for "
            f"{budget['nats_per_response_at_that']:.3g} nats a response"
            + ("" if kl_nats is None else f", and this model uses {kl_nats:.3g}")
        )
    return lines


class BudgetWatch(TrainerCallback):
    """Warns once of a bottleneck that is empty, or whose KL term does not hold yet.

    Judged are log lines after the KL term has its whole weight and a quarter of the steps is done, by all pairs since:

    - *empty*: a mean KL below 1 nat, and a training accuracy of at most 0.55 or not above chance (Wilson), or a loss
      of the preferences above ``ln 2 - 0.01``;
    - *overspent*, in the second half of what is left then: ``2 beta share KL`` is over twice ``ln 2`` minus the loss
      of the preferences, while at a minimum it is at most that. It needs no guess at the labels' noise.

    Attributes:
        warned: ``"empty"``, ``"overspent"`` or ``None``.
    """

    def __init__(self, kl_warmup: KLWarmup) -> None:
        self._kl_warmup = kl_warmup
        self.warned: str | None = None
        self._seen = 0
        self._sums = [0.0, 0.0, 0.0, 0.0]  # pairs, right ones, KL, ln 2 - loss of the preferences

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first line of a resumed run is about the steps since its checkpoint."""
        self._seen = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Judge a line of training metrics."""
        if not logs or "kl_nats" not in logs or "accuracy" not in logs or self.warned:
            return
        pairs, self._seen = (state.global_step - self._seen) * args.pairs_of_step, state.global_step
        length = self._kl_warmup.length
        if length is None or not args.beta:
            return
        first = max(2 * length, state.max_steps / 4)
        if state.global_step <= first:
            return
        # Not a number where it is not known: then no comparison with it holds.
        earns = logs.get("label_information_nats", math.nan) if args.loss_type == "bradley_terry" else math.nan
        for at, value in enumerate((1.0, logs["accuracy"], logs["kl_nats"], earns)):
            self._sums[at] += pairs * value
        number, right, kl, earned = self._sums
        if number < _LEAST_PAIRS:
            return
        accuracy, kl, earned = right / number, kl / number, earned / number
        at_chance = accuracy <= _AT_CHANCE or wilson_interval(right, round(number))[0] <= 0.5
        if kl < _LITTLE_NATS and (at_chance or earned < _NOTHING_EARNED):
            self._warn(
                "empty", state,
                f"The bottleneck is empty, or nearly so: since step {first:.0f} a response carries {kl:.2g} nats, and "
                f"{accuracy:.3f} of {number:.0f} training pairs are right (chance: 0.5). Give the preferences more "
                f"time before the KL term, kl_warmup_steps (now {args.kl_warmup_steps:g}), or take a larger "
                f"learning_rate or a smaller beta (now {args.beta:g}). Where architecture: standard learns no more, "
                "it is not the bottleneck.",
            )  # fmt: skip
            return
        share = getattr(kwargs["model"].config, "kl_share", 1.0)
        cost, late = 2 * args.beta * share * logs["kl_nats"], state.global_step > (first + state.max_steps) / 2
        if late and cost > _OVERSPENT * earns and cost > _OVERSPENT * _NOTHING_EARNED:
            self._warn(
                "overspent", state,
                f"The KL term does not hold yet: at step {state.global_step} a response carries {logs['kl_nats']:.3g} "
                f"nats, which cost {cost:.2g} a pair (2 beta KL), while preferences earn {earns:.2g} (ln 2 - loss); "
                f"beta {args.beta:g} pays for at most {kl_budget(args.beta, 0.0, share):.3g} nats a response. What is "
                f"not paid for would still go: take more steps, a smaller kl_warmup_steps (now "
                f"{args.kl_warmup_steps:g}) or a larger learning_rate; where nothing is learnt, a smaller beta.",
            )  # fmt: skip

    def _warn(self, kind: str, state: Any, text: str) -> None:
        self.warned = kind
        if state.is_world_process_zero:
            logger.warning("%s", text)
