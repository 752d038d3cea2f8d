"""Training pairs read and encoded while training runs, in memory that does not grow with their number.

All readers (each worker of each process) go through the same rows in the same order, which seed and pass decide, and
each encodes only the batches that are its own: batch b belongs to process ``b % processes`` and there to worker
``b // processes % workers``. Reading costs a few percent of encoding, so little is lost; in return no row is used
twice or left out in a pass, however rows are spread over files, all readers have equally many batches, and the batches
are the same for any number of workers. Passes follow each other without a gap, so a batch may hold the end of one and
the start of the next.
"""

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from inform_rm.data.encoding import encode_columns
from inform_rm.data.pairs import BadRow, PreferencePair, pair_or_fault
from inform_rm.data.preferences import FEATURES
from inform_rm.data.rendered_text import SHOWN_LOSSES, partly_rendered, warn_of_loss
from inform_rm.errors import InputError
from inform_rm.training.config import TrainingConfig
from inform_rm.training.stream_sources import Shard, StreamSource, may_leave_out
from inform_rm.training.trainer import RewardTrainer
from inform_rm.util.checkpoints import checkpoint_step
from inform_rm.util.files import write_json

logger = logging.getLogger(__name__)

_LISTED_BAD_ROWS = 1000
_LOGGED_BAD_ROWS = 10


