"""Where rows come from: files, folders and Hub ids, one notation for a split of any of them."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from inform_rm.data.records import SUFFIXES, Records, data_suffix, open_file
from inform_rm.errors import InputError, shortened
from inform_rm.util.files import file_digest

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset

# The quoted ones are not imported to be named.
Source = Union[
    str, Path, "Dataset", "IterableDataset", "DatasetDict", Sequence[Mapping[str, Any]]
]  # fmt: skip
Sources = Source | Sequence[Source]

_BLOCK_BYTES = 1 << 16
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
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

    `split` and `config` (of data sets that have several) are names, ``None`` where none is written.
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


def source_list(data: Sources) -> list[Any]:
    """One or several sources as a list; a list of rows is one source.

    Example:
        >>> source_list("a.jsonl"), source_list([{"prompt": "?"}])
        (['a.jsonl'], [[{'prompt': '?'}]])
    """
    if isinstance(data, list | tuple) and not (data and isinstance(data[0], Mapping)):
        return list(data)
    return [data]


def source_label(source: Source) -> str:
    """How a source is named in messages and results: as it was written, or what kind of object it is.

    Example:
        >>> source_label("org/pairs[train]"), source_label([{"prompt": "?"}])
        ('org/pairs[train]', 'list in memory')
    """
    return str(source) if isinstance(source, str | Path) else f"{type(source).__name__} in memory"


def open_parts(source: Source, *, revision: str | None = None) -> list[tuple[str, Records]]:
    """The parts of a source in order, each with its name for messages and an iterator over its rows.

    Args:
        source: As `parse_source` reads it: a file ending in one of `SUFFIXES`, a folder of such files, one written
            by `Dataset.save_to_disk`, or a Hub dataset id; a split must be named where there are several. Or rows in
            memory: a `datasets.Dataset` or `IterableDataset`, a `DatasetDict` of one split, a list of dictionaries,
            or a pandas table.
        revision: Branch, tag or commit of a Hub id.

    Raises:
        InputError: Missing, empty or unreadable source, unknown format, or a split that is not there; here, or while
            iterating.
    """
    if not isinstance(source, str | Path):
        if revision is not None:
            raise InputError(f"revision: {revision!r} was given, but the data is in memory. Leave revision out.")
        return [(source_label(source), enumerate(_rows_in_memory(source), start=1))]
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
        return [(name, enumerate(_load_saved(path, named.split), start=1))]
    if path.is_dir():
        return [open_file(file) for file in files_of_split(path, named)]
    check_hub_id(named.name)
    return [(name, enumerate(load_hub(named.name, named.split, revision, config=named.config), start=1))]


def _rows_in_memory(source: Any) -> Any:
    """What gives the rows of an object one after the other."""
    from datasets import Dataset, IterableDataset

    if type(source).__module__.partition(".")[0] == "pandas":  # which is no dependency of its own
        return Dataset.from_pandas(source, preserve_index=False)
    if isinstance(source, dict) and len(source) > 1:
        splits = ", ".join(map(repr, source))
        raise InputError(f"data: a {type(source).__name__} of several splits, {splits}. Pass one: data[NAME].")
    rows = next(iter(source.values()), None) if isinstance(source, dict) else source
    if not isinstance(rows, Dataset | IterableDataset | list | tuple):
        raise InputError(
            f"data: got a {type(source).__name__}; expected the name of a source, a Dataset, a DatasetDict of one "
            "split, a list of dictionaries or a pandas table."
        )
    if isinstance(rows, list | tuple):
        if rows and isinstance(rows[0], Dataset | IterableDataset):
            raise InputError(
                f"data: a list of {type(rows[0]).__name__} where rows are expected. datasets.concatenate_datasets "
                "makes one Dataset of several."
            )
        return rows
    return rows.with_format(None)  # tensors, arrays and tables are no values of a row


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

    there = {
        path.resolve(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and data_suffix(path.name)
        and path.name not in ("dataset_info.json", "dataset_infos.json")
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    if not there:
        raise InputError(f"{folder}: no data in this folder; expected files ending in {', '.join(SUFFIXES)}.")
    try:
        found = load_dataset_builder(str(folder), name=named.config).config.data_files or {}
    except Exception as error:  # datasets raises many types for a folder that it cannot make sense of
        raise InputError(
            f"{folder}: it is not clear what to read of this folder ({shortened(' '.join(str(error).split()), 300)}). "
            f"Name one of its files, or a configuration: {folder}[CONFIG/SPLIT]."
        ) from error
    splits = {str(part): [Path(file).resolve() for file in files] for part, files in found.items()}
    known = {file for files in splits.values() for file in files}
    if outside := sorted(known - there.keys()):
        raise InputError(f"{folder}: its README.md names a file outside the folder, {shortened(str(outside[0]))}.")
    files = sorted(there[file] for file in _pick_split(str(folder), splits, named.split))
    if named.config is None and (lost := [path for file, path in there.items() if file not in known]):
        raise InputError(
            f"{folder}: {lost[0].relative_to(folder)} belongs to no split that its names or its README.md tell "
            f"({', '.join(splits)}). Name the files to read, or move it."
        )
    formats = sorted({str(data_suffix(path.name)) for path in files})
    if len(formats) > 1:
        raise InputError(f"{folder}: files of several formats ({', '.join(formats)}). Name the files to read.")
    return files


def source_digest(source: Source) -> str:
    """What tells one state of a source from another: the SHA-256 of its files or rows, a Hub dataset's fingerprint.

    Raises:
        InputError: Missing source, or a Hub id that cannot be loaded.
        OSError: A file cannot be read.
    """
    if not isinstance(source, str | Path):
        digest = hashlib.sha256()
        for record in _rows_in_memory(source):
            digest.update(json.dumps(record, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()
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


def sampled_digest(files: Iterable[tuple[str, Path]], split: str | None = None) -> str:
    """SHA-256 over names, sizes and blocks spread over the content of files that are too large to be read whole.

    The start and the end are among the 16 blocks, and a file of up to 1 MiB is read whole. A change in place between
    the blocks that keeps the size is not seen. ``files``: the name that counts, and the path.
    """
    states = []
    for name, path in files:
        size, digest = path.stat().st_size, hashlib.sha256()
        with path.open("rb") as file:
            for block in range(16):  # they overlap or touch in a file of up to 16 blocks
                file.seek(max(0, size - _BLOCK_BYTES) * block // 15)
                digest.update(file.read(_BLOCK_BYTES))
        states.append([name, size, digest.hexdigest()])
    return hashlib.sha256(json.dumps([split, states]).encode("utf-8", "surrogatepass")).hexdigest()


def check_hub_id(name: str) -> None:
    """Raise `InputError` for a name that looks like a path: no file or folder of that name was found."""
    path = Path(name)
    if data_suffix(path.name) or path.is_absolute() or name.startswith((".", "~")) or not _HUB_ID.fullmatch(name):
        raise InputError(f"{name}: no such file or folder. Check the path.")


def _load_saved(path: Path, split: str | None) -> Any:
    from datasets import load_from_disk

    try:
        for state in [path / "state.json", *path.glob("*/state.json")]:
            for part in json.loads(state.read_text(encoding="utf-8"))["_data_files"] if state.is_file() else ():
                name = part["filename"]
                if not isinstance(name, str) or Path(name).name != name or "\\" in name:
                    raise InputError(
                        f"{state}: names a file outside its folder, {shortened(repr(name))}. Save it again."
                    )
        return _pick_split(str(path), load_from_disk(str(path)), split)
    except InputError:
        raise
    except Exception as error:  # Arrow and datasets raise many types for a damaged or forged file
        raise InputError(f"{path}: the saved dataset cannot be read ({error}). Save it again.") from error


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
    """The named split of a dictionary of splits, or its only one."""
    if not isinstance(loaded, dict):
        if split is not None:
            raise InputError(f"{name}[{split}]: {name} has no splits. Leave [{split}] out.")
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        if not loaded:
            raise InputError(f"{name}: it declares no split, so nothing of it can be read. Name its files.")
        got = "no split was named" if split is None else f"there is no split {split!r}"
        raise InputError(f"{name}: {got}. Name one: {', '.join(f'{name}[{each}]' for each in loaded)}.")
    return loaded[split]
