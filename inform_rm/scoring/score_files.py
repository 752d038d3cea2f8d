"""Scoring a file of prompt/response rows of any length, so that a killed run goes on where it stopped."""

import functools
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from inform_rm.data.columns import Reading, log_reading
from inform_rm.data.encoding import BAD_ROW_POLICIES, Encoded
from inform_rm.data.rendered_text import add_not_as_written, not_as_written, warn_of_text
from inform_rm.data.response_rows import RowFault, ScoreRow, score_rows_or_faults
from inform_rm.data.sources import Source, source_label
from inform_rm.errors import InputError, check_choice
from inform_rm.scoring.scorer import NonFiniteRewardError, RewardScorer, as_scorer
from inform_rm.util.files import check_output_directory
from inform_rm.util.journal import RewardJournal, shortest_float
from inform_rm.util.processes import is_main_process

_SHOWN_FAULTS = 5
_LOW_BITS = (1 << 64) - 1

Row = tuple[ScoreRow, Encoded] | RowFault


def score_file(
    scorer: str | Path | torch.nn.Module | RewardScorer,
    input: Source,
    output: str | Path,
    uncertainty: int | None = None,
    chunk_rows: int = 2048,
    progress: bool = True,
    on_bad_row: str = "error",
    columns: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Score ``prompt`` / ``response`` rows, of a file of any length or in memory, into JSON Lines, in input order.

    Each output row is the input row with ``reward`` (and ``reward_std``) added. Memory holds one chunk of rows, and of
    an earlier call's rewards 24 bytes each. All faults are reported at once, before the model runs. Finished rewards
    wait in ``OUTPUT.partial`` under a digest of their row's token ids; after a kill the same call takes them up, also
    on an input that was mended. It refuses if model, tokenizer, dtype or ``uncertainty`` has changed. ``OUTPUT``
    appears whole at the end. With several processes all read the input and the main one writes.

    Args:
        scorer: the model: a `RewardScorer`, or what it takes where its defaults will do.
        input: JSONL(.gz), CSV or Parquet, or rows in memory (see `inform_rm.data.sources.open_parts`); ``prompt`` is
            text or, except in CSV, a list of messages.
        output: name of the JSON Lines file to write.
        uncertainty: see `RewardScorer.score`.
        chunk_rows: rows held in memory and sorted by length together.
        progress: show a progress bar.
        on_bad_row: ``"error"`` refuses an input with rows that cannot be scored; ``"skip"`` writes such a row with
            ``"reward": null`` and what is wrong with it in ``error``.
        columns: which columns are prompt, response, system and history: see `inform_rm.data.columns.Columns.of`.

    Returns:
        ``{"output", "rows", "resumed_rows", "bad_rows", "not_as_written"}``: rows written, how many of them have a
        reward that an earlier call had computed, how many have none, and how many are not read as they stand
        (``n`` and up to 5 ``examples``).

    Raises:
        InputError: on bad rows (their number, and the first ones by name), an input without a row that can be scored,
            or an unfinished run with another model or setting.
        NonFiniteRewardError: if the model gives NaN or infinity.
    """
    output, name = Path(output), source_label(input)
    scorer = as_scorer(scorer, None, {})
    scorer.check_uncertainty(uncertainty)
    check_choice("on_bad_row", on_bad_row, BAD_ROW_POLICIES)
    check_output_directory(output.parent)
    if output.is_dir():
        raise InputError(f"output: {output} is a folder; expected the name of a .jsonl file.")
    if output.suffix != ".jsonl":
        raise InputError(f"output: {output} must end in .jsonl; rewards are written as JSON Lines.")
    if isinstance(input, str | Path) and output.exists() and Path(input).exists() and output.samefile(input):
        raise InputError(f"output: {output} is the input. Choose another name.")
    chunks = functools.partial(_encoded_chunks, scorer, input, chunk_rows, on_bad_row, columns)
    reading = Reading()
    num_rows, num_bad, lost = _check_all(chunks(reading), name, progress, on_bad_row)
    log_reading(name, reading)
    shared = scorer.split_over_processes
    writes = not shared or is_main_process()
    rows_path = output.with_name(output.name + ".partial.rows")
    identity = {**scorer.identity(), "uncertainty": uncertainty}
    journal = RewardJournal(output.with_name(output.name + ".partial"), identity, shared)
    try:
        finished = _FinishedRewards(journal.finished())
        resumed = 0
        with (
            rows_path.open("w", encoding="utf-8") if writes else open(os.devnull, "w") as file,
            tqdm(total=num_rows - num_bad, unit="row", desc="score", disable=not (progress and writes)) as bar,
        ):
            for chunk in chunks():
                good = [row for row in chunk if not isinstance(row, RowFault)]
                scores, num_finished = _score_chunk(scorer, good, finished, uncertainty, journal, bar)
                resumed += num_finished
                left = iter(scores)
                for row in chunk:
                    if isinstance(row, RowFault):
                        result = {**row.fields, "reward": None, "error": row.reason}
                    else:
                        reward, std = next(left)
                        result = {**row[0].fields, "reward": shortest_float(reward)}
                        if uncertainty is not None:
                            result["reward_std"] = shortest_float(std)
                    file.write(json.dumps(result, ensure_ascii=False) + "\n")
            file.flush()
            if writes:
                os.fsync(file.fileno())
        if writes:
            os.replace(rows_path, output)
        journal.delete()
    finally:
        journal.close()
        if writes:
            rows_path.unlink(missing_ok=True)
    warn_of_text(lost, num_rows - num_bad, "rows")
    return {
        "output": str(output), "rows": num_rows, "resumed_rows": resumed, "bad_rows": num_bad, "not_as_written": lost
    }  # fmt: skip


def _encoded_chunks(
    scorer: RewardScorer,
    input: Source,
    chunk_rows: int,
    on_bad_row: str,
    columns: Mapping[str, str] | None,
    reading: Reading | None = None,
) -> Iterator[list[Row]]:
    """All rows of the input in order, a chunk at a time, each with its token ids, or with its fault."""
    rows = score_rows_or_faults(input, columns, reading)
    while chunk := list(islice(rows, chunk_rows)):
        for place, row in enumerate(chunk):
            if on_bad_row == "skip" and isinstance(row, ScoreRow) and "error" in row.fields:
                reason = f"{row.where} has a field 'error' already, which is for the faults of bad rows. Rename it."
                chunk[place] = RowFault(row.fields, reason)
        yield encoded_or_faults(scorer, chunk)


def encoded_or_faults(scorer: RewardScorer, rows: Sequence[ScoreRow | RowFault]) -> list[Row]:
    """Rows with their token ids; those that cannot be encoded, or that the model cannot take, become faults."""
    good = [(row.prompt, row.response, row.where) for row in rows if isinstance(row, ScoreRow)]
    encoded = iter(scorer.encode_each(*zip(*good, strict=True)) if good else ())
    found: list[Row] = []
    for row in rows:
        if isinstance(row, RowFault):
            found.append(row)
        else:
            ids = next(encoded)
            found.append(RowFault(row.fields, str(ids)) if isinstance(ids, InputError) else (row, ids))
    return found


def _check_all(
    chunks: Iterator[list[Row]], name: str, progress: bool, on_bad_row: str
) -> tuple[int, int, dict[str, Any]]:
    """Number of rows, and of those that cannot be scored, and what of the others is not read as it stands."""
    num_rows = num_bad = 0
    first: list[str] = []
    lost = not_as_written([])
    with tqdm(unit="row", desc="check", disable=not (progress and is_main_process())) as bar:
        for chunk in chunks:
            reasons = [row.reason for row in chunk if isinstance(row, RowFault)]
            first = [*first, *reasons][:_SHOWN_FAULTS]
            good = [row for row in chunk if not isinstance(row, RowFault)]
            changed = [ids.not_as_written and f"{row.where}: {ids.not_as_written}" for row, ids in good]
            add_not_as_written(lost, not_as_written(changed))
            num_rows, num_bad = num_rows + len(chunk), num_bad + len(reasons)
            bar.update(len(chunk))
    if not num_rows:
        raise InputError(f"input: {name} has no rows. Each row needs prompt and response.")
    if num_bad == num_rows or (num_bad and on_bad_row == "error"):
        listed = " ".join(first) + (f" And {num_bad - len(first)} more." if num_bad > len(first) else "")
        way_out = "" if on_bad_row == "skip" else (
            " Mend or remove them; on_bad_row='skip' writes what is wrong with a row in place of its reward. Rewards "
            "that are finished are kept."
        )  # fmt: skip
        raise InputError(f"input: {num_bad} of {num_rows} rows cannot be scored. {listed}{way_out}")
    return num_rows, num_bad, lost


def _score_chunk(
    scorer: RewardScorer,
    rows: Sequence[tuple[ScoreRow, Encoded]],
    finished: "_FinishedRewards",
    uncertainty: int | None,
    journal: RewardJournal,
    bar: Any,
) -> tuple[list[tuple[float, float]], int]:
    """``(reward, reward_std)`` of each row of a chunk, and how many were finished before."""
    keys = [_key(encoded.input_ids) for _, encoded in rows]
    scores = finished.find(keys)
    num_finished = len(scores)
    bar.update(num_finished)
    todo = [place for place in range(len(rows)) if place not in scores]
    sequences = [rows[place][1].input_ids for place in todo]
    prompt_lengths = [len(rows[place][1].prompt_ids) for place in todo]
    try:
        for batch, rewards, stds in scorer.iter_scores(sequences, prompt_lengths, uncertainty):
            places, columns = [todo[number] for number in batch], [rewards.tolist()]
            if stds is not None:
                columns.append(stds.tolist())
            journal.add([keys[place] for place in places], *columns)
            scores |= dict(zip(places, zip(columns[0], columns[-1], strict=True), strict=True))
            bar.update(len(places))
    except NonFiniteRewardError as error:
        place = todo[error.row]
        raise NonFiniteRewardError(place, error.value, rows[place][0].where) from error
    return [scores[place] for place in range(len(rows))], num_finished


def _key(ids: Sequence[int]) -> int:
    """A number of 128 bits that stands for the token ids."""
    return int.from_bytes(hashlib.blake2b(array("q", ids).tobytes(), digest_size=16).digest(), "big")


class _FinishedRewards:
    """``(key, reward, reward_std)`` of an earlier call's rows, in 24 bytes each."""

    def __init__(self, entries: Iterable[tuple[int, float, float]]):
        halves = ((key >> 64 & _LOW_BITS, key & _LOW_BITS, reward, std) for key, reward, std in entries)
        rows = np.fromiter(halves, dtype=[("high", "u8"), ("low", "u8"), ("reward", "f4"), ("std", "f4")])
        self._rows = rows[np.argsort(rows["high"], kind="stable")]

    def find(self, keys: Sequence[int]) -> dict[int, tuple[float, float]]:
        """``(reward, reward_std)`` by the place in ``keys`` of those that are known."""
        if not len(self._rows):
            return {}
        wanted = np.array([key >> 64 for key in keys], dtype=np.uint64)
        rows = self._rows[np.searchsorted(self._rows["high"], wanted).clip(max=len(self._rows) - 1)].tolist()
        return {
            place: (reward, std)
            for place, (key, (high, low, reward, std)) in enumerate(zip(keys, rows, strict=True))
            if key == high << 64 | low
        }
