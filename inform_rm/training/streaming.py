"""Training pairs read and encoded while training runs, in memory that does not grow with their number.

`open_stream` makes a `datasets.IterableDataset` of files, folders and Hub ids; `EncodedStream` trains on that, or any
other one whose rows `inform_rm.data.pairs` reads, for as many epochs as the steps need, without a gap between them.

All readers (each worker of each process) go through the same rows in the same order, which the dataset's `shuffle` and
`set_epoch` decide, and each encodes only what is its own: of the rows cut into batches, batch b belongs to process
``b % processes`` and there to worker ``b // processes % workers``. Reading costs a few percent of encoding; in return
no pair is used twice or left out in an epoch, however rows are spread over files, all processes have equally many
batches, and the batches are the same for any number of workers. (`split_dataset_by_node` encodes everything everywhere
or splits files, which are uneven; Accelerate's dispatching encodes everything in the first process.)
"""

import copy
import functools
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import IterableDataset
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from inform_rm.data import records, sources
from inform_rm.data.columns import Columns, Reading, log_reading
from inform_rm.data.encoding import encode_columns, none_usable
from inform_rm.data.pairs import LOOKED_AT_ROWS, BadRow, pair_or_fault, with_layout
from inform_rm.data.preferences import FEATURES
from inform_rm.data.records import Records
from inform_rm.data.rendered_text import SHOWN_LOSSES, warn_of_loss
from inform_rm.errors import InputError
from inform_rm.util.files import write_json

logger = logging.getLogger(__name__)

_LISTED_BAD_ROWS = 1000
_LOGGED_BAD_ROWS = 10
_BLOCK_BYTES = 1 << 16
_READ_AT_ONCE = 256


@dataclass(frozen=True)
class Shard:
    """Rows that are read one after the other: a file, a row group of a Parquet file, or a shard of a Hub dataset.

    Attributes:
        label: how messages name it; row numbers count from its start.
        name: of its source, for rows without `subset` or `id`.
        open: gives its rows.
        columns: which columns are what.
    """

    label: str
    name: str
    open: Callable[[], Records] | None = None
    columns: Columns = field(default_factory=Columns)


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
    fingerprints: dict[str, str] = field(default_factory=dict)
    readings: dict[str, dict[str, Any]] = field(default_factory=dict)
    shard: Shard | None = None


def open_stream(
    data: Sequence[str | Path], columns: Columns | Mapping[str, str] | None = None, *, seed: int, shuffle_buffer: int
) -> StreamSource:
    """The shuffled rows of several sources, of which only the first rows are read here.

    Args:
        data: files, folders, saved datasets or Hub ids, as `sources.open_parts` takes them. Of a Hub dataset the
            commit of today is used.
        columns: see `Columns.of`.
        seed: of the order.
        shuffle_buffer: see `datasets.IterableDataset.shuffle`; 1: files in random order, their rows as they stand.

    Raises:
        InputError: a missing, empty or unreadable source, or a folder of which it is not clear what to read.
    """
    shards: list[Shard] = []
    fingerprints, readings = {}, {}
    for source in map(str, data):
        found, fingerprints[source] = _shards(source)
        if not found:
            raise InputError(f"{source}: no rows. Expected at least one preference pair.")
        mapping, readings[source] = _first_look(source, found[0].open(), columns)  # type: ignore[misc]
        shards += [replace(shard, columns=mapping) for shard in found]
    dataset = IterableDataset.from_generator(_rows_of_shards, gen_kwargs={"shards": shards})
    # Of several shards at a time datasets fetches each row through a thread, which takes longer than to read it.
    mixed = dataset.shuffle(seed, buffer_size=shuffle_buffer, max_buffer_input_shards=1)
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
    mapping, reading = _first_look(name, enumerate(_examples(dataset), start=1), columns)
    return StreamSource(dataset, {}, {name: reading}, Shard(name, name, columns=mapping))


def _first_look(source: str, rows: Records, columns: Any) -> tuple[Columns, dict[str, Any]]:
    """How a source is read, as its first rows show it, said once: all of it is read only while training."""
    reading = Reading()
    head = list(itertools.islice(rows, LOOKED_AT_ROWS))
    columns = with_layout(Columns.of(columns), head)
    for row, record in head:
        pair_or_fault(record, source, row, "skip", columns=columns, reading=reading)
    reading.check_given(columns, f"{source} (its first {reading.rows} rows)")
    if PartialState().is_main_process:
        log_reading(f"{source} (its first {reading.rows} rows)", reading)
    return columns, reading.to_dict()


def _rows_of_shards(shards: list[Shard]) -> Iterator[dict[str, Row]]:
    for shard in shards:
        assert shard.open is not None
        yield from ({"row": Row(shard, number, record)} for number, record in shard.open())


