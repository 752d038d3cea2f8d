"""Rows of a request -> token ids, with the row named that cannot be."""

from collections.abc import Sequence

from inform_rm.data.encoding import Encoded, encode_groups
from inform_rm.errors import InputError
from inform_rm.scoring.scorer import Prompt, RewardScorer
from inform_rm.serving.errors import RowError


def encode_rows(scorer: RewardScorer, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Encoded]:
    """Token ids of prompts with their responses, as `RewardScorer.score` makes them.

    An empty response is one: policies in training write some, and their run must not end there.

    Raises:
        RowError: a prompt that the template refuses, a response that leaves no token, or a row that is too long.
    """
    for row, response in enumerate(responses):
        _check_unicode(row, response)
    encoded: list[Encoded] = []
    for row, group in enumerate(encode_groups(scorer.tokenizer, prompts, [[response] for response in responses])):
        if isinstance(group, InputError):
            raise RowError(row, str(group)) from group
        encoded += group
    scorer.tell_of_loss(encoded, [f"row {row} (counted from 0) of a request" for row in range(len(encoded))])
    return _checked(scorer, encoded)


def encode_texts(scorer: RewardScorer, texts: Sequence[str], add_special_tokens: bool) -> list[Encoded]:
    """Token ids of texts as they stand: no chat template, no end token; special tokens' names become those tokens.

    Raises:
        RowError: a text without tokens, or one that is too long.
    """
    if not texts:
        return []
    for row, text in enumerate(texts):
        _check_unicode(row, text)
    options = {"add_special_tokens": add_special_tokens, "padding": False, "truncation": False}
    return encode_ids(scorer, scorer.tokenizer(list(texts), **options)["input_ids"])


def encode_ids(scorer: RewardScorer, sequences: Sequence[Sequence[int]]) -> list[Encoded]:
    """Token ids as they came.

    Raises:
        RowError: none, too many, or ids that the model does not have.
    """
    return _checked(scorer, [Encoded([], list(ids)) for ids in sequences])


def _check_unicode(row: int, text: str) -> None:
    r"""JSON can say \\ud800, half a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(row, f"unpaired surrogate at character {error.start + 1}. Repair the text.") from error


def _checked(scorer: RewardScorer, encoded: list[Encoded]) -> list[Encoded]:
    for row, item in enumerate(encoded):
        try:
            scorer.check_ids(item.input_ids, "it")
        except InputError as error:
            raise RowError(row, str(error)) from error
    return encoded
