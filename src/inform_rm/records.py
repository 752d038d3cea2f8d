"""Readers of row files: each yields (row number from 1, record), one row at a time.

A row that cannot be read on its own (broken JSON on a line, bad UTF-8, wrong number of cells) is yielded as a text
that says what is wrong, and reading goes on. A fault after which no later row can be trusted raises `InputError`.
"""

import codecs
import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inform_rm.errors import InputError, shortened
from inform_rm.files import file_digest

Records = Iterator[tuple[int, Any]]

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_CHUNK_CHARACTERS = 1 << 16
# Four million tokens in one row are more than any model here reads. Parsed, JSON can take 24 times its bytes: 400 MB.
_MOST_ROW_BYTES = 16 << 20
# Text and numbers shrink to a tenth or, with much repetition, a fiftieth; what shrinks more is made to fill a disk.
_MOST_EXPANSION, _FREE_EXPANSION_BYTES = 200, 256 << 20
_WITH_SPLIT = re.compile(r"(.*)\[([^\[\]]*)\]")


def source_name(source: str | Path) -> str:
    """The last part of a path or Hub id without its data suffix, or ``"default"``.

    Example:
        >>> source_name("data/hh-rlhf/train.jsonl.gz")
        'train'
    """
    name = Path(source).name
    suffix = data_suffix(name)
    return (name[: -len(suffix)] if suffix else name) or "default"


@dataclass(frozen=True)
class SourceName:
    """A source as it is written: a file, a folder or a Hub id, and which part of it is meant.

    Attributes:
        name: path or Hub id.
        split: name of the split; ``None`` where there is only one.
        config: name of the configuration, for data sets that have several.
    """

    name: str
    split: str | None = None
    config: str | None = None


def parse_source(source: str | Path) -> SourceName:
    """What ``NAME``, ``NAME[SPLIT]`` or ``NAME[CONFIG/SPLIT]`` means; a path that exists as it stands is that path.

    Example:
        >>> parse_source("org/pairs[en/train]")
        SourceName(name='org/pairs', split='train', config='en')
    """
    name = str(source)
    match = _WITH_SPLIT.fullmatch(name)
    if match is None or Path(name).exists():
        return SourceName(name)
    config, _, split = match[2].rpartition("/")
    if not split.strip() or not match[1].strip():
        raise InputError(f"data source: {name!r} names no split; expected NAME[SPLIT] or NAME[CONFIG/SPLIT].")
    return SourceName(match[1], split, config or None)


