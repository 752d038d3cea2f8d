"""Rows of a request -> token ids, with the row named that cannot be."""

import logging
from collections.abc import Sequence
from typing import Any

from inform_rm.data.encoding import Encoded
from inform_rm.data.messages import Fault, check_unicode
from inform_rm.data.tokenizer import render
from inform_rm.errors import InputError
from inform_rm.scoring.scorer import Prompt, RewardScorer, row_name

logger = logging.getLogger(__name__)

_CONVERSATION = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class RowError(InputError):
    """A row that cannot be encoded; ``row`` is its place in the request, from 0, which the message names as well."""

    def __init__(self, row: int, message: str):
        super().__init__(message)
        self.row = row


def encode_rows(scorer: RewardScorer, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Encoded]:
    """Token ids of prompts with their responses, as `RewardScorer.score` makes them.

    An empty response is one: policies in training write some, and their run must not end there. `RowError` for a
    prompt that the template refuses, a response that leaves no token, or a row that is too long.
    """
    _check_unicode(responses)
    places = [row_name(row) for row in range(len(prompts))]
    encoded = []
    for row, found in enumerate(scorer.encode_each(prompts, responses, places)):
        if isinstance(found, InputError):
            raise RowError(row, str(found)) from found
        encoded.append(found)
    scorer.tell_of_text(encoded, [f"{place} of a request" for place in places])
    return encoded


def encode_texts(scorer: RewardScorer, texts: Sequence[str], add_special_tokens: bool) -> list[Encoded]:
    """Token ids of texts as they stand: no chat template, no end token; special tokens' names become those tokens."""
    if not texts:
        return []
    _check_unicode(texts)
    options = {"add_special_tokens": add_special_tokens, "padding": False, "truncation": False}
    return encode_ids(scorer, scorer.tokenizer(list(texts), **options)["input_ids"])


def encode_ids(scorer: RewardScorer, sequences: Sequence[Sequence[int]]) -> list[Encoded]:
    """Token ids as they came; `RowError` for none, too many, or ids that the model does not have."""
    for row, ids in enumerate(sequences):
        try:
            scorer.check_ids(ids, row_name(row))
        except InputError as error:
            raise RowError(row, str(error)) from error
    return [Encoded([], list(ids)) for ids in sequences]


def _check_unicode(texts: Sequence[str]) -> None:
    r"""JSON can say \\ud800, half a character, which no tokenizer takes."""
    for row, text in enumerate(texts):
        try:
            check_unicode(row_name(row), text)
        except Fault as fault:
            raise RowError(row, str(fault)) from None


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
