"""Weights that are bfloat16 themselves: which optimizer trains them, and what another one loses.

A bfloat16 number has 8 significant bits. At a learning rate of 5e-6 most updates of Adam are less than half the
distance from a weight to the next number, so that weight plus update is rounded back to the weight.
"""

import importlib.util
import logging
from typing import Any

import torch
from transformers import TrainerCallback

from inform_rm.errors import InputError

logger = logging.getLogger(__name__)

# AdamW of torch-optimi. It keeps what rounding takes from each weight and adds it to the next update (Kahan
# summation), draws no random numbers, so that a resumed run stays equal, and needs no compiler.
COMPENSATED_OPTIM = "stable_adamw"
# In bfloat16, 0.999 times a number is that number again: Adam's second moment would never fall. 0.99 is what
# torch-optimi's authors use.
COMPENSATED_BETA2 = 0.99


def check_optimizer(optim: str) -> None:
    """Refuse an optimizer whose library is missing, naming the extra."""
    if optim == COMPENSATED_OPTIM and importlib.util.find_spec("optimi") is None:
        raise InputError(f"optim: '{optim}' needs torch-optimi. Install it with: pip install 'inform-rm[bf16]'")
    if ("bnb" in optim or "8bit" in optim) and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"optim: '{optim}' needs bitsandbytes. Install it with: pip install 'inform-rm[quant]'")


class LostUpdates(TrainerCallback):
    """Says so where half-precision weights are to be trained by an optimizer that does not make up for rounding.

    Weights in float32, and those that Accelerate has turned into float32 under FSDP2, are not concerned.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the weights, and warn."""
        halves = (torch.bfloat16, torch.float16)
        is_half = any(weight.requires_grad and weight.dtype in halves for weight in kwargs["model"].parameters())
        if is_half and args.optim != COMPENSATED_OPTIM and state.is_world_process_zero:
            logger.warning(
                "Trained weights are in half precision: what %s adds to a weight is lost where it is less than half "
                "the distance to the next such number (learning rate %g). Train with dtype: float32 and bf16: true, "
                "or keep dtype and set optim: %s (pip install 'inform-rm[bf16]').",
                args.optim.value, args.learning_rate, COMPENSATED_OPTIM,
            )  # fmt: skip
