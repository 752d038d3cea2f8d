"""Which column of a source is what: the mapping of columns, what was not read, and what is refused instead of guessed.

A column is read because it has the field's own name, or because the mapping says so (``columns``, on the command line
``--columns prompt=question margin=score``). Everything else is not read, and said: `Reading` counts it. A column that
would change what the model reads (``images``, ``tools``, ``input`` beside ``prompt``, ...) is refused by name, with
the mapping that reads it or leaves it out.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from inform_rm.data.messages import (
    Fault,
    Message,
    asks_for_reply,
    checked_prompt,
    conversation,
    end_token,
    found,
    has_text,
    prompt_messages,
)
from inform_rm.errors import InputError, shortened

logger = logging.getLogger(__name__)

PAIR_FIELDS = ("prompt", "chosen", "rejected", "system", "history", "margin", "subset", "id")
ROW_FIELDS = ("prompt", "response", "system", "history")
GROUP_FIELDS = (*PAIR_FIELDS, "responses", "ranks", "scores", "response", "score")
SHARED_PREFIX = "shared_prefix"
SIDES = ("reply", "whole")

# Part of what the model would have read, and nothing that a conversation of texts can hold.
_NOT_ENCODED = (
    "tools", "functions", "images", "image", "videos", "video", "audios", "audio", "documents", "chat_template_kwargs",
)  # fmt: skip
# Very likely the field, under another name; to read it or not would be a guess.
_OTHER_NAMES = {
    "system_prompt": "system", "system_message": "system", "sys_prompt": "system", "system_instruction": "system",
    "chat_history": "history", "conversation_history": "history", "dialogue_history": "history",
    "previous_messages": "history", "past_messages": "history",
}  # fmt: skip
_PARTS_OF_PROMPT = ("input", "context")
_LIKE_PROMPT = (
    "question", "instruction", "query", "problem", "user_prompt", "user", "request", "task", "post", "article",
    "conversations", "conversation", "messages", "dialogue", "dialog", "input", "text", "source",
)  # fmt: skip
_LIKE_SIDES = (
    ("chosen_response", "rejected_response"), ("response_chosen", "response_rejected"), ("preferred", "dispreferred"),
    ("chosen_answer", "rejected_answer"), ("accepted", "rejected"), ("chosen", "reject"), ("response_j", "response_k"),
    ("positive", "negative"), ("pos", "neg"), ("winner", "loser"), ("win", "lose"), ("better", "worse"),
    ("good", "bad"), ("chosen_messages", "rejected_messages"),
)  # fmt: skip
_NUMBERED = (("0", "1"), ("1", "2"), ("a", "b"), ("A", "B"))  # ends of the names of two responses
_LIKE_RESPONSE = ("completion", "answer", "output", "reply", "chosen", "generation", "model_output", "text")


@dataclass(frozen=True)
class Columns:
    """Where the fields of a row are.

    Attributes:
        given: field to column, or to several joined by "+"; other fields are read under their own names.
        ignored: columns that are knowingly not read.
        sides: ``"reply"``: chosen and rejected are replies, whatever they begin with; ``"whole"``: they begin with the
            prompt, which is cut off; ``None``: not said.
        layout: the same as most rows show it, where ``sides`` is not said; ``"unclear"``: a row whose sides begin with
            the prompt is refused; ``None``: what the row shows.
    """

    given: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    sides: str | None = None
    layout: str | None = None

    @classmethod
    def of(cls, columns: "Mapping[str, str] | Columns | None", fields: tuple[str, ...] = PAIR_FIELDS) -> "Columns":
        """The mapping as a user gives it: field to column, ``ignore`` to columns, ``sides`` to one of `SIDES`.

        Raises:
            InputError: an unknown field, or a value that is no name.
        """
        if isinstance(columns, Columns):
            return columns
        given = dict(columns or {})
        known = (*fields, "ignore", *(("sides",) if "chosen" in fields else ()))
        for name, column in given.items():
            if name not in known:
                raise InputError(
                    f"columns: {name!r} is no field; expected FIELD=COLUMN with one of {', '.join(known)}."
                )
            if not isinstance(column, str) or not column.strip("+ "):
                raise InputError(f"columns: {name!r} is {column!r}; expected the name of a column.")
        ignored = given.pop("ignore", "")
        sides = given.pop("sides", None)
        if sides not in (None, *SIDES):
            raise InputError(f"columns: sides is {sides!r}; expected one of {', '.join(SIDES)}.")
        return cls(given, tuple(name for name in ignored.split("+") if name), sides)

    def read(self, fields: tuple[str, ...]) -> dict[str, str]:
        """Column to field, of all columns that are read where they are there."""
        mapped: dict[str, str] = {}
        for name in fields:
            column = self.given.get(name, name)
            mapped |= dict.fromkeys([column, *column.split("+")], name)
        return mapped


@dataclass
class Reading:
    """How the rows of a source were read, counted as they come.

    Attributes:
        rows: read so far.
        read: field to column.
        layouts: what was done to rows that needed more than taking their columns, with the number of rows.
        unread: columns that were not read and held something, with the number of rows.
    """

    rows: int = 0
    read: dict[str, str] = field(default_factory=dict)
    layouts: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)

    def add_row(
        self, record: Mapping[str, Any], columns: Columns, fields: tuple[str, ...], also: tuple[str, ...] = ()
    ) -> None:
        """Count the columns of a row; those in ``also`` are read, too, under their own names."""
        self.rows += 1
        mapped = columns.read(fields) | {column: column for column in also}
        for column, value in record.items():
            if column not in mapped:
                self.unread.update([str(column)] if not _is_empty(value) else [])
            elif value is not None:
                self.read.setdefault(mapped[column], columns.given.get(mapped[column], mapped[column]))

    def check_given(self, columns: Columns, where: str) -> None:
        """Raise `InputError` for a mapping of which a column was in no row."""
        for name, column in columns.given.items():
            if self.rows and name not in self.read and column != SHARED_PREFIX:
                raise InputError(
                    f"{where}: columns names {column!r} for {name!r}, which no row has. Correct the name."
                )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "columns": dict(self.read),
            "layouts": dict(sorted(self.layouts.items())),
            "unread_columns": dict(sorted(self.unread.items())),
        }


@dataclass(frozen=True)
class Row:
    """A record, the mapping by which it is read, and where it is counted what that took."""

    record: Mapping[str, Any]
    columns: Columns
    reading: Reading

    def value(self, name: str, required: bool = False) -> Any:
        """What the row holds for a field, or ``None``; a `Fault` if a mapped column is `required` and not there."""
        column = self.columns.given.get(name, name)
        if column in self.record:
            return self.record[column]
        parts = column.split("+")
        if len(parts) > 1 and all(part in self.record for part in parts):
            return _joined(column, [self.record[part] for part in parts])
        if required and name in self.columns.given:
            raise Fault(
                "missing field",
                f"no column {column!r}, which columns names for {name!r}. Its fields are {names_of(self.record)}.",
            )
        return None

    def count(self, layout: str) -> None:
        """Count what was done to the row."""
        self.reading.layouts[layout] += 1


def log_reading(source: str, reading: Reading) -> None:
    """One log line about columns that were not read, and what else rows needed than taking their columns."""
    lines = lines_of(reading.to_dict(), reading.rows)[1:]
    if lines:
        logger.warning("%s: %s", source, "; ".join(lines))


def lines_of(reading: Mapping[str, Any], rows: int) -> list[str]:
    """What a reading (`Reading.to_dict`) says, in lines for people.

    Example:
        >>> lines_of({"columns": {"prompt": "question"}, "layouts": {}, "unread_columns": {"score": 3}}, 3)
        ['columns prompt=question', 'not read: score (3 of 3 rows)']
    """
    lines = ["columns " + ", ".join(f"{name}={column}" for name, column in reading["columns"].items())]
    lines += [f"{text}: {number:,} of {rows:,} rows" for text, number in reading["layouts"].items()]
    if reading["unread_columns"]:
        unread = (f"{name} ({number:,} of {rows:,} rows)" for name, number in reading["unread_columns"].items())
        lines.append("not read: " + ", ".join(unread))
    return lines


def names_of(record: Mapping[str, Any]) -> str:
    """The columns of a row, for a message."""
    return shortened(", ".join(repr(str(key)) for key in record), 300) or "none"


def check_not_encoded(row: Row) -> None:
    """Raise `Fault` for a column that would change the conversation and is not read; it names both ways out."""
    record, columns = row.record, row.columns
    read = columns.read(("prompt", "system", "history"))
    unread = {
        column
        for column, value in record.items()
        if not _is_empty(value) and column not in read and column not in columns.ignored
    }
    if not_encoded := [column for column in _NOT_ENCODED if column in unread]:
        listed, ignore = ", ".join(map(repr, not_encoded)), "ignore=" + "+".join(not_encoded)
        hint = " Write the tools into the system message." if {"tools", "functions"} & set(not_encoded) else ""
        raise Fault(
            "unsupported",
            f"{listed} {'is' if len(not_encoded) == 1 else 'are'} not encoded, and would change what a model reads."
            f"{hint} To read the rows without: columns {ignore} (--columns {ignore}).",
        )
    guess = next((column for column in _OTHER_NAMES if column in unread), None)
    if guess is not None:
        what, mapping = f"looks like the field {_OTHER_NAMES[guess]!r}", f"{_OTHER_NAMES[guess]}={guess}"
    elif record.get("prompt") is not None and "prompt" not in columns.given:
        guess = next((column for column in _PARTS_OF_PROMPT if column in unread), None)
        what, mapping = "beside 'prompt' may be a part of it", f"prompt=prompt+{guess}"
    if guess is not None:
        raise Fault(
            "unread column",
            f"{guess!r} {what}, but is not read. Say columns {mapping} (--columns {mapping}), or ignore={guess}.",
        )


def no_prompt(record: Mapping[str, Any], reason: str, fields: tuple[str, ...] = PAIR_FIELDS) -> Fault:
    """The fault of a row without a prompt; it names the columns that were not read, and the likely one."""
    unread = [key for key in map(str, record) if key not in fields and not _is_empty(record[key])]
    likely = next((key for key in _LIKE_PROMPT if key in unread), None)
    if likely == "instruction" and "input" in unread:
        likely = "instruction+input"
    advice = "Add 'prompt'"
    if unread:
        say = f"{likely!r} may be it: say" if likely else "Say"
        mapping = f"prompt={likely or 'COLUMN'}"
        advice = f"Not read: {', '.join(map(repr, unread[:12]))}. "
        advice += f"{say} columns {mapping} (--columns {mapping}), or rename it"
    if "chosen" in fields:
        advice += (
            f". What both sides begin with is taken for the prompt only on demand: columns prompt={SHARED_PREFIX}"
        )
    return Fault("no prompt", f"no 'prompt', and {reason}. {advice}.")


def no_side(record: Mapping[str, Any], name: str) -> Fault:
    """The fault of a row without one of its sides; it names the likely columns."""
    text = f"no '{name}'. Its fields are {names_of(record)}; add or rename the field"
    pair = next((pair for pair in _LIKE_SIDES if all(part in record for part in pair)), None)
    is_ranking = record.get("responses") is not None
    if pair is None and not is_ranking and (several := _several_responses(record)) is not None:
        return Fault("missing field", f"{text}. {several}.")  # to map them would be to guess the verdict
    own = dict(zip(("chosen", "rejected"), pair or ("COLUMN", "COLUMN"), strict=True))
    if "prompt" not in record:
        own = {"prompt": next((key for key in _LIKE_PROMPT if key in record), "COLUMN"), **own}
    mapped = " ".join(f"{field}={column}" for field, column in own.items() if field not in record)
    if mapped and not set(record) <= set(PAIR_FIELDS):  # there are columns that may be the field
        text += f", or say columns {mapped} (--columns {mapped})"
    if is_ranking:
        text += (
            ". Rankings and scored responses have a file of their own, which train (without streaming), evaluate and "
            "check-data read"
        )
    return Fault("missing field", text + ".")


def _several_responses(record: Mapping[str, Any]) -> str | None:
    """Which columns of a row look like responses of which another column says the better one, and what to do."""
    rows = "(docs/how-to/data.md, 'Two responses and a verdict')"
    sides = [
        (column, other)
        for column in map(str, record)
        for last, next_one in _NUMBERED
        if column.endswith(last) and (other := column.removesuffix(last) + next_one) in record
        and all(isinstance(record[name], str | list | tuple) for name in (column, other))
    ]  # fmt: skip
    if sides:
        # Names of models and ids stand in twos as well, but are shorter.
        first, second = max(sides, key=lambda pair: len(str(record[pair[0]])) + len(str(record[pair[1]])))
        return (
            f"{first!r} and {second!r} look like two responses of which another column says the better one: that "
            f"column can be read both ways, so make 'chosen' and 'rejected' of them {rows}"
        )
    for column, value in record.items():
        if isinstance(value, list) and len(value) > 1 and all(
            isinstance(each, Mapping) and not {"role", "from"} & set(each) for each in value
        ):  # fmt: skip
            return f"{str(column)!r} looks like a list of responses: make a ranking or pairs of it {rows}"
    return None


def no_response(record: Mapping[str, Any]) -> Fault:
    """The fault of a row to score without response."""
    likely = next((name for name in _LIKE_RESPONSE if name in record), None)
    hint = f", or say columns response={likely} (--columns response={likely})" if likely else ""
    return Fault("missing field", f"no 'response'. Its fields are {names_of(record)}; add or rename the field{hint}.")


def stated_prompt(row: Row) -> list[Message] | None:
    """The prompt that a row states, without its `system` and `history`; ``None`` without one."""
    column = row.columns.given.get("prompt", "prompt")
    value = row.value("prompt", required=column != SHARED_PREFIX)
    if value is None:
        return None
    if isinstance(value, str) and conversation(f"'{column}'", value, is_prompt=True) is not None:
        row.count("prompt is a transcript or a message list as text")
    elif isinstance(value, str) and asks_for_reply(value):
        row.count("prompt asks for a reply in another template's words, and is read as a turn of the user")
    return prompt_messages(f"'{column}'", value)


def required_prompt(row: Row, reason: str, fields: tuple[str, ...]) -> list[Message]:
    """The whole prompt of a row, with its earlier turns; a `Fault` without one, or where columns would change it.

    ``reason`` and ``fields`` are those of `no_prompt`.
    """
    check_not_encoded(row)
    prompt = stated_prompt(row)
    if prompt is None:
        raise no_prompt(row.record, reason, fields)
    return with_earlier_turns(row, prompt)


def with_earlier_turns(row: Row, messages: list[Message]) -> list[Message]:
    """The turns of a row's ``system`` and ``history`` in front of a prompt, which has none such already."""
    history = lists_of(row.value("history"))
    if not _is_empty(history):
        if any(message["role"] == "assistant" for message in messages):
            raise Fault("sides diverge", "'history' and a prompt of several turns: which comes first? Remove one.")
        lead = [message for message in messages if message["role"] == "system"]
        messages = [*lead, *_history(history), *messages[len(lead) :]]
        row.count("turns of 'history' come before the prompt")
    system = row.value("system")
    if system is not None and not isinstance(system, str):
        raise Fault("wrong type", f"'system' is {found(system)}; expected text.")
    if system is not None and has_text(system):
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        elif messages[0]["content"].strip() != system.strip():
            raise Fault("sides diverge", "'system' is not the system message of the prompt. Remove one of the two.")
        row.count("'system' is the first message")
    return checked_prompt(messages)


