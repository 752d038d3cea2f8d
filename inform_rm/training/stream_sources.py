"""Where the rows of a stream come from: files, folders and Hub ids, or an `IterableDataset` of somebody else's."""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from datasets import IterableDataset

from inform_rm.data import records, sources
from inform_rm.data.columns import Columns, Reading, log_reading
from inform_rm.data.pairs import LOOKED_AT_ROWS, parse_pair, row_or_fault, with_layout
from inform_rm.data.records import Records
from inform_rm.data.sources import sampled_digest
from inform_rm.errors import InputError
from inform_rm.util.processes import from_main

_READ_AT_ONCE = 256
_SHUFFLE_ARGUMENTS = inspect.signature(IterableDataset.shuffle).parameters


class Shard(NamedTuple):
    """Rows that are read one after the other: a file, a row group of a Parquet file, or a shard of a Hub dataset.

    Row numbers in messages count from the start of ``label``; ``name`` is for rows without `subset` or `id`.
    """

    label: str
    name: str
    columns: Columns
    read: Callable[[], Records] | None = None


class Row(NamedTuple):
    """A row as it was read, and where."""

    shard: Shard
    number: int
    record: Any


@dataclass(frozen=True)
class StreamSource:
    """Rows, and what tells whether they are those of an earlier run.

    Attributes:
        dataset: examples ``{"row": Row}``; where `shard` is given, rows in any layout that `parse_pair` reads.
        fingerprints: per source the digest of names, sizes and samples of its files, or the commit of a Hub dataset.
        readings: per source how its first rows were read (`inform_rm.data.columns.Reading`).
        shard: stands for a dataset that somebody else made.
    """

    dataset: IterableDataset
    fingerprints: dict[str, str]
    readings: dict[str, dict[str, Any]]
    shard: Shard | None = None


def open_stream(
    data: Sequence[str | Path], columns: Columns | Mapping[str, str] | None = None, *, seed: int, shuffle_buffer: int
) -> StreamSource:
    """The shuffled rows of several sources, of which only the first rows are read here.

    ``data`` are files, folders, saved datasets or Hub ids, as `sources.open_parts` takes them; of a Hub dataset the
    commit of today is used. With a ``shuffle_buffer`` of 1 files come in random order, their rows as they stand.

    Raises:
        InputError: a missing, empty or unreadable source, or a folder of which it is not clear what to read.
    """
    shards: list[Shard] = []
    fingerprints, readings = {}, {}
    for source in map(str, data):
        found, fingerprints[source] = _shards(source)
        if not found:
            raise InputError(f"{source}: no rows. Expected at least one preference pair.")
        mapping, readings[source] = _first_look(source, found[0].read(), columns)  # type: ignore[misc]
        shards += [shard._replace(columns=mapping) for shard in found]
    dataset = IterableDataset.from_generator(_rows_of_shards, gen_kwargs={"shards": shards})
    # Of several shards at a time datasets fetches each row through a thread, which takes longer than to read it.
    # Earlier versions have no such argument, and take one at a time.
    one_shard = {"max_buffer_input_shards": 1} if "max_buffer_input_shards" in _SHUFFLE_ARGUMENTS else {}
    mixed = dataset.shuffle(seed, buffer_size=shuffle_buffer, **one_shard)
    return StreamSource(mixed, fingerprints, readings)


def stream_of(
    dataset: IterableDataset, columns: Columns | Mapping[str, str] | None = None, name: str = "train_dataset"
) -> StreamSource:
    """A dataset that is shuffled already (with a seed, so that all processes and a resumed run see one order).

    Raises:
        InputError: it is split over processes, which happens here, or lacks a column that `columns` names.
    """
    if getattr(dataset, "_distributed", None) is not None:
        raise InputError(f"{name}: it is split over processes already, which training does. Pass it as it was before.")
    dataset = dataset.with_format(None)  # tensors, arrays and tables are no values of a row
    mapping, reading = _first_look(name, enumerate(examples(dataset), start=1), columns)
    return StreamSource(dataset, {}, {name: reading}, Shard(name, name, mapping))


