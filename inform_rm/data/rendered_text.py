"""Whether what a chat template makes of a conversation still holds the conversation's text.

A template may delete what it is given: reasoning before ``</think>``, a system message, or all content of a text where
it expects a list of parts. What it adds, and blanks that it trims, are its own business.
"""

import json
import logging
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any

from inform_rm.errors import InputError

logger = logging.getLogger(__name__)

SHOWN_CHANGES = 5

_END_OF_REASONING = "</think>"
# Templates write these tags on lines of their own, with other blanks around them than the text had.
_BETWEEN_PIECES = re.compile(r"\s*(</?think>)\s*|\s*\n\s*")
# A shorter piece may be found in a template's own words.
_LEAST_PIECE = 8


class NotRenderedError(InputError):
    """A chat template leaves nothing of a message."""


def what_is_lost(conversation: Sequence[dict[str, str]], text: str) -> str | None:
    r"""What of a conversation is not in the text that a chat template made of it.

    Each message's content, without blanks around it, is looked for after the one before it; a system message may
    stand anywhere. Escapes of JSON, and other blanks at line breaks and around ``<think>`` tags, are no loss. The last
    message is called the response. A deleted text of a few letters, which the template's own words hold, goes unseen.

    Returns:
        None where all of it is there; else which parts of which messages are missing.

    Raises:
        NotRenderedError: Nothing is left of a message, unless it is a response of reasoning alone: a policy in
            training writes some, and is to hear that they are worth what an empty answer is.

    Example:
        >>> reply = {"role": "assistant", "content": "<think>2, 4</think>It is 4."}
        >>> what_is_lost([{"role": "user", "content": "2 + 2?"}, reply], "User: 2 + 2? Assistant: It is 4.")
        "the response without its text up to '</think>'"
    """
    losses = []
    position = 0
    for number, message in enumerate(conversation, start=1):
        content = message["content"].strip()
        is_system = message["role"] == "system"
        start = 0 if is_system else position
        end = _end_of(content, text, start)
        if end is not None:
            position = position if is_system else end
            continue
        name = "the response" if number == len(conversation) else f"turn {number} ({message['role']})"
        what = _partial_loss(content, text, start)
        if what is None and number == len(conversation) and is_reasoning_alone(content):
            what = ", which is reasoning alone, so that an empty answer is read"
        if what is None:
            way_out = ", or write the system message into the user turn" if is_system else ""
            raise NotRenderedError(
                f"the chat template leaves nothing of {name}, which begins {content[:40]!r}, in what the model reads. "
                f"Pass another chat_template (a file, or 'plain'){way_out}."
            )
        # Where the piece ends is not known well enough to look for the next message only behind it.
        losses.append(f"{name}{what}")
    return "; ".join(losses) or None


def is_reasoning_alone(response: str) -> bool:
    """Whether nothing follows the reasoning in a response."""
    _, tag, answer = response.rpartition(_END_OF_REASONING)
    return bool(tag) and not answer.strip()


def not_as_written(changes: Iterable[str | None]) -> dict[str, Any]:
    """``{"n": how many, "examples": the first 5}`` of what is not read as it stands, None standing for nothing."""
    found = list(filter(None, changes))
    return {"n": len(found), "examples": found[:SHOWN_CHANGES]}


def add_not_as_written(total: dict[str, Any], more: dict[str, Any]) -> None:
    """Add what `not_as_written` found in other rows."""
    total["n"] += more["n"]
    total["examples"] = [*total["examples"], *more["examples"]][:SHOWN_CHANGES]


def warn_of_text(found: dict[str, Any], number: int, unit: str = "pairs") -> None:
    """One log line where some of ``number`` rows are not read as they stand; ``found`` is from `not_as_written`."""
    if found["n"]:
        logger.warning(
            "the model does not read text of %d of %d %s as it stands: %s. Pass another chat_template (a file, or "
            "'plain') where one deletes what should be read; remove special tokens' names where they are not meant.",
            found["n"], number, unit, "; ".join(found["examples"]),
        )  # fmt: skip


def _end_of(content: str, text: str, start: int) -> int | None:
    """Where content that stands in the text from ``start`` on ends; None where it does not stand there."""
    place = text.find(content, start)
    if place >= 0:
        return place + len(content)
    for only_ascii in (False, True):
        escaped = json.dumps(content, ensure_ascii=only_ascii)[1:-1]
        if escaped != content and (place := text.find(escaped, start)) >= 0:
            return place + len(escaped)
    pieces = _pieces(content)
    if len(pieces) == 1:
        return None
    for piece in pieces:
        place = text.find(piece, start)
        if place < 0:
            return None
        start = place + len(piece)
    return start


def _pieces(content: str) -> list[str]:
    return [piece for piece in _BETWEEN_PIECES.split(content) if piece]


def _partial_loss(content: str, text: str, start: int) -> str | None:
    """What is missing of content that is not all there, to stand after its name; None where nothing is left."""
    _, tag, answer = content.rpartition(_END_OF_REASONING)
    answer = answer.strip()
    if tag and answer and _end_of(answer, text, start) is not None:
        return f" without its text up to '{_END_OF_REASONING}'"
    # The longest beginning and the longest end that stand there: of each, a shorter one does too.
    lengths = range(1, len(content) + 1)
    beginning = bisect_left(lengths, True, key=lambda length: text.find(content[:length], start) < 0)
    end = bisect_left(lengths, True, key=lambda length: text.find(content[len(content) - length :], start) < 0)
    ends = min(sum(length for length in (beginning, end) if length >= _LEAST_PIECE), len(content) - 1)
    lines = 0  # characters of those that stand there in order
    for piece in _pieces(content):
        place = text.find(piece, start)
        if len(piece) >= _LEAST_PIECE and place >= 0:
            lines, start = lines + len(piece), place + len(piece)
    kept = max(lines, ends)
    return f": {len(content) - kept} of {len(content)} characters are missing" if kept else None