@dataclass
class StreamCounts:
    """What became of the rows; those of later passes count again.

    Attributes:
        pairs: pairs learnt from.
        overlong: over max_length.
        dropped: of these, left out.
        truncated: of these, learnt from with a shorter prompt.
        num_bad_rows: rows left out because they are no pair or cannot be encoded within max_length.
        num_partly_rendered: pairs learnt from of which the chat template deleted text.
        passes: passes over the data that were begun.
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

    def add_bad_row(self, bad: BadRow) -> None:
        """Count one that was left out, and list it while there is room."""
        self.num_bad_rows += 1
        if len(self.bad_rows) < _LISTED_BAD_ROWS:
            self.bad_rows.append(str(bad))

    def add(self, other: "StreamCounts") -> None:
        """Add the counts of other rows."""
        for name in ("pairs", "overlong", "dropped", "truncated", "num_bad_rows", "num_partly_rendered"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.passes = max(self.passes, other.passes)
        known = set(self.bad_rows)
        new = [text for text in dict.fromkeys(other.bad_rows) if text not in known]
        self.bad_rows += new[: _LISTED_BAD_ROWS - len(known)]
        self.partly_rendered = [*dict.fromkeys([*self.partly_rendered, *other.partly_rendered])][:SHOWN_LOSSES]


class PairStream(torch.utils.data.IterableDataset):
    """Endless batches of encoded pairs for one process; see the module.

    An item is a collated batch with its `StreamCounts` under ``stream_counts``. Batches before `skip_batches` are
    empty dicts: they are counted by whoever passes over them, and cost no encoding. `InputError` is not raised but
    given under ``error``, because PyTorch does not bring every exception out of a worker as it is.

    Args:
        shards: see `StreamSource`.
        config: settings of the run.
        tokenizer: see `inform_rm.data.tokenizer.load_tokenizer`.
        batch_size: pairs of a batch.
        collate: encoded pairs -> a batch.
        process_index: this process.
        num_processes: all processes.
    """

    def __init__(
        self, shards: tuple[Shard, ...], config: TrainingConfig, tokenizer: Any, *, batch_size: int,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]], process_index: int = 0, num_processes: int = 1,
    ):  # fmt: skip
        self.shards, self.config, self.tokenizer = shards, config, tokenizer
        self.batch_size, self.collate = batch_size, collate
        self.process_index, self.num_processes = process_index, num_processes
        self.skip_batches = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The batches of this worker, in order."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        reader = _Reader(self, self.process_index + self.num_processes * worker, self.num_processes * workers)
        skipped = len(range(worker, self.skip_batches, workers))
        yield from ({} for _ in range(skipped))
        try:
            reader.skip(skipped)
            while True:
                pairs, counts = reader.batch()
                yield {**self.collate(pairs), "stream_counts": counts}
        except InputError as error:
            yield {"error": error}

    def first_pairs(self, number: int) -> list[dict[str, Any]]:
        """The first encoded pairs of the stream, read anew; for a look at them beside the training."""
        reader = _Reader(self, 0, 1)
        pairs: list[dict[str, Any]] = []
        while len(pairs) < number:
            pairs += reader.batch()[0]
        return pairs[:number]


class _Reader:
    """One of several that go through all rows; encodes its own."""

    def __init__(self, stream: PairStream, place: int, readers: int):
        self.stream, self.config = stream, stream.config
        self.rows_in_pass: int | None = None
        self.passes = 0
        self.left_out = 0
        self.rows = self._own_rows(place, readers)

    def _own_rows(self, place: int, readers: int) -> Iterator[tuple[Shard, int, Any]]:
        size = self.stream.batch_size
        position = 0
        for number in itertools.count():
            before = position
            for row in _rows_of_pass(self.stream.shards, self.config.seed, number, self.config.shuffle_buffer):
                if position // size % readers == place:
                    self.passes = number + 1
                    yield row
                position += 1
            self.rows_in_pass = position - before
            if not self.rows_in_pass:
                raise InputError(f"data: no rows in {', '.join(self.config.data)}. Expected at least one pair.")

    def skip(self, batches: int) -> None:
        """Pass over batches; encoded are only those whose end depends on what they hold."""
        if not may_leave_out(self.config):
            for _ in itertools.islice(self.rows, batches * self.stream.batch_size):
                pass
            return
        for _ in range(batches):
            self.batch()  # which rows are left out shows only in their tokens

    def batch(self) -> tuple[list[dict[str, Any]], StreamCounts]:
        """The next batch, full whatever is left out, and what happened to its rows."""
        batch: list[Any] = []
        counts = StreamCounts()
        while len(batch) < self.stream.batch_size:
            wanted = self.stream.batch_size - len(batch)
            pairs: list[PreferencePair] = []
            for shard, row, record in itertools.islice(self.rows, wanted):
                pair = self._pair(shard, row, record)
                if isinstance(pair, BadRow):
                    counts.add_bad_row(pair)
                else:
                    pairs.append(pair)
            kept = self._encoded(pairs, counts) if pairs else []
            batch += kept
            self._check_progress(len(kept), wanted, counts)
        counts.pairs, counts.passes = len(batch), self.passes
        return batch, counts

    def _pair(self, shard: Shard, row: int, record: Any) -> PreferencePair | BadRow:
        try:
            pair = pair_or_fault(record, shard.file, row, self.config.on_bad_row, columns=shard.columns)
        except BadRow as bad:
            raise BadRow(shard.label, bad.row, bad.reason, bad.kind) from None
        if isinstance(pair, BadRow):
            return BadRow(shard.label, pair.row, pair.reason, pair.kind)
        if shard.label != shard.file:
            pair = PreferencePair(**{**vars(pair), "file": shard.label})
        return pair

    def _encoded(self, pairs: list[PreferencePair], counts: StreamCounts) -> list[dict[str, Any]]:
        columns, bad_rows = encode_columns(
            {name: [getattr(pair, name) for pair in pairs] for name in FEATURES}, self.stream.tokenizer,
            max_length=self.config.max_length, overlong=self.config.overlong, on_bad_row=self.config.on_bad_row,
        )  # fmt: skip
        truncated = sum(columns.pop("truncated"))
        lost = partly_rendered(columns.pop("lost"))
        counts.num_partly_rendered += lost["n"]
        counts.partly_rendered = [*counts.partly_rendered, *lost["examples"]][:SHOWN_LOSSES]
        encoded = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        dropped = len(pairs) - len(encoded) - len(bad_rows)
        counts.truncated += truncated
        counts.dropped += dropped
        counts.overlong += truncated + dropped + sum(bad.kind == "overlong" for bad in bad_rows)
        for bad in bad_rows:
            counts.add_bad_row(bad)
        return encoded

    def _check_progress(self, kept: int, read: int, counts: StreamCounts) -> None:
        """Without this, data of which nothing can be used would be read for ever."""
        self.left_out = 0 if kept else self.left_out + read
        if self.rows_in_pass is not None and self.left_out >= self.rows_in_pass:
            shown = "; ".join(counts.bad_rows[:3]) or f"all are over max_length {self.config.max_length}"
            raise InputError(f"data: none of {self.left_out} rows can be used. {shown}")


def _rows_of_pass(
    shards: tuple[Shard, ...], seed: int, number: int, buffer_size: int
) -> Iterator[tuple[Shard, int, Any]]:
    """All rows once: shards in random order, each next row drawn from a buffer; decided by seed and pass."""
    generator = np.random.default_rng([seed, number])
    order = generator.permutation(len(shards)).tolist()
    rows = ((shards[place], row, record) for place in order for row, record in shards[place].open())
    buffer = list(itertools.islice(rows, buffer_size))
    draws = iter(lambda: generator.integers(buffer_size, size=1024).tolist(), None)
    for row, place in zip(rows, itertools.chain.from_iterable(draws), strict=False):
        yield buffer[place]
        buffer[place] = row
    for place in generator.permutation(len(buffer)).tolist():
        yield buffer[place]


class StreamingRewardTrainer(RewardTrainer):
    """A `RewardTrainer` on a `PairStream`; continues at the batch where a checkpoint was written."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.counts = StreamCounts()

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `RewardTrainer` does.

        Raises:
            InputError: bad data met on the way.
        """
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            stream: Any = self.train_dataset
            stream.skip_batches = checkpoint_step(folder) * self.args.gradient_accumulation_steps
            self.counts = StreamCounts(**json.loads(self._counts_file(folder).read_text(encoding="utf-8")))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """The stream's own batches: it divides rows among processes and workers itself.

        What accelerate would make of it lets the first process encode everything, or shards unevenly, or fills up the
        last batches with rows that were there before.
        """
        args = self.args
        stream: Any = self.train_dataset
        return DataLoader(
            stream, batch_size=None, collate_fn=_unchanged, num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory, prefetch_factor=args.dataloader_prefetch_factor,
        )  # fmt: skip

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Count, and train on the batch."""
        if "error" in inputs:
            raise inputs["error"]
        counts = inputs.pop("stream_counts")
        told, told_of_loss = len(self.counts.bad_rows), self.counts.num_partly_rendered
        self.counts.add(counts)
        if not told_of_loss:  # while there is time to stop; the number of all comes at the end
            lost = {"n": self.counts.num_partly_rendered, "examples": self.counts.partly_rendered}
            warn_of_loss(lost, self.counts.pairs, "pairs so far")
        for text in self.counts.bad_rows[told:_LOGGED_BAD_ROWS]:
            logger.warning("data: left out: %s", text)
        return super().training_step(model, send_to_device(inputs, self.args.device), num_items_in_batch)

    def _save_rng_state(self, output_dir: str) -> None:
        # The Trainer calls this in every process; what it saves beside is saved by the first one only.
        super()._save_rng_state(output_dir)
        write_json(self._counts_file(Path(output_dir)), asdict(self.counts))

    def _counts_file(self, folder: Path) -> Path:
        return folder / f"stream_counts_{self.args.process_index}.json"


def _unchanged(batch: Any) -> Any:
    return batch


def streaming_trainer(
    source: StreamSource, config: TrainingConfig, tokenizer: Any, options: dict[str, Any]
) -> StreamingRewardTrainer:
    """The trainer of a streaming run; ``options`` are the arguments of a `RewardTrainer`."""
    args = options["args"]
    stream = PairStream(
        source.shards, config, tokenizer, batch_size=args.train_batch_size, collate=options["data_collator"],
        process_index=args.process_index, num_processes=args.world_size,
    )  # fmt: skip
    return StreamingRewardTrainer(**{**options, "train_dataset": stream})


def stream_counts(trainer: RewardTrainer) -> dict[str, Any]:
    """The counts of a streaming run, summed over processes; all of them must call it."""
    assert isinstance(trainer, StreamingRewardTrainer)
    total = StreamCounts()
    for counts in gather_object([trainer.counts]):
        total.add(counts)
    if total.num_bad_rows or total.overlong or total.num_partly_rendered:
        logger.warning("data: %s", asdict(total))
    return asdict(total)
