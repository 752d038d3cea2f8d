"""One row -> a canonical pair: a prompt of messages that ends with a user turn, and the text of one reply a side.

Which columns are read, and what is not, is the matter of `columns`; what a conversation looks like that of `messages`.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from inform_rm.data.columns import (
    PAIR_FIELDS,
    SHARED_PREFIX,
    Columns,
    Reading,
    check_not_encoded,
    no_prompt,
    no_side,
    stated_prompt,
    with_earlier_turns,
)
from inform_rm.data.messages import (
    Fault,
    Message,
    check_text,
    conversation,
    found,
    has_text,
    json_messages,
    one_line_end,
    prompt_messages,
    transcript,
)
from inform_rm.data.sources import source_name
from inform_rm.errors import InputError

# Rows at the start of a source that show whether its sides are replies or whole dialogues.
LOOKED_AT_ROWS = 256
# A reply may repeat the question: 1 of 3,000 does in hh-rlhf. Where so few begin with the prompt, all are replies.
_FEW = 0.1


class BadRow(InputError):
    """One row that cannot be used.

    Attributes:
        file: The file, folder or Hub id.
        row: Row number counted from 1 (the line in JSON Lines; a CSV header is not counted).
        reason: What is wrong and what to do about it.
        kind: Short class of the fault, for counting.
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
        try:
            prompt = stated_prompt(record, columns, Reading())
            sides = [columns.value(record, field) for field in ("chosen", "rejected")]
        except (Fault, AttributeError, TypeError):
            continue  # reported when the row is read
        if prompt is None or not all(isinstance(side, str) for side in sides):
            continue
        asked = prompt[-1]["content"]
        repeats = [_dialogue_about(side, asked) is not None or _after(side, asked) is not None for side in sides]
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
    """The canonical pair of one record in any of the supported formats (docs/data.md).

    `prompt`, `chosen` and `rejected` are text or conversations: message lists in any form, or transcripts. Without
    `prompt`, the turns before the last reply of both conversations are the prompt; for other text a prompt must be
    named. Sides that begin with the prompt are whole dialogues: it is cut off. `system` and `history` become turns.
    `margin` (finite number), `subset` and `id` are optional; they default to none, the name of the source, and
    name/row. Any other column that would change the conversation is refused.

    Args:
        record: One row.
        file: For messages.
        row: Its number.
        name: Of the source, for rows without `subset` or `id`; by default that of the file.
        columns: Where the fields are, see `Columns.of`.
        reading: Counts how the row was read.
        allow_identical: For benchmarks, whose published items count as they are.

    Raises:
        BadRow: A missing, empty or wrongly typed field, identical sides, sides that differ before the last reply, ...
    """
    name = name or source_name(file)
    columns = Columns.of(columns)
    reading = Reading() if reading is None else reading
    try:
        if not isinstance(record, dict):
            raise Fault("wrong type", f"expected an object with fields, got {found(record)}.")
        reading.add_row(record, columns, PAIR_FIELDS)
        prompt, chosen, rejected = _sides(record, columns, reading)
        if not allow_identical and chosen.strip() == rejected.strip():
            same = "are identical" if chosen == rejected else "differ only in surrounding space"
            raise Fault("identical sides", f"'chosen' and 'rejected' {same}. Such a pair teaches nothing: remove it.")
        return PreferencePair(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            margin=_margin(columns.value(record, "margin")),
            subset=_label(columns.value(record, "subset"), "subset") or name,
            id=_label(columns.value(record, "id"), "id") or f"{name}/{row}",
            file=file,
            row=row,
        )
    except Fault as fault:
        raise BadRow(file, row, str(fault), fault.kind) from None


def pair_or_fault(record: Any, file: str, row: int, on_bad_row: str, **options: Any) -> PreferencePair | BadRow:
    """The pair of a row as `open_records` gives it; under ``on_bad_row="skip"`` what is wrong with a bad one.

    ``options`` are those of `parse_pair`.

    Raises:
        BadRow: As `parse_pair`, under ``"error"``; also for a row that could not be read.
    """
    try:
        if isinstance(record, str):  # the reader's description of a row that it could not read
            raise BadRow(file, row, record, "unreadable")
        return parse_pair(record, file, row, **options)
    except BadRow as bad:
        if on_bad_row == "skip":
            return bad
        raise skippable(bad) from None


def _sides(record: dict, columns: Columns, reading: Reading) -> tuple[list[Message], str, str]:
    sides = []
    for field in ("chosen", "rejected"):
        value = columns.value(record, field, required=True)
        if value is None:
            raise no_side(record, field)
        sides.append(value)
    check_not_encoded(record, columns)
    chosen, rejected = (
        _listed_side(f"'{field}'", side) for field, side in zip(("chosen", "rejected"), sides, strict=True)
    )
    if chosen is not None and rejected is not None:
        if isinstance(sides[0], str):
            reading.layouts["both sides are message lists as JSON text"] += 1
        return _message_sides(record, columns, reading, stated_prompt(record, columns, reading), chosen, rejected)
    if chosen is not None or rejected is not None or not all(isinstance(side, str) for side in sides):
        raise Fault(
            "wrong type",
            f"'chosen' is {found(sides[0])} and 'rejected' is {found(sides[1])}. Give both in the same form: as text, "
            "or as lists of messages.",
        )
    for field, side in zip(("chosen", "rejected"), sides, strict=True):
        check_text(f"'{field}'", side)
    prompt = stated_prompt(record, columns, reading)
    if prompt is None:
        return _sides_without_prompt(record, columns, reading, *sides)
    return _sides_after_prompt(record, columns, reading, prompt, *sides)


