"""Training pairs read and encoded while training runs, in memory that does not grow with their number.

`EncodedStream` trains on the rows of `inform_rm.training.stream_sources` for as many epochs as the steps need, without
a gap between them.

All readers (each worker of each process) go through the same rows in the same order, which the dataset's `shuffle` and
`set_epoch` decide, and each encodes only what is its own: of the rows cut into batches, batch b belongs to process
``b % processes`` and there to worker ``b // processes % workers``. Reading costs a few percent of encoding; in return
no pair is used twice or left out in an epoch, however rows are spread over files, all processes have equally many
batches, and the batches are the same for any number of workers. (`split_dataset_by_node` encodes everything everywhere
or splits files, which are uneven; Accelerate's dispatching encodes everything in the first process;
`IterableDataset.state_dict` loses what the shuffle buffer holds.)
"""

import copy
import functools
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, get_worker_info
from transformers import TrainerCallback, TrainingArguments

from inform_rm.data.encoding import encode_columns, none_usable
from inform_rm.data.pairs import BadRow, parse_pair, row_or_fault
from inform_rm.data.preferences import FEATURES
from inform_rm.data.rendered_text import SHOWN_CHANGES, warn_of_text
from inform_rm.errors import InputError
from inform_rm.training.stream_sources import Row, StreamSource, examples
from inform_rm.util.files import write_json

logger = logging.getLogger(__name__)

_LISTED_BAD_ROWS = 1000
_LOGGED_BAD_ROWS = 10


