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
from pathlib import Path
from typing import Any

from inform_rm.errors import InputError, shortened

Records = Iterator[tuple[int, Any]]

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
_CHUNK_CHARACTERS = 1 << 16
# Four million tokens in one row are more than any model here reads. Parsed, JSON can take 24 times its bytes: 400 MB.
_MOST_ROW_BYTES = 16 << 20
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


class BoundedLines:
    """The lines of a text file for `csv.reader`, refusing a row of over 16 MiB before it is all in memory.

    Attributes:
        characters: Of the row under way; set it to 0 when a row is complete.
    """

    def __init__(self, name: str | Path, text: Any):
        self._name, self._text, self.characters = name, text, 0

    def __iter__(self) -> "BoundedLines":
        return self

    def __next__(self) -> str:
        line = self._text.readline(_MOST_ROW_BYTES + 1)
        self.characters += len(line)
        if self.characters > _MOST_ROW_BYTES:
            raise InputError(f"{self._name}: {_TOO_LONG} Is a quote never closed?")
        if not line:
            raise StopIteration
        return line


_TOO_LONG = f"a row is longer than {_MOST_ROW_BYTES} bytes."


def open_rows(path: Path, errors: str = "strict") -> io.TextIOWrapper:
    """Open a UTF-8 file for reading, unpacking ``.gz`` up to a limit; a byte order mark is no part of the text."""
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
    with open_rows(path) as text:
        row, buffer, need, at_end, separator = 1, "", 1, False, "["
        while True:
            while len(buffer) < need and not at_end:
                try:
                    chunk = text.read(max(_CHUNK_CHARACTERS, need - len(buffer)))
                except UnicodeDecodeError as error:
                    raise InputError(f"{path}, near row {row}: not UTF-8. Save the file as UTF-8.") from error
                buffer, at_end = buffer + chunk, not chunk
            trimmed = buffer.lstrip()
            if trimmed[:1] == "]" and separator != "[":
                if trimmed[1:].strip() or text.read(_CHUNK_CHARACTERS).strip():
                    raise InputError(f"{path}: text follows the end of the JSON array after row {row - 1}.")
                return
            if trimmed[:1] == separator:
                start = len(trimmed) - len(trimmed[1:].lstrip())
                if separator == "[" and trimmed[start : start + 1] == "]":
                    return
                try:
                    record, end = decoder.raw_decode(trimmed, start)
                    rest = trimmed[end:].lstrip()
                    if rest or at_end:
                        yield row, record
                        row, buffer, need, separator = row + 1, rest, 1, ","
                        continue
                except RecursionError:
                    raise InputError(f"{path}, row {row}: broken JSON: nested too deeply. Correct it there.") from None
                except ValueError as error:
                    if at_end:
                        raise InputError(f"{path}, row {row}: broken JSON: {error}. Correct it there.") from error
                    if len(trimmed) > _MOST_ROW_BYTES:
                        raise InputError(f"{path}, row {row}: {_TOO_LONG} Or broken JSON: {error}.") from error
            if at_end or trimmed[:1] not in ("", separator):
                raise InputError(f"{path}, row {row}: broken JSON: expected ',' or ']' before it. Correct it there.")
            if len(trimmed) <= 1 < len(buffer):
                buffer = trimmed  # nothing but space, however much
            need = 2 * len(buffer) + 1  # the element is longer than what was read


def _read_csv(path: Path) -> Records:
    limit = csv.field_size_limit(_MOST_ROW_BYTES)
    try:
        # A byte that is not UTF-8 becomes a lone surrogate and is then reported for its own row.
        with open_rows(path, errors="surrogateescape") as text:
            lines = BoundedLines(path, text)
            cells = csv.reader(lines, strict=True)
            row = 0
            try:
                header = next(cells, [])
                twice = sorted(name for name, number in Counter(header).items() if number > 1)
                if twice:
                    names = shortened(", ".join(twice))
                    raise InputError(f"{path}: its first line names a column twice: {names}. Rename one.")
                for row, values in enumerate((values for values in cells if values), start=1):
                    lines.characters = 0
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


def read_parquet(path: Path, row_group: int | None = None, first_row: int = 1) -> Records:
    """The rows of a Parquet file, or those of one row group, whose first row is number ``first_row`` of the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    groups = None if row_group is None else [row_group]
    try:
        # Columns are decoded from a buffer of 1 MiB instead of a whole row group.
        with pq.ParquetFile(path, buffer_size=1 << 20) as file:
            yield from enumerate(_parquet_rows(path, file, groups), start=first_row)
    except (pa.ArrowException, OSError, RecursionError) as error:
        raise _unreadable_parquet(path, error) from error


def parquet_row_groups(path: Path) -> list[int]:
    """The number of rows of each row group of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            return [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    except (pa.ArrowException, RecursionError) as error:
        raise _unreadable_parquet(path, error) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error


def _unreadable_parquet(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: not a readable Parquet file ({shortened(str(error), 300)}). Fetch or write it again.")


def _parquet_rows(path: Path, file: Any, groups: list[int] | None) -> Iterator[Any]:
    left = most_expanded_bytes(path)
    batch_size = _parquet_batch_rows(path, file)
    for batch in file.iter_batches(batch_size=batch_size, row_groups=groups, use_threads=False):
        left -= batch.nbytes
        if left < 0:
            raise _expands_too_much(path)
        # A batch of ordinary rows is small; of another one no row is made before its size is known.
        parts = [batch] if batch.nbytes <= _MOST_ROW_BYTES else (batch.slice(at, 1) for at in range(batch.num_rows))
        for part in parts:
            if part.nbytes > _MOST_ROW_BYTES:
                raise InputError(f"{path}: {_TOO_LONG} Shorten or remove it.")
            yield from part.to_pylist()


def _parquet_batch_rows(path: Path, file: Any) -> int:
    """Rows to decode at a time: 256, and fewer of a file whose dictionaries may hold long texts to be repeated.

    Raises:
        InputError: the file's own account of its rows says that one of them is too long to be decoded.
    """
    longest = 0
    for number in range(min(file.metadata.num_row_groups, 1000)):
        group = file.metadata.row_group(number)
        if group.total_byte_size > _MOST_ROW_BYTES * max(1, group.num_rows):
            raise InputError(f"{path}: {_TOO_LONG} Shorten or remove it.")
        for column in range(min(group.num_columns, 1000)):
            longest = max(longest, group.column(column).total_uncompressed_size)
    return 256 if longest <= _MOST_ROW_BYTES else 16
