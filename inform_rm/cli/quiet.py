"""Keeps other libraries from alarming the user about what is normal here: single messages, never a whole logger."""

import logging
import re
import warnings

# Logger -> how its message starts.
_NORMAL = {
    # Every input is measured against max_length, and refused by name where it is longer.
    "transformers.tokenization_utils_base": "Token indices sequence length is longer than",
    # The kernel is not wanted: it has no gradient.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
}
# The name that all versions know, peft's too, is on its way out in the latest: nothing that a user should change.
_NORMAL_WARNING = r"`(is_)?gradient_checkpointing` is deprecated"
_LOADING = "transformers.modeling_utils"
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
# Rows of transformers' table of what a checkpoint lacks or has beyond the model.
_ROW = re.compile(r"^(\S.*?)\s*\|\s*(MISSING|UNEXPECTED|MISMATCH|CONVERSION)\b", re.MULTILINE)


def silence_normal_messages() -> None:
    """Install the filters; a second time changes nothing."""
    for name in (*_NORMAL, _LOADING):
        logging.getLogger(name).addFilter(is_alarming)
    warnings.filterwarnings("ignore", _NORMAL_WARNING, FutureWarning)


def is_alarming(record: logging.LogRecord) -> bool:
    """False for the messages above, and for the report that only the reward head is new (and replaces a LM head)."""
    message = record.getMessage()
    if record.name in _NORMAL:
        return not message.startswith(_NORMAL[record.name])
    rows = _ROW.findall(_ANSI.sub("", message))
    fresh = [key.startswith("score.") for key, status in rows if status == "MISSING"]
    others = [status == "UNEXPECTED" and key.startswith("lm_head.") for key, status in rows if status != "MISSING"]
    return not (any(fresh) and all(fresh) and all(others))