def _shards(source: str) -> tuple[list[Shard], str]:
    """The shards of a source in the order of names, and its fingerprint."""
    named = sources.parse_source(source)
    path = Path(named.name)
    if not path.exists():
        commit = _hub_commit(named.name)
        return _hub_shards(source, commit), commit
    parts = [Path(name) for name, _ in sources.open_parts(source)]  # refuses what is empty or of an unknown format
    if path.is_dir() and sources.is_saved_dataset(path):
        shards = [Shard(source, sources.source_name(path), functools.partial(_saved_records, source))]
        parts = sorted(file for file in path.rglob("*") if file.is_file())
    else:
        shards = [shard for part in parts for shard in _file_shards(part)]
    # A file's own name is spelling; names in a folder decide the order.
    states = [[str(file.relative_to(path)), *_file_state(file)] for file in parts]
    digest = hashlib.sha256(json.dumps([named.split, states]).encode("utf-8", "surrogatepass"))
    return shards, digest.hexdigest()


def _file_shards(path: Path) -> list[Shard]:
    file, name = str(path), sources.source_name(path)
    if records.data_suffix(path.name) != ".parquet":
        return [Shard(file, name, functools.partial(_file_records, path))]
    sizes = records.parquet_row_groups(path)
    starts = itertools.accumulate(sizes, initial=1)
    return [
        Shard(file, name, functools.partial(_group_records, path, group, start))
        for group, (start, size) in enumerate(zip(starts, sizes, strict=False))
        if size
    ]


def _file_records(path: Path) -> Records:
    return records.open_file(path)[1]


def _group_records(path: Path, group: int, first_row: int) -> Records:
    return records.naming_unreadable(str(path), records.read_parquet(path, group, first_row))


def _saved_records(source: str) -> Records:
    return sources.open_parts(source)[0][1]


def _file_state(path: Path) -> tuple[int, str]:
    """Bytes of a file and the SHA-256 of blocks spread over it, its start and end among them.

    Up to 1 MiB that is all of it. A change in place between the blocks that keeps the size is not seen: to read a data
    set larger than memory only to compare it would take as long as an epoch.
    """
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in range(16):  # they overlap or touch in a file of up to 16 blocks
            file.seek(max(0, size - _BLOCK_BYTES) * block // 15)
            digest.update(file.read(_BLOCK_BYTES))
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


def _hub_shards(source: str, revision: str | None) -> list[Shard]:
    """The shards of one split of a Hub dataset (or of a local folder laid out like one) at a commit."""
    named = sources.parse_source(source)
    dataset = sources.load_hub(named.name, named.split, revision, streaming=True, config=named.config)
    count = dataset.num_shards
    return [
        Shard(
            source if count == 1 else f"{source}, shard {index + 1} of {count}",
            sources.source_name(named.name),
            functools.partial(_hub_records, dataset, count, index),
        )
        for index in range(count)
    ]


def _hub_records(dataset: IterableDataset, count: int, index: int) -> Records:
    return enumerate(_examples(dataset.shard(num_shards=count, index=index)), start=1)


def _examples(dataset: IterableDataset) -> Iterator[dict[str, Any]]:
    """All rows, in a worker too: iterating over single ones would divide them among the workers."""
    for batch in dataset.iter(batch_size=_READ_AT_ONCE):
        yield from (dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True))


