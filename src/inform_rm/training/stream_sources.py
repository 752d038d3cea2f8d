"""Where streamed training pairs come from: files, row groups and Hub shards, and what tells whether they changed."""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.utils.data import get_worker_info

from inform_rm import records
from inform_rm.errors import InputError
from inform_rm.records import Records
from inform_rm.training.config import TrainingConfig

_BLOCK_BYTES = 1 << 16
_BLOCKS = 16
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?=[-_.\d])", re.IGNORECASE)


@dataclass(frozen=True)
class Shard:
    """Rows that are read one after the other: a file, a row group of a Parquet file, or a shard of a Hub dataset.

    Attributes:
        file: the file or Hub id.
        label: how messages name it; row numbers count from its start.
        open: gives its rows.
    """

    file: str
    label: str
    open: Callable[[], Records]


@dataclass(frozen=True)
class StreamSource:
    """All shards of ``data``, and what tells whether they are those of an earlier run.

    Attributes:
        shards: in the order of ``data``, then of names.
        fingerprints: per source the digest of names, sizes and samples of its files, or the commit of a Hub dataset;
            and the number of processes, and of workers if it matters, which decide who reads what.
    """

    shards: tuple[Shard, ...]
    fingerprints: dict[str, str]


def open_stream(config: TrainingConfig) -> StreamSource:
    """Find the files of all sources, without reading their rows.

    A source is a file of any format of `inform_rm.records`, a folder of such files (all of one format, all of one
    split), or a Hub dataset, of which the commit of today is used.

    Raises:
        InputError: a missing, empty or unreadable source, or a folder of which it is not clear what to read.
    """
    shards: list[Shard] = []
    fingerprints = {}
    for source in config.data:
        path = Path(source)
        if path.is_file() or path.is_dir():
            files = [path] if path.is_file() else _files_of_folder(path)
            found = [shard for file in files for shard in _file_shards(file)]
            if not found:
                raise InputError(f"{source}: no rows. Expected at least one preference pair.")
            # A file's own name is spelling; names in a folder decide the order.
            states = [[str(file.relative_to(path)), *_file_state(file)] for file in files]
            fingerprint = hashlib.sha256(json.dumps(states).encode("utf-8", "surrogatepass")).hexdigest()
        else:
            fingerprint = _hub_commit(source)
            found = hub_shards(source, fingerprint)
        shards += found
        fingerprints[source] = fingerprint
    readers = f"{PartialState().num_processes} processes"
    if may_leave_out(config):
        readers += f", {config.dataloader_num_workers} workers"
    return StreamSource(tuple(shards), {**fingerprints, "streamed to": readers})


def may_leave_out(config: TrainingConfig) -> bool:
    """Whether a reader's batches can need more rows than they hold, so that its place depends on what it read."""
    return config.on_bad_row == "skip" or config.overlong == "drop"


def _files_of_folder(folder: Path) -> list[Path]:
    if any((folder / name).exists() for name in ("state.json", "dataset_dict.json")):
        raise InputError(
            f"{folder}: a folder written by Dataset.save_to_disk cannot be streamed. Write it as Parquet files "
            "(Dataset.to_parquet), or leave streaming out."
        )
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and records.data_suffix(path.name)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise InputError(f"{folder}: no data in this folder; expected files ending in {', '.join(records.SUFFIXES)}.")
    formats = sorted({str(records.data_suffix(path.name)) for path in files})
    if len(formats) > 1:
        raise InputError(f"{folder}: files of several formats ({', '.join(formats)}). Name the files to read.")
    splits = set()
    for path in files:
        parts = path.relative_to(folder).parts
        names = [match[1].lower() for part in parts if (match := _SPLIT.match(f"{part}."))]
        splits.add(names[-1] if names else "")
    if len(splits) > 1:
        listed = ", ".join(sorted(split or "no split" for split in splits))
        raise InputError(f"{folder}: its names speak of several splits ({listed}). Name the files to read.")
    return files


def _file_shards(path: Path) -> list[Shard]:
    name, _ = records.open_records(path)  # refuses what is empty or of an unknown format
    if records.data_suffix(path.name) != ".parquet":
        return [Shard(name, name, functools.partial(_file_records, path))]
    sizes = records.parquet_row_groups(path)
    starts = itertools.accumulate(sizes, initial=1)
    return [
        Shard(name, name, functools.partial(_group_records, path, group, start))
        for group, (start, size) in enumerate(zip(starts, sizes, strict=False))
        if size
    ]


def _file_records(path: Path) -> Records:
    return records.open_records(path)[1]


def _group_records(path: Path, group: int, first_row: int) -> Records:
    return records.naming_unreadable(str(path), records.read_parquet(path, group, first_row))


def _file_state(path: Path) -> tuple[int, str]:
    """Bytes of a file and the SHA-256 of blocks spread over it: its start and end (a Parquet file's list of contents).

    Up to 1 MiB that is all of it. A change in place between the blocks that keeps the size is not seen: to read a data
    set larger than memory only to compare it would take as long as a pass over it.
    """
    size = path.stat().st_size
    last = max(0, size - _BLOCK_BYTES)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _BLOCKS * _BLOCK_BYTES:
            digest.update(file.read())
        else:
            for block in range(_BLOCKS):
                file.seek(last * block // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
            if records.data_suffix(path.name) == ".parquet":
                file.seek(-8, 2)
                footer = int.from_bytes(file.read(4), "little")
                file.seek(max(0, size - 8 - footer))
                digest.update(file.read())
    return size, digest.hexdigest()


def _hub_commit(name: str) -> str:
    """The commit that a Hub dataset's main branch has now; the same in all processes."""
    records.check_hub_id(name)
    commit: list[str | None] = [None]
    if PartialState().is_main_process:
        from huggingface_hub import HfApi

        try:
            commit = [HfApi().dataset_info(name).sha]
        except Exception as error:  # the Hub client and the network raise types of their own
            raise InputError(
                f"{name}: no such file or folder, and not found on the Hugging Face Hub: {error}"
            ) from error
    return str(broadcast_object_list(commit)[0])


def hub_shards(name: str, revision: str | None) -> list[Shard]:
    """The shards of a Hub dataset (or of a local folder laid out like one) that has one split.

    Args:
        name: Hub id.
        revision: commit.

    Raises:
        InputError: it cannot be loaded, or has several splits.
    """
    dataset = records.load_hub(name, None, revision, streaming=True)
    count = dataset.num_shards
    return [
        Shard(
            name,
            name if count == 1 else f"{name}, shard {index + 1} of {count}",
            functools.partial(_hub_records, dataset, count, index),
        )
        for index in range(count)
    ]


def _hub_records(dataset: Any, count: int, index: int) -> Records:
    import fsspec  # type: ignore[import-untyped]

    if get_worker_info() is not None:
        fsspec.asyn.reset_lock()  # a lock of the process that this worker was forked from may never be released
    # Iterating over single rows would divide them among the workers once more; `iter` does not.
    batches = dataset.shard(num_shards=count, index=index).iter(batch_size=256)
    rows = (dict(zip(batch, row, strict=True)) for batch in batches for row in zip(*batch.values(), strict=True))
    return enumerate(rows, start=1)