@dataclass
class StreamCounts:
    """What became of the rows, as of `inform_rm.data.encoding.EncodedPairs`; those of later epochs count again.

    ``pairs`` are those learnt from, ``passes`` the epochs that were begun. ``bad_rows`` says which and why, each once,
    at most 1000; ``not_as_written`` holds the first five.
    """

    pairs: int = 0
    overlong: int = 0
    dropped: int = 0
    truncated: int = 0
    num_bad_rows: int = 0
    num_not_as_written: int = 0
    passes: int = 0
    bad_rows: list[str] = field(default_factory=list)
    not_as_written: list[str] = field(default_factory=list)

    def add(self, other: "StreamCounts") -> None:
        """Add the counts of other rows."""
        for name in ("pairs", "overlong", "dropped", "truncated", "num_bad_rows", "num_not_as_written"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.passes = max(self.passes, other.passes)
        for name, most in (("bad_rows", _LISTED_BAD_ROWS), ("not_as_written", SHOWN_CHANGES)):
            if more := getattr(other, name):
                setattr(self, name, [*dict.fromkeys([*getattr(self, name), *more])][:most])


class Place(NamedTuple):
    """Where a row stands: its epoch, and in the rows of all epochs the first of its epoch, and itself."""

    epoch: int = 0
    first: int = 0
    position: int = -1  # before all rows


class EncodedStream(torch.utils.data.IterableDataset):
    """One process's share of a stream as batches of encoded pairs, and how far training has come in it.

    Gives ``{"pairs": [...], "read": (place of the last row, counts of the rows)}`` from the place reached on, without
    end: every batch is full, whatever rows are left out. An `InputError` comes under ``"error"`` and ends it, because
    PyTorch does not bring every exception out of a worker as it is.

    A checkpoint holds the place of the last row of each worker that was learnt from. A resumed run reads its epoch
    again up to there, without encoding, and goes on with the rows, batches and counts of an uninterrupted one.
    ``rules`` are ``max_length``, ``overlong`` and ``on_bad_row`` of `inform_rm.data.encoding.encode_pairs`.
    """

    def __init__(self, source: StreamSource, tokenizer: Any, args: TrainingArguments, **rules: Any):
        self.source, self.tokenizer, self.args = source, tokenizer, args
        self._rules = {"overlong": "error", "on_bad_row": "error", **rules}
        self.counts = StreamCounts()
        self._batches = 0
        self._places = [Place()] * max(1, args.dataloader_num_workers)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """See the class; in a worker, its part."""
        worker = get_worker_info()
        # PyTorch asks worker 0 first.
        turn = (self._batches + (0 if worker is None else worker.id)) % len(self._places)
        try:
            rows = self._own_rows(self.args.process_index + self.args.world_size * turn, self._places[turn])
            while True:
                yield self._next_batch(rows)
        except InputError as error:
            yield {"error": error}

    def pairs(self) -> Iterator[dict[str, Any]]:
        """Single pairs, from the place reached on."""
        for batch in self:
            if "error" in batch:
                raise batch["error"]
            yield from batch["pairs"]

    def _own_rows(self, reader: int, after: Place) -> Iterator[tuple[Row, Place]]:
        """The rows of one reader after a place, without end."""
        batch_size, num_readers = self.args.train_batch_size, self.args.world_size * len(self._places)
        # Workers share the epoch's number of a dataset that was forked to them, and may be in different ones.
        dataset, shard = copy.deepcopy(self.source.dataset), self.source.shard
        position = after.first
        for epoch in itertools.count(after.epoch):
            dataset.set_epoch(epoch)
            first = position
            for number, example in enumerate(examples(dataset), start=1):
                if position > after.position and position // batch_size % num_readers == reader:
                    row = example["row"] if shard is None else Row(shard, number, example)
                    yield row, Place(epoch, first, position)
                position += 1
            if position == first:
                raise InputError("data: no rows in the stream. Expected at least one preference pair.")

    def _next_batch(self, rows: Iterator[tuple[Row, Place]]) -> dict[str, Any]:
        pairs: list[dict[str, Any]] = []
        counts, unused, size = StreamCounts(), 0, self.args.train_batch_size
        while len(pairs) < size:
            read, places = zip(*itertools.islice(rows, size - len(pairs)), strict=True)
            usable = self._encoded(read, counts)
            pairs += usable
            unused = 0 if usable else unused + len(read)
            # An epoch's worth of rows of which none can be used: it would be read for ever.
            if places[-1].epoch and unused * places[-1].epoch >= places[-1].first:
                raise none_usable(unused, counts.bad_rows, self._rules["max_length"])
        counts.passes = places[-1].epoch + 1
        return {"pairs": pairs, "read": (places[-1], counts)}

    def _encoded(self, rows: Sequence[Row], counts: StreamCounts) -> list[dict[str, Any]]:
        """Those of the rows that are learnt from, encoded; what became of each is added to ``counts``."""
        found = [
            row_or_fault(
                parse_pair, row.record, row.shard.label, row.number, self._rules["on_bad_row"], name=row.shard.name,
                columns=row.shard.columns,
            )
            for row in rows
        ]  # fmt: skip
        pairs = [vars(pair) for pair in found if not isinstance(pair, BadRow)]
        columns, unfit = encode_columns(
            {name: [pair[name] for pair in pairs] for name in FEATURES}, self.tokenizer, **self._rules
        )
        bad_rows = [pair for pair in found if isinstance(pair, BadRow)] + unfit
        truncated, changed = sum(columns.pop("truncated")), [each for each in columns.pop("not_as_written") if each]
        encoded = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        dropped = len(pairs) - len(unfit) - len(encoded)
        overlong = dropped + truncated + sum(bad.kind == "overlong" for bad in bad_rows)
        counts.add(
            StreamCounts(
                len(encoded), overlong, dropped, truncated, len(bad_rows), len(changed),
                bad_rows=[str(bad) for bad in bad_rows], not_as_written=changed,
            )
        )  # fmt: skip
        return encoded

    def loader(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> DataLoader:
        """Batches, each to be given to `take` first."""
        args = self.args
        return DataLoader(
            self, batch_size=None, collate_fn=functools.partial(_collated, collate),
            num_workers=args.dataloader_num_workers, pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor, generator=torch.Generator(),  # not the latent noise's
        )  # fmt: skip

    def take(self, batch: dict[str, Any]) -> None:
        """Count a batch that is learnt from, and take off it what is not for the model."""
        if "error" in batch:
            raise batch["error"]
        place, counts = batch.pop("read")
        self._batches += 1
        self._places[place.position // (self.args.train_batch_size * self.args.world_size) % len(self._places)] = place
        told, told_of_text = len(self.counts.bad_rows), self.counts.num_not_as_written
        self.counts.add(counts)
        if not told_of_text:  # while there is time to stop; the number of all comes at the end
            lost = {"n": self.counts.num_not_as_written, "examples": self.counts.not_as_written}
            warn_of_text(lost, self.counts.pairs, "pairs so far")
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
            if self._rules["on_bad_row"] == "skip" or self._rules["overlong"] == "drop":
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
        if total.num_bad_rows or total.overlong or total.num_not_as_written:
            logger.warning("data: %s", asdict(total))
        return {**asdict(total), "reading": self.source.readings}


def _collated(collate: Callable[[list[dict[str, Any]]], dict[str, Any]], batch: dict[str, Any]) -> dict[str, Any]:
    return batch if "error" in batch else {**collate(batch["pairs"]), "read": batch["read"]}


class StepsAreTheEpoch(TrainerCallback):
    """The Trainer's epoch is the share of steps done; a resumed run of which it skips no batch would begin at 0."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set it."""
        state.epoch = state.global_step / state.max_steps