def _first_look(source: str, rows: Records, columns: Any) -> tuple[Columns, dict[str, Any]]:
    """How a source is read, as its first rows show it, said once: all of it is read only while training."""
    reading = Reading()
    head = list(itertools.islice(rows, LOOKED_AT_ROWS))
    columns = with_layout(Columns.of(columns), head)
    for row, record in head:
        row_or_fault(parse_pair, record, source, row, "skip", columns=columns, reading=reading)
    reading.check_given(columns, f"{source} (its first {reading.rows} rows)")
    if PartialState().is_main_process:
        log_reading(f"{source} (its first {reading.rows} rows)", reading)
    return columns, reading.to_dict()


def _rows_of_shards(shards: list[Shard]) -> Iterator[dict[str, Row]]:
    for shard in shards:
        assert shard.read is not None
        yield from ({"row": Row(shard, number, record)} for number, record in shard.read())


def _shards(source: str) -> tuple[list[Shard], str]:
    """The shards of a source in the order of names, and its fingerprint."""
    named = sources.parse_source(source)
    path = Path(named.name)
    if not path.exists():
        commit = _hub_commit(named.name)
        return _hub_shards(source, commit), commit
    parts = [Path(name) for name, _ in sources.open_parts(source)]  # refuses what is empty or of an unknown format
    if path.is_dir() and sources.is_saved_dataset(path):
        shards = [Shard(source, sources.source_name(path), Columns(), functools.partial(_local_records, source))]
        parts = sorted(file for file in path.rglob("*") if file.is_file())
    else:
        shards = [shard for part in parts for shard in _file_shards(part)]
    # A file's own name is spelling; names in a folder decide the order.
    return shards, sampled_digest(((str(file.relative_to(path)), file) for file in parts), named.split)


def _file_shards(path: Path) -> list[Shard]:
    ranges: list[tuple[int, ...]] = [()]
    if records.data_suffix(path.name) == ".parquet":
        sizes = records.parquet_row_groups(path)
        starts = itertools.accumulate(sizes, initial=1)
        ranges = [(group, start) for group, (start, size) in enumerate(zip(starts, sizes, strict=False)) if size]
    file, name = str(path), sources.source_name(path)
    return [Shard(file, name, Columns(), functools.partial(_local_records, file, *part)) for part in ranges]


def _local_records(source: str, group: int | None = None, first_row: int = 1) -> Records:
    """Rows of a file, of a saved dataset, or of a row group of a Parquet file."""
    if group is None:
        return sources.open_parts(source)[0][1]
    return records.naming_unreadable(source, records.read_parquet(Path(source), group, first_row))


def _hub_commit(name: str) -> str:
    """The commit that a Hub dataset's main branch has now; the same in all processes."""
    sources.check_hub_id(name)
    from huggingface_hub import HfApi

    PartialState()  # connects the processes
    try:
        return str(from_main(lambda: HfApi().dataset_info(name).sha))
    except Exception as error:  # the Hub client and the network raise types of their own
        raise InputError(f"{name}: no such file or folder, and not found on the Hugging Face Hub: {error}") from error


def _hub_shards(source: str, revision: str) -> list[Shard]:
    """The shards of one split of a Hub dataset (or of a local folder laid out like one) at a commit."""
    named = sources.parse_source(source)
    dataset = sources.load_hub(named.name, named.split, revision, streaming=True, config=named.config)
    count, name = dataset.num_shards, sources.source_name(named.name)
    labels = [source] if count == 1 else [f"{source}, shard {index + 1} of {count}" for index in range(count)]
    return [
        Shard(label, name, Columns(), functools.partial(_hub_records, dataset, count, index))
        for index, label in enumerate(labels)
    ]


def _hub_records(dataset: IterableDataset, count: int, index: int) -> Records:
    return enumerate(examples(dataset.shard(num_shards=count, index=index)), start=1)


def examples(dataset: IterableDataset) -> Iterator[dict[str, Any]]:
    """All rows, in a worker too: iterating over single ones would divide them among the workers."""
    for batch in dataset.iter(batch_size=_READ_AT_ONCE):
        yield from (dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True))
