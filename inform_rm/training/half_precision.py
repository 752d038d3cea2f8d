"""Weights that are bfloat16 themselves: which optimizer trains them, and what another one loses.

A bfloat16 number has 8 significant bits. At a learning rate of 5e-6 most updates of Adam are less than half the
distance from a weight to the next number, so that weight plus update is rounded back to the weight.
"""

import importlib.util
import logging
import math
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from inform_rm.errors import InputError

logger = logging.getLogger(__name__)

# AdamW of torch-optimi. It keeps what rounding takes from each weight and adds it to the next update (Kahan
# summation), draws no random numbers, so that a resumed run stays equal, and needs no compiler.
COMPENSATED_OPTIM = "stable_adamw"
# In bfloat16, 0.999 times a number is that number again: Adam's second moment would never fall. 0.99 is what
# torch-optimi's authors use.
COMPENSATED_BETA2 = 0.99
_SAMPLED = 1 << 16  # entries of a tensor
_NEGLIGIBLE = 0.01


def check_optimizer(optim: str) -> None:
    """Refuse an optimizer whose library is missing, naming the extra."""
    if optim == COMPENSATED_OPTIM and importlib.util.find_spec("optimi") is None:
        raise InputError(f"optim: '{optim}' needs torch-optimi. Install it with: pip install 'inform-rm[bf16]'")
    if ("bnb" in optim or "8bit" in optim) and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"optim: '{optim}' needs bitsandbytes. Install it with: pip install 'inform-rm[quant]'")


class LostUpdates(TrainerCallback):
    """Says once what share of the updates of half-precision weights an optimizer step lost, where that is over 1 %.

    Looks at the first step after the learning rate's warm-up: there updates are largest and the fewest are lost. Of
    each tensor up to 65,536 entries are looked at, evenly spread; an entry counts if it has a gradient other than 0.
    Weights in float32, and those that Accelerate turns into float32 under FSDP2, are not looked at.

    Attributes:
        share: of the updates, what was lost; ``None`` until it is known, or if all trained weights are float32.
    """

    def __init__(self) -> None:
        self.share: float | None = None
        self._samples: list[tuple[Tensor, int, Tensor, Tensor]] = []  # weight, stride, before, where it has an update

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember weights."""
        if args.optim == COMPENSATED_OPTIM or state.global_step != min(
            args.get_warmup_steps(state.max_steps), state.max_steps - 1
        ):
            return
        for weight in kwargs["model"].parameters():
            if weight.dtype in (torch.bfloat16, torch.float16) and weight.grad is not None:
                stride = math.ceil(weight.numel() / _SAMPLED)
                has_update = _entries(weight.grad, stride) != 0
                self._samples.append((weight, stride, _entries(weight, stride).clone(), has_update))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare, and warn."""
        updates = lost = 0
        for weight, stride, before, has_update in self._samples:
            updates += stride * int(has_update.sum())
            lost += stride * int((has_update & (_entries(weight, stride) == before)).sum())
        self._samples.clear()
        if not updates:
            return
        self.share = lost / updates
        if self.share > _NEGLIGIBLE and state.is_world_process_zero:
            logger.warning(
                "The weights are bfloat16 and lose updates: step %d left %.1f %% of the weights that have a gradient "
                "as they were, because %s adds less to them than half the distance to the next bfloat16 number "
                "(learning rate %g). Train with dtype: float32 and bf16: true, or keep dtype and set optim: %s "
                "(pip install 'inform-rm[bf16]').",
                state.global_step + 1, 100 * self.share, args.optim.value, args.learning_rate, COMPENSATED_OPTIM,
            )  # fmt: skip


def _entries(tensor: Tensor, stride: int) -> Tensor:
    local: Any = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # this process's part under FSDP2
    return local.detach().flatten()[::stride]
