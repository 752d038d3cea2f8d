"""When the KL term begins: after a warm-up, and not before preferences earn something that is worth its price."""

import json
import logging
import math
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_FILE = "kl_warmup.json"
_OVER_PAIRS = 640  # what is earned is a mean that weighs a pair less the longer ago it was, by 1/e after so many
_LATEST = 0.4  # of the steps; the whole weight comes at twice that


class KLWarmup:
    """The weight of the KL term in a run: 0 for a warm-up, then a line to beta over as many steps again.

    A fresh head carries no preference yet, while the KL term pulls every latent to the prior from the first step. Its
    gradient is several times that of preferences and, under Adam, which takes the direction of a gradient and not its
    size, empties the latents before there is anything to keep: the posterior collapse of variational autoencoders; the
    annealing of arXiv:1511.06349, section 3.1, is the remedy. So the term also waits until preferences earn something,
    ``ln 2`` minus their loss, at the latest until two fifths of the steps. None of this is in arXiv:2402.09345.

    Args:
        beta: the final weight.
        steps: steps without KL term, at least; below 1 a fraction of all; 0: beta from the first step, the paper's.
        nats: it waits longer until preferences earn so much a pair; 0: it does not.

    Attributes:
        length: steps without KL term, once that is known; ``None`` before.
        earned: nats a pair that preferences earn, over about the last 640 pairs.

    Example:
        >>> warmup = KLWarmup(0.1, steps=10)
        >>> [warmup.weight(step, 100) for step in (0, 10, 15, 20, 99)]
        [0.0, 0.0, 0.05, 0.1, 0.1]
    """

    def __init__(self, beta: float, steps: float, nats: float = 0.0):
        self.beta, self.steps, self.nats = beta, steps, nats
        self.begin(None)

    def begin(self, checkpoint: Path | None) -> None:
        """Forget what was counted; of a resumed run take over what `save` wrote into the checkpoint."""
        self.length: float | None = None
        self.earned = self._known = 0.0
        if checkpoint is not None and (checkpoint / _FILE).exists():
            state: dict[str, Any] = json.loads((checkpoint / _FILE).read_text(encoding="utf-8"))
            self.length, self.earned, self._known = state["length"], state["earned"], state["known"]
        elif checkpoint is not None:
            self.nats = 0.0  # a run of an earlier version, which did not wait

    @property
    def waits(self) -> bool:
        """Whether what `add` counts may still decide."""
        return self.length is None and self.steps > 0 and self.nats > 0

    def add(self, pairs: float, losses: float) -> None:
        """Count an update: its pairs, and the sum of ``-log sigmoid(r_w - r_l)`` over them."""
        share = -math.expm1(-pairs / _OVER_PAIRS)
        self._known += share * (1 - self._known)
        if pairs:
            self.earned += share / self._known * (math.log(2) - losses / pairs - self.earned)

    def weight(self, step: int, total: int) -> float:
        """After so many finished steps of the run's; to be asked in their order."""
        if self.length is None:
            least = self.steps if self.steps >= 1 else self.steps * total
            if step < least or (self.waits and self.earned < self.nats and step < _LATEST * total):
                return 0.0
            has_waited = self.waits and step >= least + 1
            self.length = float(step) if has_waited else least
            if has_waited:
                logger.info(
                    "The KL term begins after %d of %d steps, not after %.0f: only now preferences earn %.2g nats a "
                    "pair (kl_warmup_nats %g).", step, total, least, self.earned, self.nats,
                )  # fmt: skip
        return self.beta * min(1.0, max(0.0, step / self.length - 1.0)) if self.length else self.beta

    def save(self, checkpoint: Path) -> None:
        """What a resumed run needs."""
        state = {"length": self.length, "earned": self.earned, "known": self._known}
        (checkpoint / _FILE).write_text(json.dumps(state), encoding="utf-8")
