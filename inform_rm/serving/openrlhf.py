"""What OpenRLHF's texts lack of what a chat template writes."""

import logging
from typing import Any

from inform_rm.data.tokenizer import render

logger = logging.getLogger(__name__)

_CONVERSATION = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def warn_of_template_end(tokenizer: Any) -> None:
    """Log where a policy's text, which ends with its end token, cannot be what the model was trained on.

    OpenRLHF 0.11.2, ``openrlhf/utils/agent.py``: a query is the policy's tokens, decoded. Nothing follows the end
    token, where ChatML templates write a line break, and the reward is read at the last token.
    """
    if tokenizer.chat_template is None or tokenizer.eos_token is None:
        return
    (text,) = render(tokenizer, [_CONVERSATION], tokenize=False)
    _, end_token, rest = text.rpartition(tokenizer.eos_token)
    if end_token and not rest:
        return
    fault = f"writes {rest!r} after the end token" if end_token else "ends a reply without the end token"
    logger.warning(
        "/get_reward: this model's chat template %s, %r; OpenRLHF's texts end with that token, so their rewards are "
        "those of other text. Train with a template that ends with it, or send texts as the template writes them.",
        fault, tokenizer.eos_token,
    )  # fmt: skip
