"""Scoring a file of prompt/response rows of any length, so that a killed run goes on where it stopped."""

import json
import os
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from inform_rm.columns import Reading, log_reading
from inform_rm.errors import InputError
from inform_rm.files import check_output_directory, file_digest
from inform_rm.journal import RewardJournal, drop_torn_line, shortest_float
from inform_rm.processes import from_main, is_main_process
from inform_rm.score_rows import ScoreRow, read_score_rows
from inform_rm.scoring import NonFiniteRewardError, RewardScorer


def score_file(
    scorer: RewardScorer,
    input: str | Path,
    output: str | Path,
    uncertainty: int | None = None,
    chunk_rows: int = 2048,
    progress: bool = True,
    columns: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Score the ``prompt`` / ``response`` rows of a file of any length into JSON Lines, in input order.

    Each output row is the input row with ``reward`` (and ``reward_std``) added. Memory holds one chunk of rows. A
    first pass checks every row before the model runs. Finished rows wait in ``OUTPUT.partial`` and the batches of
    the chunk under way in ``OUTPUT.partial.journal``; after a kill the same call goes on from there, and it refuses
    if the input, the model or a setting has changed. ``OUTPUT`` appears whole at the end. With a scorer that splits
    its work over processes, all of them read the input and the main one writes.

    Args:
        scorer: the model.
        input: JSONL(.gz), CSV or Parquet; ``prompt`` is text or, except in CSV, a list of messages.
        output: name of the JSON Lines file to write.
        uncertainty: see `RewardScorer.score`.
        chunk_rows: rows held in memory and sorted by length together.
        progress: show a progress bar.
        columns: which columns are prompt, response, system and history: see `inform_rm.columns.Columns.of`.

    Returns:
        ``{"output", "rows", "resumed_rows"}``: rows written, and how many of them an earlier call had computed.

    Raises:
        InputError: on a bad row (named), an input without rows, or an unfinished run with other settings.
        NonFiniteRewardError: if the model gives NaN or infinity.
    """
    input, output = Path(input), Path(output)
    scorer.check_uncertainty(uncertainty)
    check_output_directory(output.parent)
    if output.is_dir():
        raise InputError(f"output: {output} is a folder; expected the name of a .jsonl file.")
    if output.suffix != ".jsonl":
        raise InputError(f"output: {output} must end in .jsonl; rewards are written as JSON Lines.")
    if output.exists() and input.exists() and output.samefile(input):
        raise InputError(f"output: {output} is the input. Choose another name.")
    reading = Reading()
    num_rows = sum(1 for _ in read_score_rows(input, columns, reading))
    if not num_rows:
        raise InputError(f"input: {input} has no rows. Each row needs prompt and response.")
    log_reading(str(input), reading)
    identity = {
        **scorer.identity(),
        "input": file_digest(input),
        "columns": None if columns is None else dict(columns),
        "uncertainty": uncertainty,
        "max_length": scorer.max_length,
    }
    partial = output.with_name(output.name + ".partial")
    journal_path = output.with_name(output.name + ".partial.journal")
    shared = scorer.split_over_processes
    writes = not shared or is_main_process()

    def finished_rows() -> int:
        if partial.exists() and not journal_path.exists():
            raise InputError(f"{partial} is not the record of an unfinished run. Delete it or choose another output.")
        if not partial.exists():
            return 0
        drop_torn_line(partial)
        with partial.open("rb") as file:
            return sum(1 for _ in file)

    first = from_main(finished_rows) if shared else finished_rows()
    journal = RewardJournal(journal_path, identity, shared)
    try:
        earlier = {row: (reward, std) for row, reward, std in journal.finished() if row >= first}
        resumed = first + len(earlier)
        rows = islice(read_score_rows(input, columns), first, None)
        with (
            partial.open("a", encoding="utf-8") if writes else open(os.devnull, "w") as file,
            tqdm(total=num_rows, initial=resumed, unit="row", desc="score", disable=not (progress and writes)) as bar,
        ):
            while chunk := list(islice(rows, chunk_rows)):
                scores = _score_chunk(scorer, chunk, first, earlier, uncertainty, journal, bar)
                for row, (reward, std) in zip(chunk, scores, strict=True):
                    result = {"reward": shortest_float(reward)}
                    if uncertainty is not None:
                        result["reward_std"] = shortest_float(std)
                    file.write(json.dumps({**row.fields, **result}, ensure_ascii=False) + "\n")
                if writes:
                    file.flush()
                    os.fsync(file.fileno())
                journal.clear()
                first, earlier = first + len(chunk), {}
        if writes:
            os.replace(partial, output)
        journal.delete()
    finally:
        journal.close()
    return {"output": str(output), "rows": num_rows, "resumed_rows": resumed}


def _score_chunk(
    scorer: RewardScorer,
    chunk: list[ScoreRow],
    first: int,
    earlier: dict[int, tuple[float, float]],
    uncertainty: int | None,
    journal: RewardJournal,
    bar: Any,
) -> list[tuple[float, float]]:
    """``(reward, reward_std)`` of each row of a chunk from row ``first`` on, those in ``earlier`` taken over."""
    scores = {row - first: score for row, score in earlier.items()}
    todo = [index for index in range(len(chunk)) if index not in scores]
    encoded = [scorer.encode(chunk[index].prompt, chunk[index].response, chunk[index].where) for index in todo]
    sequences, prompt_lengths = [row.input_ids for row in encoded], [len(row.prompt_ids) for row in encoded]
    try:
        for batch, rewards, stds in scorer.iter_scores(sequences, prompt_lengths, uncertainty):
            indices = [todo[place] for place in batch]
            std_values = None if stds is None else stds.tolist()
            journal.add([first + index for index in indices], rewards.tolist(), std_values)
            for index, reward, std in zip(indices, rewards.tolist(), std_values or rewards.tolist(), strict=True):
                scores[index] = (reward, std)
            bar.update(len(batch))
    except NonFiniteRewardError as error:
        index = todo[error.row]
        raise NonFiniteRewardError(first + index, error.value, chunk[index].where) from error
    return [scores[index] for index in range(len(chunk))]
