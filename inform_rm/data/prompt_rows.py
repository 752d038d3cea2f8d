"""Reading a set of prompts out of rows of any layout: pairs, rankings, responses, or prompts alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from inform_rm.data.columns import GROUP_FIELDS, Columns, Reading, Row, log_reading, required_prompt
from inform_rm.data.messages import Fault, Message, to_messages
from inform_rm.data.sources import Sources, open_parts, source_label, source_list
from inform_rm.errors import InputError

PROMPT_FIELDS = ("prompt", "system", "history", "id")
_RESPONSES = tuple(name for name in GROUP_FIELDS if name not in PROMPT_FIELDS)  # not wanted here, and no surprise
_LISTED = 1000


@dataclass(frozen=True)
class PromptRow:
    """A prompt, the ``id`` of its row (``None`` without one), and where it was read."""

    messages: list[Message]
    id: str | int | None
    where: str

    @property
    def key(self) -> str:
        """Equal for equal prompts."""
        return json.dumps(self.messages, sort_keys=True)


@dataclass
class PromptSet:
    """Distinct prompts in the order of their first rows, and what became of the other rows."""

    rows: list[PromptRow]
    num_rows: int = 0
    repeated: int = 0
    not_drawn: int = 0
    bad_rows: int = 0
    bad_row_reasons: list[str] | None = None


def read_prompts(
    data: Sources,
    columns: Mapping[str, str] | None = None,
    *,
    num_prompts: int | None = None,
    seed: int = 0,
    on_bad_row: str = "error",
) -> PromptSet:
    """Distinct prompts of one or several sources (`sources.open_parts`); responses in the rows are not read.

    Each row has ``prompt`` (and ``system``, ``history``, ``id``); ``num_prompts`` is a random subset of so many.
    ``on_bad_row="skip"`` counts and lists rows without a prompt that can be read.

    Raises:
        InputError: bad rows, no prompts, or fewer than asked for.
    """
    found = PromptSet([])
    seen: set[str] = set()
    reasons: list[str] = []
    mapping = Columns.of(columns, PROMPT_FIELDS)
    for source in source_list(data):
        reading = Reading()
        for file, records in open_parts(source):
            for number, record in records:
                found.num_rows += 1
                where = f"{file}, row {number}"
                try:
                    row = _prompt_row(record, where, mapping, reading)
                except InputError as error:
                    if on_bad_row != "skip":
                        raise InputError(f"{error} (on_bad_row='skip' leaves bad rows out and lists them.)") from None
                    reasons.append(str(error))
                    continue
                found.repeated += row.key in seen
                if row.key not in seen:
                    seen.add(row.key)
                    found.rows.append(row)
        reading.check_given(mapping, source_label(source))
        log_reading(source_label(source), reading)
    found.bad_rows, found.bad_row_reasons = len(reasons), reasons[:_LISTED] or None
    if len(found.rows) < max(1, num_prompts or 1):
        bad = f" ({reasons[0]})" if reasons else ""
        raise InputError(
            f"prompts: {len(found.rows)} distinct ones in {found.num_rows} rows{bad}; expected at least "
            f"{num_prompts or 1}."
        )
    if num_prompts is not None:
        chosen = np.random.default_rng(seed).choice(len(found.rows), num_prompts, replace=False)
        found.not_drawn = len(found.rows) - num_prompts
        found.rows = [found.rows[place] for place in sorted(chosen.tolist())]
    return found


def written_prompt(messages: list[Message]) -> str | list[Message]:
    """A prompt as a row holds it: text where it is read as the same prompt again, else its messages."""
    text = messages[0]["content"]
    try:
        return text if to_messages(text) == messages else messages
    except InputError:  # text that only looks like a conversation
        return messages


def _prompt_row(record: Any, where: str, columns: Columns, reading: Reading) -> PromptRow:
    if isinstance(record, str):  # the reader's description of a row that it could not read
        raise InputError(f"{where}: {record}")
    if not isinstance(record, dict):
        raise InputError(f"{where} is a {type(record).__name__}; expected an object with a prompt.")
    reading.add_row(record, columns, PROMPT_FIELDS, also=_RESPONSES)
    row = Row(record, columns, reading)
    try:
        messages = required_prompt(row, "each row needs one", PROMPT_FIELDS)
    except Fault as fault:
        raise InputError(f"{where}: {fault}") from None
    own = row.value("id")
    return PromptRow(messages, own if isinstance(own, str) or type(own) is int else None, where)
