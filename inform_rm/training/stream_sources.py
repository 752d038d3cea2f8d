"""Where streamed training pairs come from: files, row groups and Hub shards, and what tells whether they changed."""

import functools
import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.utils.data import get_worker_info

from inform_rm.data import records, sources
from inform_rm.data.columns import Columns, Reading, log_reading
from inform_rm.data.pairs import LOOKED_AT_ROWS, pair_or_fault, with_layout
from inform_rm.data.records import Records
from inform_rm.errors import InputError
from inform_rm.training.config import TrainingConfig

_BLOCK_BYTES = 1 << 16
_BLOCKS = 16


@dataclass(frozen=True)
class Shard:
    """Rows that are read one after the other: a file, a row group of a Parquet file, or a shard of a Hub dataset.

    Attributes:
        file: the file or Hub id.
        label: how messages name it; row numbers count from its start.
        open: gives its rows.
        columns: which columns are what.
    """

    file: str
    label: str
    open: Callable[[], Records]
    columns: Columns = field(default_factory=Columns)


@dataclass(frozen=True)
class StreamSource:
    """All shards of ``data``, and what tells whether they are those of an earlier run.

    Attributes:
        shards: in the order of ``data``, then of names.
        fingerprints: per source the digest of names, sizes and samples of its files, or the commit of a Hub dataset;
            and the number of processes, and of workers if it matters, which decide who reads what.
        readings: per source how its first rows were read (`inform_rm.data.columns.Reading`).
    """

    shards: tuple[Shard, ...]
    fingerprints: dict[str, str]
    readings: dict[str, dict[str, Any]] = field(default_factory=dict)


def open_stream(config: TrainingConfig) -> StreamSource:
    """Find the files of all sources, without reading their rows.

    A source is a file of any format of `inform_rm.data.records`, a split of a folder of such files, or of a Hub
    dataset, of which the commit of today is used.

    Raises:
        InputError: a missing, empty or unreadable source, or a folder of which it is not clear what to read.
    """
    shards: list[Shard] = []
    fingerprints, readings = {}, {}
    for source in config.data:
        named = sources.parse_source(source)
        path = Path(named.name)
        if path.is_file() or path.is_dir():
            files = [path] if path.is_file() else _files_of_folder(path, named)
            if path.is_file():
                sources.open_parts(source)  # refuses a split of one file
            found = [shard for file in files for shard in _file_shards(file)]
            if not found:
                raise InputError(f"{source}: no rows. Expected at least one preference pair.")
            # A file's own name is spelling; names in a folder decide the order.
            states = [[str(file.relative_to(path)), *_file_state(file)] for file in files]
            fingerprint = hashlib.sha256(json.dumps(states).encode("utf-8", "surrogatepass")).hexdigest()
        else:
            fingerprint = _hub_commit(named.name)
            found = hub_shards(source, fingerprint)
        columns, readings[source] = _first_look(source, found[0], config)
        shards += [replace(shard, columns=columns) for shard in found]
        fingerprints[source] = fingerprint
    readers = f"{PartialState().num_processes} processes"
    if may_leave_out(config):
        readers += f", {config.dataloader_num_workers} workers"
    return StreamSource(tuple(shards), {**fingerprints, "streamed to": readers}, readings)


def _first_look(source: str, shard: Shard, config: TrainingConfig) -> tuple[Columns, dict[str, Any]]:
    """How a source is read, as its first rows show it, said once: all of it is read only while training.

    Raises:
        InputError: a mapping of columns of which none of these rows has the column.
    """
    reading = Reading()
    head = list(itertools.islice(shard.open(), LOOKED_AT_ROWS))
    columns = with_layout(Columns.of(config.columns), head)
    for row, record in head:
        pair_or_fault(record, shard.label, row, "skip", columns=columns, reading=reading)
    reading.check_given(columns, f"{source} (its first {reading.rows} rows)")
    if PartialState().is_main_process:
        log_reading(f"{source} (its first {reading.rows} rows)", reading)
    return columns, reading.to_dict()


def may_leave_out(config: TrainingConfig) -> bool:
    """Whether a reader's batches can need more rows than they hold, so that its place depends on what it read."""
    return config.on_bad_row == "skip" or config.overlong == "drop"


def _files_of_folder(folder: Path, named: sources.SourceName) -> list[Path]:
    if sources.is_saved_dataset(folder):
        raise InputError(
            f"{folder}: a folder written by Dataset.save_to_disk cannot be streamed. Write it as Parquet files "
            "(Dataset.to_parquet), or leave streaming out."
        )
    return sources.files_of_split(folder, named)


def _file_shards(path: Path) -> list[Shard]:
    name, _ = records.open_file(path)  # refuses what is empty or of an unknown format
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
    return records.open_file(path)[1]


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
    sources.check_hub_id(name)
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
    """The shards of one split of a Hub dataset (or of a local folder laid out like one).

    Args:
        name: Hub id, with its split where it has several (`sources.parse_source`).
        revision: commit.

    Raises:
        InputError: it cannot be loaded, or has several splits of which none is named.
    """
    named = sources.parse_source(name)
    dataset = sources.load_hub(named.name, named.split, revision, streaming=True, config=named.config)
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
