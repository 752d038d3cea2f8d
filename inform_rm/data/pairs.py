"""One row -> a canonical pair: a prompt of messages that ends with a user turn, and the text of one reply a side.

Which columns are read, and what is not, is the matter of `columns`; what a conversation looks like that of `messages`.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from inform_rm.data.columns import (
    PAIR_FIELDS,
    SHARED_PREFIX,
    Columns,
    Reading,
    Row,
    check_not_encoded,
    count_end_token,
    no_prompt,
    no_side,
    stated_prompt,
    with_earlier_turns,
)
from inform_rm.data.messages import (
    Fault,
    Message,
    check_not_rendered,
    check_text,
    conversation,
    finite_number,
    found,
    has_text,
    json_messages,
    one_line_end,
    prompt_messages,
    transcript,
)
from inform_rm.data.sources import source_name
from inform_rm.errors import InputError

Sides = tuple[list[Message], str, str]  # the prompt, the chosen and the rejected reply

# Rows at the start of a source that show whether its sides are replies or whole dialogues.
LOOKED_AT_ROWS = 256
# A reply may repeat the question: 1 of 3,000 does in hh-rlhf. Where so few begin with the prompt, all are replies.
_FEW = 0.1


class BadRow(InputError):
    """One row that cannot be used.

    Its `file` (or folder, Hub id), its `row` from 1 (the line in JSON Lines; a CSV header is not counted), the
    `reason` with what to do about it, and the `kind` of fault, for counting.
    """

    def __init__(self, file: str, row: int, reason: str, kind: str = "invalid"):
        super().__init__(file, row, reason, kind)
        self.file, self.row, self.reason, self.kind = file, row, reason, kind

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}: {self.reason}"


def skippable(bad: BadRow) -> BadRow:
    """The same fault for whoever meets it under ``on_bad_row="error"``: its reason names the way round it."""
    reason = f"{bad.reason} (on_bad_row='skip' leaves bad rows out and lists them.)"
    return BadRow(bad.file, bad.row, reason, bad.kind)


@dataclass(frozen=True)
class PreferencePair:
    """A prompt, the preferred and the other reply, and where they were read."""

    prompt: list[Message]
    chosen: str
    rejected: str
    margin: float | None
    subset: str
    id: str
    file: str
    row: int


def shared_prefix_length(first: Sequence, second: Sequence) -> int:
    """How many tokens or characters at the start two sequences have in common.

    Example:
        >>> shared_prefix_length([1, 2, 3], [1, 2, 4, 3])
        2
    """
    both = zip(first, second, strict=False)
    return next((at for at, (one, other) in enumerate(both) if one != other), min(len(first), len(second)))


def with_layout(columns: Columns, records: Iterable[tuple[int, Any]]) -> Columns:
    """The mapping, with ``layout`` as the first rows of a source show it: replies, or dialogues with their prompt.

    Whole dialogues where most rows have both sides begin with the prompt; replies where hardly any side does.
    """
    if columns.sides is not None:
        return columns
    looked_at, both, any_side = 0, 0, 0
    for _, record in itertools.islice(records, LOOKED_AT_ROWS):
        row = Row(record, columns, Reading())
        try:
            prompt = stated_prompt(row)
            sides = [row.value(field) for field in ("chosen", "rejected")]
        except (Fault, AttributeError, TypeError):
            continue  # reported when the row is read
        if prompt is None or not all(isinstance(side, str) for side in sides):
            continue
        asked = prompt[-1]["content"]
        repeats = [_dialogue_about(side, asked) is not None or after_prompt(side, asked) is not None for side in sides]
        looked_at, both, any_side = looked_at + 1, both + all(repeats), any_side + any(repeats)
    if 2 * both > looked_at:
        return replace(columns, layout="whole")
    return replace(columns, layout="reply" if any_side <= _FEW * looked_at else "unclear")


def parse_pair(
    record: Any,
    file: str,
    row: int,
    *,
    name: str | None = None,
    columns: Columns | Mapping[str, str] | None = None,
    reading: Reading | None = None,
    allow_identical: bool = False,
) -> PreferencePair:
    """The canonical pair of one record in any of the supported formats (docs/how-to/data.md).

    `prompt`, `chosen` and `rejected` are text or conversations: message lists in any form, or transcripts. Without
    `prompt`, the turns before the last reply of both conversations are the prompt; for other text a prompt must be
    named. Sides that begin with the prompt are whole dialogues: it is cut off. `system` and `history` become turns.
    `margin` (finite number), `subset` and `id` are optional; they default to none, the name of the source, and
    name/row. Any other column that would change the conversation is refused.

    ``name`` is that of the source, by default that of the file; ``columns`` are as `Columns.of` takes them;
    ``reading`` counts how the row was read; ``allow_identical`` is for benchmarks, whose published items count as they
    are. `BadRow` for a missing, empty or wrongly typed field, identical sides, sides that differ before the last
    reply, ...
    """
    name = name or source_name(file)
    columns = Columns.of(columns)
    reading = Reading() if reading is None else reading
    try:
        if not isinstance(record, dict):
            raise Fault("wrong type", f"expected an object with fields, got {found(record)}.")
        reading.add_row(record, columns, PAIR_FIELDS)
        fields = Row(record, columns, reading)
        prompt, chosen, rejected = _sides(fields)
        if not allow_identical and chosen.strip() == rejected.strip():
            same = "are identical" if chosen == rejected else "differ only in surrounding space"
            raise Fault("identical sides", f"'chosen' and 'rejected' {same}. Such a pair teaches nothing: remove it.")
        return PreferencePair(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            margin=_margin(fields.value("margin")),
            subset=label_of(fields.value("subset"), "subset") or name,
            id=label_of(fields.value("id"), "id") or f"{name}/{row}",
            file=file,
            row=row,
        )
    except Fault as fault:
        raise BadRow(file, row, str(fault), fault.kind) from None


def row_or_fault(
    parse: Callable[..., Any], record: Any, file: str, row: int, on_bad_row: str, **options: Any
) -> Any | BadRow:
    """What `parse_pair` or its like makes of a row as a reader gives it; under ``"skip"`` the fault of a bad one."""
    try:
        if isinstance(record, str):  # the reader's description of a row that it could not read
            raise BadRow(file, row, record, "unreadable")
        return parse(record, file, row, **options)
    except BadRow as bad:
        if on_bad_row == "skip":
            return bad
        raise skippable(bad) from None


def _sides(row: Row) -> Sides:
    sides: dict[str, Any] = {}
    for field in ("chosen", "rejected"):
        sides[field] = row.value(field, required=True)
        if sides[field] is None:
            raise no_side(row.record, field)
    check_not_encoded(row)
    chosen, rejected = sides.values()
    # Message lists, also as JSON text; a transcript may as well be a reply.
    first, second = (
        conversation(f"'{field}'", side) if not isinstance(side, str) or json_messages(f"'{field}'", side) else None
        for field, side in sides.items()
    )
    if first is not None and second is not None:
        if isinstance(chosen, str):
            row.count("both sides are message lists as JSON text")
        return _message_sides(row, stated_prompt(row), first, second)
    if first is not None or second is not None or not isinstance(chosen, str) or not isinstance(rejected, str):
        raise Fault(
            "wrong type",
            f"'chosen' is {found(chosen)} and 'rejected' is {found(rejected)}. Give both in the same form: as text, "
            "or as lists of messages.",
        )
    for field, side in sides.items():
        check_text(f"'{field}'", side)
        check_not_rendered(f"'{field}'", side)
    count_end_token(row, chosen, rejected)
    prompt = stated_prompt(row)
    if prompt is not None:
        return _sides_after_prompt(row, prompt, chosen, rejected)
    if row.columns.given.get("prompt") == SHARED_PREFIX:
        row.count("the words that both sides begin with are the prompt")
        cut = _length_of_shared_words(chosen, rejected)
        prompt = prompt_messages("'prompt'", chosen[:cut])
        return with_earlier_turns(row, prompt), chosen[cut:], rejected[cut:]
    first, second = transcript("'chosen'", chosen), transcript("'rejected'", rejected)
    if first is None or second is None:
        what = "the sides are plain text" if first is second else "only one side is a transcript"
        raise no_prompt(row.record, what)
    row.count("both sides are transcripts")
    return _message_sides(row, None, first, second)


def _sides_after_prompt(row: Row, prompt: list[Message], chosen: str, rejected: str) -> Sides:
    asked, cut_off = prompt[-1]["content"], "the prompt is cut off both sides, which begin with it"
    if row.columns.sides != "reply":
        first, second = (_dialogue_about(side, asked) for side in (chosen, rejected))
        if first is not None and second is not None:
            row.count(cut_off)
            return _message_sides(row, prompt, first, second)
        if first is not None or second is not None:
            one = "'chosen'" if first is not None else "'rejected'"
            message = f"only {one} is a transcript that holds the prompt. Give both in the same form."
            raise Fault("sides diverge", message)
    rests = after_prompt(chosen, asked), after_prompt(rejected, asked)
    repeats = [rest is not None for rest in rests]
    layout = row.columns.sides or row.columns.layout
    if layout == "reply":
        if any(repeats):
            row.count("a reply begins with the prompt, and is left as it is")
    elif all(repeats) and layout != "unclear":
        row.count(cut_off)
        chosen, rejected = map(str, rests)
    elif layout == "whole" or any(repeats):
        which = "both sides begin" if all(repeats) else "only one side begins" if any(repeats) else "no side begins"
        raise Fault(
            "sides diverge",
            f"{which} with the prompt, {'like some' if layout == 'unclear' else 'unlike'} other rows: whole "
            "dialogues, or replies? Say columns sides=reply or sides=whole (--columns sides=...), or correct the row.",
        )
    stated = row.value("prompt")
    if isinstance(stated, str) and transcript("'prompt'", stated, is_prompt=True) is not None:
        chosen, rejected = chosen.strip(), rejected.strip()  # space around a turn belongs to the transcript
    return with_earlier_turns(row, prompt), chosen, rejected


def after_prompt(side: str, prompt: str) -> str | None:
    """What follows the prompt in a side that begins with it, whatever the line ends; ``None`` for another side."""
    side, prompt = (one_line_end(text).strip() for text in (side, prompt))
    if not side.startswith(prompt):
        return None
    rest = side[len(prompt) :]
    # "Hello" is not the start of "Hello! How are you?": a prompt ends where its last word does.
    ends = rest[:1].isspace() or not (prompt[-1:].isalnum() or not rest[:1].isalnum())
    return rest.strip() if ends and has_text(rest) else None


def _dialogue_about(side: str, asked: str) -> list[Message] | None:
    """The messages of a transcript one of whose user turns is what was asked; ``None`` for other text."""
    try:
        messages = transcript("a side", side) or []
    except Fault:
        return None  # begins like a transcript, as a reply may
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        return None
    turns = [" ".join(message["content"].split()) for message in messages if message["role"] == "user"]
    return messages if " ".join(asked.split()) in turns else None


def _length_of_shared_words(chosen: str, rejected: str) -> int:
    """Characters of the words that both texts begin with, without the space after them."""
    cut, shortest = shared_prefix_length(chosen, rejected), min(len(chosen), len(rejected))
    while cut and (cut == shortest or not chosen[cut].isspace()):
        cut -= 1
    while cut and chosen[cut - 1].isspace():
        cut -= 1
    if not cut:
        raise Fault("no prompt", "no 'prompt', and the two sides do not begin with the same words. Add 'prompt'.")
    return cut


def _message_sides(row: Row, prompt: list[Message] | None, chosen: list[Message], rejected: list[Message]) -> Sides:
    for field, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise Fault("no reply", f"the last turn of '{field}' is {messages[-1]['role']!r}; expected 'assistant'.")
    prefix = chosen[:-1]
    if prefix != rejected[:-1]:
        raise Fault(
            "sides diverge",
            "'chosen' and 'rejected' differ before the last reply. Cut both after the first difference.",
        )
    if prompt is None:
        if not prefix:
            raise no_prompt(row.record, "both sides hold nothing but the reply")
        row.count("the turns before the last reply are the prompt")
    elif prefix and list(map(_trimmed, prefix)) != list(map(_trimmed, prompt)):
        # Common on the Hub: `prompt` as text beside whole conversations in `chosen` and `rejected`.
        is_text = isinstance(row.value("prompt"), str) and len(prompt) == 1
        if not is_text or _trimmed(prompt[0]) not in map(_trimmed, prefix):
            advice = ". Remove one of the two."
            if prefix[0]["role"] == "assistant":
                advice = ", which goes on after it. Move all turns before the last reply into 'prompt'."
            raise Fault("sides diverge", f"'prompt' is not the prompt inside 'chosen'{advice}")
    return with_earlier_turns(row, prefix or prompt or []), chosen[-1]["content"], rejected[-1]["content"]


def _trimmed(message: Message) -> Message:
    return {**message, "content": message["content"].strip()}


def _margin(value: Any) -> float | None:
    number = finite_number(value)
    if number is None and value is not None:
        raise Fault("bad margin", f"'margin' is {found(value)}; expected a finite number or null.")
    return number


def label_of(value: Any, field: str) -> str | None:
    """The text of a ``subset`` or ``id``, which may be a whole number."""
    if isinstance(value, float):  # a column of whole numbers with a gap, out of a data frame
        if math.isnan(value):
            return None
        value = int(value) if value.is_integer() else value
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise Fault("wrong type", f"'{field}' is {found(value)}; expected text or a whole number.")
    text = str(value).strip()
    if text:
        check_text(f"'{field}'", text)
    return text
