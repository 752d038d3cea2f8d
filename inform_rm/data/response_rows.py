"""Reading the prompt/response rows that are to be scored, one at a time, whatever the file format."""

import contextlib
import datetime
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from inform_rm.data.columns import ROW_FIELDS, Columns, Reading, Row, count_end_token, no_response, required_prompt
from inform_rm.data.messages import Fault, Message, check_unicode, found, reply_text
from inform_rm.data.sources import Source, open_parts, source_label
from inform_rm.errors import InputError

_RESULT_FIELDS = ("reward", "reward_std")
# What `inform-rm generate` writes beside prompt and response: no part of either, and no surprise.
_ABOUT_RESPONSE = ("id", "model", "seed", "sample", "finish_reason", "tokens")


@dataclass(frozen=True)
class ScoreRow:
    """One row to score: ``fields`` is the whole input row, ``where`` names it in an error.

    An empty response is one: policies in training write some.
    """

    prompt: list[Message]
    response: str
    fields: dict[str, Any]
    where: str


@dataclass(frozen=True)
class RowFault:
    """A row that cannot be scored: ``fields`` is what of it can be written, ``reason`` names the row and the fault."""

    fields: dict[str, Any]
    reason: str


def score_rows_or_faults(
    source: Source, columns: Columns | Mapping[str, str] | None = None, reading: Reading | None = None
) -> Iterator[ScoreRow | RowFault]:
    """The rows of a source (`sources.open_parts`) in order, one in memory at a time; in place of a bad one, its fault.

    ``columns`` says where ``prompt``, ``response``, ``system`` and ``history`` are; ``reading`` counts how rows were
    read.

    Raises:
        InputError: if the source is missing, of another kind, or broken in a way that spoils the rows that follow.
    """
    columns = Columns.of(columns, ROW_FIELDS)
    reading = Reading() if reading is None else reading
    for file, records in open_parts(source):
        is_csv = file.lower().endswith((".csv", ".csv.gz"))  # where an empty cell is an empty text
        for number, record in records:
            where = f"{file}, row {number}"
            if isinstance(record, str):  # the reader's description of a row that it could not read
                yield RowFault({}, f"{where}: {record}")
                continue
            try:
                yield _checked_row(record, where, columns, reading, is_csv)
            except InputError as error:
                yield RowFault(_writable(record, where), str(error))
    reading.check_given(columns, source_label(source))


def _plain(value: Any, column: str, where: str) -> Any:
    """The value as JSON can hold it; dates become ISO text."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=_iso)
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: {column!r} is not valid Unicode ({error.reason}). Repair the text.") from error
    except TypeError as error:
        raise InputError(f"{where}: column {column!r} holds a {error}, which JSON cannot. Drop the column.") from None
    return json.loads(text)


def _iso(value: Any) -> str:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise TypeError(type(value).__name__)


def _writable(record: Any, where: str) -> dict[str, Any]:
    """What JSON can hold of a bad row, without what would be taken for a result."""
    fields = {}
    for key, value in record.items() if isinstance(record, dict) else ():
        if key not in _RESULT_FIELDS:
            with contextlib.suppress(InputError):
                fields[key] = _plain(value, key, where)
    return fields


def _checked_row(record: Any, where: str, columns: Columns, reading: Reading, is_csv: bool) -> ScoreRow:
    if not isinstance(record, dict):
        raise InputError(f"{where} is a {type(record).__name__}; expected an object with prompt and response.")
    for field in _RESULT_FIELDS:
        if field in record:
            raise InputError(f"{where} has a field {field!r} already, which the result would replace. Rename it.")
    try:
        reading.add_row(record, columns, ROW_FIELDS, also=_ABOUT_RESPONSE)
        prompt, response = _prompt_and_response(Row(record, columns, reading), is_csv)
    except Fault as fault:
        raise InputError(f"{where}: {fault}") from None
    return ScoreRow(prompt, response, {key: _plain(value, key, where) for key, value in record.items()}, where)


def _prompt_and_response(row: Row, is_csv: bool) -> tuple[list[Message], str]:
    response = row.value("response", required=True)
    if response is None and is_csv and row.columns.given.get("response", "response") in row.record:
        response = ""
    if response is None:
        raise no_response(row.record)
    prompt = required_prompt(row, "a row to score needs one", ROW_FIELDS)
    response = reply_text("'response'", response)
    if not isinstance(response, str):
        raise Fault("wrong type", f"'response' is {found(response)}; expected text.")
    count_end_token(row, response)
    check_unicode("'response'", response)  # an empty one is a response: policies in training write some
    return prompt, response
