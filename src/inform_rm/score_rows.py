"""Reading the prompt/response rows that are to be scored, one at a time, whatever the file format."""

import contextlib
import csv
import datetime
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inform_rm.errors import InputError, shortened
from inform_rm.preferences import Message, to_messages
from inform_rm.records import BoundedLines, open_records, open_rows

_RESULT_FIELDS = ("reward", "reward_std")


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


def read_score_rows(path: str | Path) -> Iterator[ScoreRow]:
    """Yield the rows of a JSONL, JSON, CSV (each also .gz) or Parquet file in order, checked, one in memory at a time.

    Raises:
        InputError: if the file is missing, of another kind or broken, or a row has no usable ``prompt`` or
            ``response``; the message names file and row (from 1; in JSONL the line).
    """
    for row in score_rows_or_faults(path):
        if isinstance(row, RowFault):
            raise InputError(row.reason)
        yield row


def score_rows_or_faults(path: str | Path) -> Iterator[ScoreRow | RowFault]:
    """The rows as `read_score_rows` gives them; in place of a bad one, what is wrong with it.

    Raises:
        InputError: if the file is missing, of another kind, or broken in a way that spoils the rows that follow.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"input: there is no file {path}.")
    is_csv = path.name.lower().endswith((".csv", ".csv.gz"))
    file, records = (str(path), _csv_records(path)) if is_csv else open_records(path)
    for number, record in records:
        where = f"{file}, row {number}"
        if isinstance(record, str):  # the reader's description of a row that it could not read
            yield RowFault({}, f"{where}: {record}")
            continue
        try:
            yield _checked_row(record, where)
        except InputError as error:
            yield RowFault(_writable(record, where), str(error))


def _csv_records(path: Path) -> Iterator[tuple[int, Any]]:
    # The reader of preference pairs asks for other columns.
    limit = csv.field_size_limit(2**31 - 1)  # the default of 128 KiB refuses long responses; rows are bounded
    try:
        with open_rows(path) as file:
            lines = BoundedLines(path, file)
            reader = csv.DictReader(lines, strict=True)
            names = reader.fieldnames or []
            if len(set(names)) < len(names):
                shown = shortened(", ".join(names), 300)
                raise InputError(f"{path}: its first line must name each column once, got {shown}.")
            for number, record in enumerate(reader, start=1):
                lines.characters = 0
                if None in record or None in record.values():
                    yield number, "it has another number of cells than the header line. Check quotes and commas."
                else:
                    row = dict(record)
                    if re.match(r"\s*\[\s*\{\s*\"(role|content)\"", row.get("prompt") or ""):
                        row["prompt"] = json.loads(row["prompt"])
                    yield number, row
    except InputError:
        raise
    except (ValueError, OSError, EOFError, zlib.error, csv.Error, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}. Check its quotes, and that it is UTF-8.") from error
    finally:
        csv.field_size_limit(limit)


def _plain(value: Any, column: str, where: str) -> Any:
    """The value as JSON can hold it; dates become ISO text."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: {column!r} is not valid Unicode ({error.reason}). Repair the text.") from error
        return value
    if isinstance(value, list):
        return [_plain(item, column, where) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item, column, where) for key, item in value.items()}
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    raise InputError(f"{where}: column {column!r} holds a {type(value).__name__}, which JSON cannot. Drop the column.")


def _writable(record: Any, where: str) -> dict[str, Any]:
    """What JSON can hold of a bad row, without what would be taken for a result."""
    fields = {}
    for key, value in record.items() if isinstance(record, dict) else ():
        if key not in _RESULT_FIELDS:
            with contextlib.suppress(InputError):
                fields[key] = _plain(value, key, where)
    return fields


def _checked_row(record: Any, where: str) -> ScoreRow:
    if not isinstance(record, dict):
        raise InputError(f"{where} is a {type(record).__name__}; expected an object with prompt and response.")
    for field in ("prompt", "response"):
        if record.get(field) is None:
            found = shortened(", ".join(map(str, record)), 300) or "none"
            raise InputError(f"{where} has no {field} (fields: {found}). Each row needs prompt and response.")
    for field in _RESULT_FIELDS:
        if field in record:
            raise InputError(f"{where} has a field {field!r} already, which the result would replace. Rename it.")
    response = record["response"]
    if not isinstance(response, str):
        raise InputError(f"{where}: response is {shortened(ascii(response))}; expected text.")
    try:
        prompt = to_messages(record["prompt"])
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return ScoreRow(prompt, response, {key: _plain(value, key, where) for key, value in record.items()}, where)
