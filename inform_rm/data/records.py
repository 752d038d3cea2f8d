"""Readers of row files: each yields (row number from 1, record), one row at a time.

A row that cannot be read on its own (broken JSON on a line, bad UTF-8, wrong number of cells) is yielded as a text
that says what is wrong, and reading goes on. A fault after which no later row can be trusted raises `InputError`.
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from inform_rm.errors import InputError, shortened

Records = Iterator[tuple[int, Any]]

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
_CHUNK_CHARACTERS = 1 << 16
# Four million tokens in one row are more than any model here reads. Parsed, JSON can take 24 times its bytes: 400 MB.
_MOST_ROW_BYTES = 16 << 20
_TOO_LONG = f"a row is longer than {_MOST_ROW_BYTES} bytes."
# Text and numbers shrink to a tenth or, with much repetition, a fiftieth; what shrinks more is made to fill a disk.
_MOST_EXPANSION, _FREE_EXPANSION_BYTES = 200, 256 << 20


def open_file(path: Path) -> tuple[str, Records]:
    """The name of a data file for messages, and an iterator over its rows.

    Raises:
        InputError: Empty or unreadable file, or unknown format; here, or while iterating.
    """
    name, suffix = str(path), data_suffix(path.name)
    if suffix is None:
        raise InputError(f"{name}: unknown format; expected a name ending in {', '.join(SUFFIXES)}.")
    if path.stat().st_size == 0:
        raise InputError(f"{name}: the file is empty (0 bytes).")
    reader = {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv, "parquet": read_parquet}
    return name, naming_unreadable(name, reader[suffix.split(".")[1]](path))


def data_suffix(name: str) -> str | None:
    """The longest of `SUFFIXES` that a file name ends in."""
    return max((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), key=len, default=None)


def naming_unreadable(name: str, records: Records) -> Records:
    """The same rows; a file that cannot be read on is an `InputError` with its name and the last good row."""
    row = 0
    try:
        for row, record in records:
            yield row, record
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{name}: damaged or cut short after row {row} ({error}). Write it anew.") from error
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror or error}).") from error


class _BoundedGzip(io.RawIOBase):
    """The content of a gzip file, up to 200 times its size (256 MiB are always read)."""

    def __init__(self, path: Path):
        self._path, self._file = path, gzip.open(path, "rb")
        self._left = most_expanded_bytes(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        read = self._file.readinto(buffer)
        self._left -= read
        if self._left < 0:
            raise _expands_too_much(self._path)
        return read

    def close(self) -> None:
        self._file.close()
        super().close()


def most_expanded_bytes(path: Path) -> int:
    """How many bytes a compressed file may hold before it is taken for a decompression bomb."""
    return max(_FREE_EXPANSION_BYTES, _MOST_EXPANSION * path.stat().st_size)


def _expands_too_much(path: Path) -> InputError:
    return InputError(
        f"{path}: {path.stat().st_size} bytes that hold more than {most_expanded_bytes(path)}: a decompression bomb, "
        "or the same few rows over and over. If you trust it, unpack it and pass the unpacked file."
    )


def _open_bytes(path: Path) -> Any:
    if path.name.lower().endswith(".gz"):
        return io.BufferedReader(_BoundedGzip(path), 1 << 17)
    return path.open("rb")


def _open_text(path: Path, errors: str = "strict") -> io.TextIOWrapper:
    """A UTF-8 file, of which a byte order mark is no part of the text."""
    return io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig", errors=errors, newline="")


def _read_jsonl(path: Path) -> Records:
    with _open_bytes(path) as file:
        for row, line in enumerate(iter(lambda: file.readline(_MOST_ROW_BYTES + 1), b""), start=1):
            if len(line) > _MOST_ROW_BYTES:
                raise InputError(f"{path}, row {row}: {_TOO_LONG} Shorten or remove it.")
            if row == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue  # an empty line holds no row; the numbers of the others stay line numbers
            try:
                yield row, json.loads(line.decode(), object_pairs_hook=_unique_keys)
            except UnicodeDecodeError as error:
                yield row, f"not UTF-8 at byte {error.start + 1} of the line. Save the file as UTF-8."
            except RecursionError:
                yield row, "broken JSON: nested too deeply. Correct or remove the line."
            except ValueError as error:
                yield row, f"broken JSON: {error}. Correct or remove the line."


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)
        raise ValueError(f"the key {shortened(repr(twice))} stands twice in one object")
    return found


def _read_json(path: Path) -> Records:
    """The elements of one JSON array, decoded as the file is read; lines of objects are read as JSON Lines."""
    with _open_bytes(path) as file:
        head = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith(b"{"):
        yield from _read_jsonl(path)
        return
    if not head.startswith(b"["):
        raise InputError(f"{path}: expected a JSON array of objects or one object a line, found {head[:20]!r}.")
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    row, opening, text, need = 1, "[", "", 1  # what must stand before the element; what was read and not used
    with _open_text(path) as file:
        while True:
            try:
                more = file.read(max(_CHUNK_CHARACTERS, need - len(text)))
            except UnicodeDecodeError as error:
                raise InputError(f"{path}, near row {row}: not UTF-8. Save the file as UTF-8.") from error
            text = (text + more).lstrip()
            while text[:1] == opening:
                inner = text[1:].lstrip()
                if opening == "[" and inner[:1] == "]":
                    return
                try:
                    record, end = decoder.raw_decode(inner)
                except RecursionError:
                    raise InputError(f"{path}, row {row}: broken JSON: nested too deeply. Correct it there.") from None
                except ValueError as error:
                    if not more:
                        raise InputError(f"{path}, row {row}: broken JSON: {error}. Correct it there.") from error
                    if len(text) > _MOST_ROW_BYTES:
                        raise InputError(f"{path}, row {row}: {_TOO_LONG} Or broken JSON: {error}.") from error
                    break
                rest = inner[end:].lstrip()
                if not rest and more:
                    break  # a number may go on
                yield row, record
                row, opening, text = row + 1, ",", rest
            if text[:1] == "]" and opening == ",":
                if text[1:].strip() or file.read(_CHUNK_CHARACTERS).strip():
                    raise InputError(f"{path}: text follows the end of the JSON array after row {row - 1}.")
                return
            if not more or text[:1] not in ("", opening):
                raise InputError(f"{path}, row {row}: broken JSON: expected ',' or ']' before it. Correct it there.")
            need = 2 * len(text) + 1  # the element is longer than what was read


def _read_csv(path: Path) -> Records:
    row = characters = 0

    def lines() -> Iterator[str]:
        nonlocal characters
        while line := text.readline(_MOST_ROW_BYTES + 1):
            characters += len(line)
            if characters > _MOST_ROW_BYTES:  # before the row is all in memory
                raise InputError(f"{path}: {_TOO_LONG} Is a quote never closed?")
            yield line

    limit = csv.field_size_limit(_MOST_ROW_BYTES)
    try:
        # A byte that is not UTF-8 becomes a lone surrogate and is then reported for its own row.
        with _open_text(path, errors="surrogateescape") as text:
            cells = csv.reader(lines(), strict=True)
            header = next(cells, [])
            twice = sorted(name for name, number in Counter(header).items() if number > 1)
            if twice:
                names = shortened(", ".join(twice))
                raise InputError(f"{path}: its first line names a column twice: {names}. Rename one.")
            for row, values in enumerate((values for values in cells if values), start=1):
                characters = 0
                yield row, _csv_record(header, values)
    except csv.Error as error:
        raise InputError(f"{path}: broken CSV after row {row}: {error}. Check the quotes there.") from error
    finally:
        csv.field_size_limit(limit)


def _csv_record(header: list[str], values: list[str]) -> dict[str, Any] | str:
    if len(values) != len(header):
        return f"{len(values)} cells, but the header names {len(header)} columns. Check quotes and commas."
    record: dict[str, Any] = {key: value if value != "" else None for key, value in zip(header, values, strict=True)}
    for key, value in record.items():
        if value and any("\udc80" <= character <= "\udcff" for character in value):
            return f"column {key!r} is not UTF-8. Save the file as UTF-8."
    return record


@contextmanager
def _open_parquet(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Columns are decoded from a buffer of 1 MiB instead of a whole row group.
        with pq.ParquetFile(path, buffer_size=1 << 20) as file:
            yield file
    except (pa.ArrowException, OSError, RecursionError) as error:
        reason = shortened(str(error), 300)
        raise InputError(f"{path}: not a readable Parquet file ({reason}). Fetch or write it again.") from error


def parquet_row_groups(path: Path) -> list[int]:
    """The number of rows of each row group of a Parquet file."""
    with _open_parquet(path) as file:
        return [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]


def read_parquet(path: Path, row_group: int | None = None, first_row: int = 1) -> Records:
    """The rows of a Parquet file, or those of one row group, whose first row is number ``first_row`` of the file."""
    too_long = InputError(f"{path}: {_TOO_LONG} Shorten or remove it.")
    left, number, longest = most_expanded_bytes(path), first_row, 0
    with _open_parquet(path) as file:
        for group in map(file.metadata.row_group, range(min(file.metadata.num_row_groups, 1000))):
            if group.total_byte_size > _MOST_ROW_BYTES * max(1, group.num_rows):
                raise too_long
            columns = map(group.column, range(min(group.num_columns, 1000)))
            longest = max([longest, *(column.total_uncompressed_size for column in columns)])
        # Fewer rows at a time of a file whose dictionaries may hold long texts to be repeated.
        batch_size = 256 if longest <= _MOST_ROW_BYTES else 16
        groups = None if row_group is None else [row_group]
        for batch in file.iter_batches(batch_size=batch_size, row_groups=groups, use_threads=False):
            left -= batch.nbytes
            if left < 0:
                raise _expands_too_much(path)
            # A batch of ordinary rows is small; of another one no row is made before its size is known.
            size = max(1, batch.num_rows) if batch.nbytes <= _MOST_ROW_BYTES else 1
            for part in (batch.slice(at, size) for at in range(0, batch.num_rows, size)):
                if part.nbytes > _MOST_ROW_BYTES:
                    raise too_long
                yield from enumerate(part.to_pylist(), start=number)
                number += part.num_rows