def open_parts(source: str | Path, *, revision: str | None = None) -> list[tuple[str, Records]]:
    """The parts of a source in order, each with its name for messages and an iterator over its rows.

    Args:
        source: As `parse_source` reads it: a file ending in one of `SUFFIXES`, a folder of such files, one written
            by `Dataset.save_to_disk`, or a Hub dataset id; a split must be named where there are several.
        revision: Branch, tag or commit of a Hub id.

    Raises:
        InputError: Missing, empty or unreadable source, unknown format, or a split that is not there; here, or while
            iterating.
    """
    named = parse_source(source)
    path, name = Path(named.name), str(source)
    if not name.strip():
        raise InputError("data source: got an empty name. Name a file, a folder or a Hub id.")
    if path.exists() and revision is not None:
        kind = "one file" if path.is_file() else "a local folder"
        raise InputError(f"revision: {revision!r} was given, but {name} is {kind}. Leave revision out.")
    if path.is_file():
        if named.split is not None:
            raise InputError(f"{name}: {named.name} is one file and has no splits. Leave [{named.split}] out.")
        return [open_file(path)]
    if path.is_dir() and is_saved_dataset(path):
        if named.config is not None:
            raise InputError(f"{name}: {named.name} has no configurations. Leave {named.config!r} out.")
        return [(name, _rows(_load_saved(path, named.split)))]
    if path.is_dir():
        return [open_file(file) for file in files_of_split(path, named)]
    check_hub_id(named.name)
    return [(name, _rows(load_hub(named.name, named.split, revision, config=named.config)))]


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


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by `Dataset.save_to_disk`."""
    return any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))


def files_of_split(folder: Path, named: SourceName) -> list[Path]:
    """The data files of a split of a local folder that is laid out like a data set on the Hub.

    Which file belongs to which split is what `datasets` finds in their names, or reads in the folder's ``README.md``.

    Raises:
        InputError: no data, several splits or configurations of which none is named, or files that no split has.
    """
    from datasets import load_dataset_builder

    there = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and data_suffix(path.name)
        and path.name not in ("dataset_info.json", "dataset_infos.json")
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not there:
        raise InputError(f"{folder}: no data in this folder; expected files ending in {', '.join(SUFFIXES)}.")
    try:
        found = load_dataset_builder(str(folder), name=named.config).config.data_files
    except Exception as error:  # datasets raises many types for a folder that it cannot make sense of
        raise InputError(
            f"{folder}: it is not clear what to read of this folder ({shortened(' '.join(str(error).split()), 300)}). "
            f"Name one of its files, or a configuration: {folder}[CONFIG/SPLIT]."
        ) from error
    own = {path.resolve(): path for path in there}
    splits: dict[str, list[Path]] = {}
    for part, files in (found or {}).items():
        outside = [file for file in files if Path(file).resolve() not in own]
        if outside:
            raise InputError(f"{folder}: its README.md names a file outside the folder, {shortened(outside[0])}.")
        splits[str(part)] = sorted(own[Path(file).resolve()] for file in files)
    if not splits:
        raise InputError(f"{folder}: no split in this folder. Name its files.")
    split = named.split if named.split is not None or len(splits) > 1 else next(iter(splits))
    if split not in splits:
        got = "no split was named" if split is None else f"there is no split {split!r}"
        listed = ", ".join(f"{folder}[{name}]" for name in splits)
        raise InputError(f"{folder}: {got}. Name one: {listed}.")
    known = {file for files in splits.values() for file in files}
    if named.config is None and (lost := [path for path in there if path not in known]):
        raise InputError(
            f"{folder}: {lost[0].relative_to(folder)} belongs to no split that its names or its README.md tell "
            f"({', '.join(splits)}). Name the files to read, or move it."
        )
    formats = sorted({str(data_suffix(path.name)) for path in splits[split]})
    if len(formats) > 1:
        raise InputError(f"{folder}: files of several formats ({', '.join(formats)}). Name the files to read.")
    return splits[split]


def source_digest(source: str | Path) -> str:
    """What tells one state of a source from another: the SHA-256 of its files, or a Hub dataset's fingerprint.

    Raises:
        InputError: Missing source, or a Hub id that cannot be loaded.
        OSError: A file cannot be read.
    """
    named = parse_source(source)
    path = Path(named.name)
    if path.is_file():
        return file_digest(path)
    if path.is_dir():
        saved = is_saved_dataset(path)
        files = sorted(file for file in path.rglob("*") if file.is_file()) if saved else files_of_split(path, named)
        digests = [(str(file.relative_to(path) if saved else file.name), file_digest(file)) for file in files]
        text = json.dumps([named.split, named.config, digests])
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    check_hub_id(named.name)
    # Of the builder, its revision and its files.
    return load_hub(named.name, named.split, None, config=named.config)._fingerprint


def check_hub_id(name: str) -> None:
    """Raise `InputError` for a name that looks like a path: no file or folder of that name was found."""
    path = Path(name)
    if data_suffix(path.name) or path.is_absolute() or name.startswith((".", "~")) or not _HUB_ID.fullmatch(name):
        raise InputError(f"{name}: no such file or folder. Check the path.")


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


def _rows(dataset: Any) -> Records:
    return enumerate(dataset, start=1)


def _load_saved(path: Path, split: str | None) -> Any:
    from datasets import load_from_disk

    try:
        for state in [path / "state.json", *path.glob("*/state.json")]:
            if state.is_file():
                _check_saved_files(state)
        return _pick_split(str(path), load_from_disk(str(path)), split)
    except InputError:
        raise
    except Exception as error:  # Arrow and datasets raise many types for a damaged or forged file
        raise InputError(f"{path}: the saved dataset cannot be read ({error}). Save it again.") from error


def _check_saved_files(state: Path) -> None:
    """Refuse a saved dataset whose parts lie anywhere but in its own folder."""
    for part in json.loads(state.read_text(encoding="utf-8"))["_data_files"]:
        name = part["filename"]
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise InputError(f"{state}: names a file outside its folder, {shortened(repr(name))}. Save it again.")


def load_hub(
    name: str,
    split: str | None,
    revision: str | None,
    *,
    streaming: bool = False,
    config: str | None = None,
    data_dir: str | None = None,
) -> Any:
    """The dataset of a Hub id, or its stream; `InputError` where it cannot be loaded or its split is not clear."""
    from datasets import load_dataset

    options = {"streaming": streaming or None, "name": config, "data_dir": data_dir}
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    try:
        return _pick_split(name, load_dataset(name, split=split, revision=revision, **given), None)
    except InputError:
        raise
    except Exception as error:  # the Hub client, the network and each builder raise types of their own
        raise InputError(
            f"{name}: no such file or folder, and not loadable from the Hugging Face Hub "
            f"(revision {revision or 'main'}, split {split or 'not named'}): {error}"
        ) from error


def _pick_split(name: str, loaded: Any, split: str | None) -> Any:
    if not isinstance(loaded, dict):
        if split is not None:
            raise InputError(f"{name}[{split}]: {name} has no splits. Leave [{split}] out.")
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        got = "no split was named" if split is None else f"there is no split {split!r}"
        raise InputError(f"{name}: {got}. Name one: {', '.join(f'{name}[{each}]' for each in loaded)}.")
    return loaded[split]