def count_end_token(row: Row, *replies: str) -> None:
    """Count a row of which a reply ends with an end token as text: the model reads two, or one as words."""
    if marker := next(filter(None, map(end_token, replies)), None):
        row.count(f"a reply ends with {marker!r}, which a chat template writes, too")


def _history(history: Any) -> list[Message]:
    """Earlier turns: ``[user, assistant]`` pairs, or messages in any of their forms; they end with a reply."""
    if isinstance(history, list) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in history
    ):
        speakers = ("user", "assistant")
        texts = ((role, text) for pair in history for role, text in zip(speakers, pair, strict=True))
        history = [{"role": role, "content": text} for role, text in texts]
    messages = conversation("'history'", history)
    if messages is None:
        raise Fault(
            "wrong type", f"'history' is {found(history)}; expected [user, assistant] pairs of texts, or messages."
        )
    if messages[-1]["role"] != "assistant":
        raise Fault("invalid roles", f"the last turn of 'history' is {messages[-1]['role']!r}; expected 'assistant'.")
    return messages


def lists_of(value: Any) -> Any:
    """A list in text that is JSON, as cells of a CSV file hold it; other values as they are."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value  # refused where it is used
    return value


def _joined(column: str, values: list[Any]) -> str | None:
    """Texts with an empty line between them; empty ones are left out, as in the instruction and input of Alpaca."""
    for value in values:
        if value is not None and not isinstance(value, str):
            raise Fault("wrong type", f"a part of {column!r} is {found(value)}; only texts are joined.")
    return "\n\n".join(value for value in values if value is not None and has_text(value)) or None


def _is_empty(value: Any) -> bool:
    if isinstance(value, str) and value.strip() in ("[]", "{}", "null"):  # columns that are kept as JSON text
        return True
    return value is None or (isinstance(value, str | list | dict | tuple) and len(value) == 0)