def _listed_side(where: str, side: Any) -> list[Message] | None:
    """The messages of a side that is no plain text and no transcript."""
    listed = json_messages(where, side) if isinstance(side, str) else side
    return None if listed is None else conversation(where, listed)


def _sides_without_prompt(
    record: dict, columns: Columns, reading: Reading, chosen: str, rejected: str
) -> tuple[list[Message], str, str]:
    if columns.given.get("prompt") == SHARED_PREFIX:
        reading.layouts["the words that both sides begin with are the prompt"] += 1
        start, chosen, rejected = _shared_words(chosen, rejected)
        return with_earlier_turns(record, columns, prompt_messages("'prompt'", start), reading), chosen, rejected
    first, second = transcript("'chosen'", chosen), transcript("'rejected'", rejected)
    if first is None or second is None:
        what = "the sides are plain text" if first is second else "only one side is a transcript"
        raise no_prompt(record, what)
    reading.layouts["both sides are transcripts"] += 1
    return _message_sides(record, columns, reading, None, first, second)


def _sides_after_prompt(
    record: dict, columns: Columns, reading: Reading, prompt: list[Message], chosen: str, rejected: str
) -> tuple[list[Message], str, str]:
    asked, cut_off = prompt[-1]["content"], "the prompt is cut off both sides, which begin with it"
    if columns.sides != "reply":
        first, second = (_dialogue_about(side, asked) for side in (chosen, rejected))
        if first is not None and second is not None:
            reading.layouts[cut_off] += 1
            return _message_sides(record, columns, reading, prompt, first, second)
        if first is not None or second is not None:
            one = "'chosen'" if first is not None else "'rejected'"
            message = f"only {one} is a transcript that holds the prompt. Give both in the same form."
            raise Fault("sides diverge", message)
    rests = _after(chosen, asked), _after(rejected, asked)
    repeats = [rest is not None for rest in rests]
    layout = columns.sides or columns.layout
    if layout == "reply":
        if any(repeats):
            reading.layouts["a reply begins with the prompt, and is left as it is"] += 1
    elif all(repeats) and layout != "unclear":
        reading.layouts[cut_off] += 1
        chosen, rejected = map(str, rests)
    elif layout == "whole" or any(repeats):
        which = "both sides begin" if all(repeats) else "only one side begins" if any(repeats) else "no side begins"
        raise Fault(
            "sides diverge",
            f"{which} with the prompt, {'like some' if layout == 'unclear' else 'unlike'} other rows: whole "
            "dialogues, or replies? Say columns sides=reply or sides=whole (--columns sides=...), or correct the row.",
        )
    stated = columns.value(record, "prompt")
    if isinstance(stated, str) and transcript("'prompt'", stated, is_prompt=True) is not None:
        chosen, rejected = chosen.strip(), rejected.strip()  # space around a turn belongs to the transcript
    return with_earlier_turns(record, columns, prompt, reading), chosen, rejected


def _after(side: str, prompt: str) -> str | None:
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


def _shared_words(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The words that both texts begin with, and what is left of each, its leading space included."""
    cut = shared_prefix_length(chosen, rejected)
    while cut and not (cut < min(len(chosen), len(rejected)) and chosen[cut].isspace()):
        cut -= 1
    while cut and chosen[cut - 1].isspace():
        cut -= 1
    if not cut:
        raise Fault("no prompt", "no 'prompt', and the two sides do not begin with the same words. Add 'prompt'.")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _message_sides(
    record: dict,
    columns: Columns,
    reading: Reading,
    prompt: list[Message] | None,
    chosen: list[Message],
    rejected: list[Message],
) -> tuple[list[Message], str, str]:
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
            raise no_prompt(record, "both sides hold nothing but the reply")
        reading.layouts["the turns before the last reply are the prompt"] += 1
    elif prefix and list(map(_trimmed, prefix)) != list(map(_trimmed, prompt)):
        # Common on the Hub: `prompt` as text beside whole conversations in `chosen` and `rejected`.
        is_text = isinstance(columns.value(record, "prompt"), str) and len(prompt) == 1
        if not is_text or _trimmed(prompt[0]) not in map(_trimmed, prefix):
            raise Fault("sides diverge", "'prompt' is not the prompt inside 'chosen'. Remove one of the two.")
    prompt = with_earlier_turns(record, columns, prefix or prompt or [], reading)
    return prompt, chosen[-1]["content"], rejected[-1]["content"]


def _trimmed(message: Message) -> Message:
    return {**message, "content": message["content"].strip()}


def _margin(value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # a cell of a CSV file is text
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise Fault("bad margin", f"'margin' is {found(value)}; expected a finite number or null.")
    return number


def _label(value: Any, field: str) -> str | None:
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