@dataclass
class StreamCounts:
    """What became of the rows; those of later epochs count again.

    Attributes:
        pairs: pairs learnt from.
        overlong: over max_length.
        dropped: of these, left out.
        truncated: of these, learnt from with a shorter prompt.
        num_bad_rows: rows left out because they are no pair or cannot be encoded within max_length.
        num_partly_rendered: pairs learnt from of which the chat template deleted text.
        passes: epochs that were begun.
        bad_rows: which and why, each once, at most 1000.
        partly_rendered: the first five of which text was deleted, and what.
    """

    pairs: int = 0
    overlong: int = 0
    dropped: int = 0
    truncated: int = 0
    num_bad_rows: int = 0
    num_partly_rendered: int = 0
    passes: int = 0
    bad_rows: list[str] = field(default_factory=list)
    partly_rendered: list[str] = field(default_factory=list)

    def add(self, other: "StreamCounts") -> None:
        """Add the counts of other rows."""
        for name in ("pairs", "overlong", "dropped", "truncated", "num_bad_rows", "num_partly_rendered"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.passes = max(self.passes, other.passes)
        for name, most in (("bad_rows", _LISTED_BAD_ROWS), ("partly_rendered", SHOWN_LOSSES)):
            if more := getattr(other, name):
                setattr(self, name, [*dict.fromkeys([*getattr(self, name), *more])][:most])


class Place(NamedTuple):
    """Where a row stands: its epoch, and in the rows of all epochs the first of its epoch, and itself."""

    epoch: int = 0
    first: int = 0
    position: int = -1  # before all rows


def _own_rows(
    readers: list[tuple[int, Place]], source: StreamSource, batch_size: int, num_readers: int
) -> Iterator[dict[str, Any]]:
    """The rows of one of several readers after a place, without end; an `InputError` in their stead ends them."""
    ((reader, after),) = readers
    # Workers share the epoch's number of a dataset that was forked to them, and may be in different ones.
    dataset = copy.deepcopy(source.dataset)
    position = after.first
    try:
        for epoch in itertools.count(after.epoch):
            dataset.set_epoch(epoch)
            first = position
            for number, example in enumerate(_examples(dataset), start=1):
                if position > after.position and position // batch_size % num_readers == reader:
                    row = example["row"] if source.shard is None else Row(source.shard, number, example)
                    yield {"row": row, "place": Place(epoch, first, position)}
                position += 1
            if position == first:
                raise InputError("data: no rows in the stream. Expected at least one preference pair.")
    except InputError as error:
        yield {"row": error, "place": after}


@dataclass
class _Encoder:
    """Encodes batches of `_own_rows` for `IterableDataset.map`.

    A row has the columns of `encode_pairs` and its ``place``. Its ``counts`` say what happened to it and to the rows
    left out since the row before it, so that they add up, whichever row a run goes on from. `InputError` is not raised
    but given under ``error``: PyTorch does not bring every exception out of a worker as it is.
    """

    tokenizer: Any
    max_length: int | None
    overlong: str
    on_bad_row: str
    counts: StreamCounts = field(default_factory=StreamCounts)

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Of each name the values of the rows that are not left out."""
        try:
            rows = self._encoded(batch)
        except InputError as error:
            rows = [{"error": error}]
        names = {"error": None, **(rows[0] if rows else {})}
        return {name: [row.get(name) for row in rows] for name in names}

    def _encoded(self, batch: dict[str, list]) -> list[dict[str, Any]]:
        read = dict(zip(batch["place"], map(self._pair, batch["row"]), strict=True))
        pairs = [{**vars(pair), "place": place} for place, pair in read.items() if not isinstance(pair, BadRow)]
        columns, bad_rows = encode_columns(
            {name: [pair[name] for pair in pairs] for name in (*FEATURES, "place")}, self.tokenizer,
            max_length=self.max_length, overlong=self.overlong, on_bad_row=self.on_bad_row, kept=("place",),
        )  # fmt: skip
        faults = {(bad.file, bad.row): bad for bad in bad_rows}
        encoded = dict(zip(columns["place"], zip(*columns.values(), strict=True), strict=True))
        rows = []
        for place, pair in read.items():
            fault = pair if isinstance(pair, BadRow) else faults.get((pair.file, pair.row))
            if place in encoded:
                rows.append(self._counted(dict(zip(columns, encoded[place], strict=True))))
            elif fault is None:
                self.counts.add(StreamCounts(overlong=1, dropped=1))
            else:
                is_overlong = int(fault.kind == "overlong")
                self.counts.add(StreamCounts(overlong=is_overlong, num_bad_rows=1, bad_rows=[str(fault)]))
        # An epoch's worth of rows of which none can be used: it would be read for ever.
        left_out = self.counts.dropped + self.counts.num_bad_rows
        if not rows and place.epoch and left_out * place.epoch >= place.first:
            raise none_usable(left_out, self.counts.bad_rows, self.max_length)
        return rows

    def _pair(self, row: Any) -> Any:
        if isinstance(row, InputError):
            raise row
        shard = row.shard
        return pair_or_fault(
            row.record, shard.label, row.number, self.on_bad_row, name=shard.name, columns=shard.columns
        )

    def _counted(self, row: dict[str, Any]) -> dict[str, Any]:
        truncated, lost = int(row.pop("truncated")), row.pop("lost")
        counts, self.counts = self.counts, StreamCounts()
        counts.add(
            StreamCounts(
                pairs=1, truncated=truncated, overlong=truncated, passes=row["place"].epoch + 1,
                num_partly_rendered=int(lost is not None), partly_rendered=[] if lost is None else [lost],
            )
        )  # fmt: skip
        return {**row, "counts": counts}


class EncodedStream:
    """One process's share of a stream as encoded pairs, and how far training has come in it.

    A checkpoint holds the place of the last row of each worker that was learnt from. A resumed run reads its epoch
    again up to there, without encoding, and goes on with the rows, batches and counts of an uninterrupted one
    (`IterableDataset.state_dict` would lose what the shuffle buffer holds).

    Args:
        source: see `open_stream` and `stream_of`.
        tokenizer: see `inform_rm.data.tokenizer.load_tokenizer`.
        args: batch size, number of processes and workers.
        max_length: as the other ones see `inform_rm.data.encoding.encode_pairs`.
    """

    def __init__(
        self, source: StreamSource, tokenizer: Any, args: TrainingArguments, *, max_length: int | None,
        overlong: str = "error", on_bad_row: str = "error",
    ):  # fmt: skip
        self.source, self.args = source, args
        self._encoder = _Encoder(tokenizer, max_length, overlong, on_bad_row)
        self.counts = StreamCounts()
        self._batches = 0
        self._places = [Place()] * max(1, args.dataloader_num_workers)

    def dataset(self) -> IterableDataset:
        """Encoded pairs from the place reached on, without end; its shards are the workers' shares."""
        args, workers = self.args, len(self._places)
        turns = [(self._batches + turn) % workers for turn in range(workers)]  # PyTorch asks worker 0 first
        readers = [(args.process_index + args.world_size * worker, self._places[worker]) for worker in turns]
        rows = IterableDataset.from_generator(
            _own_rows,
            gen_kwargs={
                "readers": readers, "source": self.source, "batch_size": args.train_batch_size,
                "num_readers": args.world_size * workers,
            },
        )  # fmt: skip
        encoder = replace(self._encoder, counts=StreamCounts())
        return rows.map(encoder, batched=True, batch_size=args.train_batch_size, remove_columns=["row", "place"])

    def loader(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> DataLoader:
        """Batches, full whatever is left out, each to be given to `take` first."""
        args = self.args
        return DataLoader(
            self.dataset(), batch_size=args.train_batch_size, collate_fn=functools.partial(_collated, collate),
            num_workers=args.dataloader_num_workers, pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor, generator=torch.Generator(),  # not the latent noise's
        )  # fmt: skip

    def take(self, batch: dict[str, Any]) -> None:
        """Count a batch that is learnt from, and take off it what is not for the model.

        Raises:
            InputError: bad data was met on the way to it.
        """
        if "error" in batch:
            raise batch["error"]
        place, counts = batch.pop("read")
        self._batches += 1
        self._places[place.position // (self.args.train_batch_size * self.args.world_size) % len(self._places)] = place
        told, told_of_loss = len(self.counts.bad_rows), self.counts.num_partly_rendered
        self.counts.add(counts)
        if not told_of_loss:  # while there is time to stop; the number of all comes at the end
            lost = {"n": self.counts.num_partly_rendered, "examples": self.counts.partly_rendered}
            warn_of_loss(lost, self.counts.pairs, "pairs so far")
        for text in self.counts.bad_rows[told:_LOGGED_BAD_ROWS]:
            logger.warning("data: left out: %s", text)

    def save(self, folder: Path) -> None:
        """Write the place and the counts of this process into a checkpoint."""
        write_json(
            self._file(folder), {"batches": self._batches, "places": self._places, "counts": asdict(self.counts)}
        )

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            InputError: it holds no place in a stream, or that of other workers, whose shares were others.
        """
        try:
            state = json.loads(self._file(folder).read_text(encoding="utf-8"))
            self._batches, self.counts = state["batches"], StreamCounts(**state["counts"])
            places = [Place(*place) for place in state["places"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{folder}: holds no place in a stream ({error}). Was it written by another version? Start again."
            ) from error
        if len(places) != len(self._places):
            if self._encoder.on_bad_row == "skip" or self._encoder.overlong == "drop":
                raise InputError(
                    f"dataloader_num_workers: {len(places)} in {folder}, now {len(self._places)}: where rows are left "
                    "out, each worker fills its batches from its own share. Set it as it was to go on."
                )
            places = [max(places)] * len(self._places)  # where none are, what was learnt from is all up to there
        self._places = places

    def _file(self, folder: Path) -> Path:
        return folder / f"stream_{self.args.process_index}.json"

    def total_counts(self) -> dict[str, Any]:
        """Counts of all processes, which all must call it, and the readings; a log line where rows were left out."""
        total = StreamCounts()
        for counts in gather_object([self.counts]):
            total.add(counts)
        if total.num_bad_rows or total.overlong or total.num_partly_rendered:
            logger.warning("data: %s", asdict(total))
        return {**asdict(total), "reading": self.source.readings}


def _collated(collate: Callable[[list[dict[str, Any]]], dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    for row in rows:
        if row["error"] is not None:
            return {"error": row["error"]}
    counts = StreamCounts()
    for row in rows:
        counts.add(row["counts"])
    return {**collate(rows), "read": (rows[-1]["place"], counts)}


class StepsAreTheEpoch(TrainerCallback):
    """The Trainer's epoch is the share of steps done; a resumed run of which it skips no batch would begin at 0."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set it."""
        state.epoch = state.global_step / state.max_steps
