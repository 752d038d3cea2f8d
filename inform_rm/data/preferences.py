"""A data set of preferences: a whole source read and checked, with what was left out and how it was read."""

import atexit
import functools
import hashlib
import itertools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Value

from inform_rm.data.columns import GROUP_FIELDS, Columns, Reading
from inform_rm.data.groups import (
    GROUP_FEATURES,
    ResponseGroup,
    check_score_weights,
    of_layout,
    parse_group,
    source_layout,
)
from inform_rm.data.pairs import LOOKED_AT_ROWS, BadRow, PreferencePair, parse_pair, row_or_fault, with_layout
from inform_rm.data.sources import Source, open_parts, parse_source, source_label, source_name
from inform_rm.errors import InputError, check_choice

logger = logging.getLogger(__name__)

FEATURES = Features(
    {
        "prompt": [{"role": Value("string"), "content": Value("string")}],
        "chosen": Value("string"),
        "rejected": Value("string"),
        "margin": Value("float64"),
        "subset": Value("string"),
        "id": Value("string"),
        "file": Value("string"),
        "row": Value("int64"),
    }
)

_BATCH_ROWS = 1000
_BATCH_CHARACTERS = 16_000_000  # keeps a batch far below the 2 GiB that Arrow's string columns can hold


@dataclass(frozen=True)
class PreferenceData:
    """A loaded source.

    Attributes:
        dataset: Columns as in `FEATURES`, of the other layouts as in `groups.GROUP_FEATURES`; stored on disk, so
            memory does not grow with the number of rows.
        bad_rows: The rows left out, empty unless ``on_bad_row="skip"``.
        fingerprint: SHA-256 of the rows' content in order; the same on every machine, whatever the format.
        reading: Which columns were read, and how.
        layout: What its rows are, one of `inform_rm.data.groups.LAYOUTS`: ``"pair"``, ``"ranking"`` or ``"scored"``.
    """

    dataset: Dataset
    bad_rows: list[BadRow]
    fingerprint: str
    reading: Reading
    layout: str = "pair"


def load_preferences(
    source: Source,
    *,
    columns: Columns | Mapping[str, str] | None = None,
    revision: str | None = None,
    on_bad_row: str = "error",
    score_weights: Mapping[str, float] | None = None,
    layouts: tuple[str, ...] | None = None,
) -> PreferenceData:
    """Read and check a whole source of preference pairs, rankings or scored responses, told by its first rows.

    Rows are streamed to an Arrow file in a fresh temporary folder (`TMPDIR` moves it) that is removed when the process
    ends, so memory stays bounded and a changed source is never answered from an old cache.

    Args:
        source: A JSON Lines, JSON or CSV file (also ``.gz``), a Parquet file, a folder of such files, a folder written
            by `Dataset.save_to_disk`, or a dataset id on the Hugging Face Hub; ``NAME[SPLIT]`` or
            ``NAME[CONFIG/SPLIT]`` for one split of a folder or Hub id, see `sources.parse_source`. Or rows in memory:
            a `Dataset`, a `DatasetDict` of one split, a list of dictionaries or a pandas table, whose rows without
            ``subset`` and ``id`` get ``default`` and ``default/ROW``.
        columns: Which columns are prompt, chosen, rejected, ...: see `Columns.of`.
        revision: Branch, tag or commit of a Hub id.
        on_bad_row: ``"error"`` stops at the first bad row, ``"skip"`` leaves bad rows out and returns them.
        score_weights: Of scored responses, columns whose weighted sum is the score.
        layouts: Those that the caller can use; ``None``: all.

    Raises:
        BadRow: The first bad row, under ``"error"``.
        InputError: A layout that the caller cannot use, missing, unreadable or empty source, unknown format, a wrong
            mapping of columns, or no usable row.
    """
    check_choice("on_bad_row", on_bad_row, ("error", "skip"))
    check_score_weights(score_weights)
    parts = open_parts(source, revision=revision)
    head = list(itertools.islice(parts[0][1], LOOKED_AT_ROWS))
    columns, label = Columns.of(columns, GROUP_FIELDS), source_label(source)
    layout = source_layout(head, columns)
    if layouts is not None and layout not in layouts:
        raise InputError(
            f"{label}: its rows are of the layout {layout!r}, where {' or '.join(layouts)} is needed. Rankings and "
            "scored responses are read by train (without streaming), evaluate and check-data."
        )
    own = of_layout(columns, layout)
    if others := sorted(columns.given.keys() - own.given.keys()):
        logger.warning("%s: rows of the layout %r; columns of %s not used.", label, layout, ", ".join(others))
    columns = with_layout(own, head) if layout == "pair" else own
    first = parts[0][0], itertools.chain(head, parts[0][1])
    name = source_name(parse_source(source).name) if isinstance(source, str | Path) else "default"
    bad_rows: list[BadRow] = []
    digest = hashlib.sha256()
    reading = Reading()
    parse: Any = parse_pair
    if layout != "pair":
        parse = functools.partial(parse_group, layout=layout, score_weights=score_weights)

    def rows() -> Iterable[PreferencePair | ResponseGroup]:
        for file, records in (first, *parts[1:]):
            part_name = name if len(parts) == 1 else f"{name}/{source_name(file)}"
            for row, record in records:
                read = row_or_fault(
                    parse, record, file, row, on_bad_row, name=part_name, columns=columns, reading=reading
                )
                if isinstance(read, BadRow):
                    bad_rows.append(read)
                elif len(parts) > 1 and read.subset == part_name:
                    yield replace(read, subset=name)
                else:
                    yield read

    dataset = _write_arrow(rows(), digest, FEATURES if layout == "pair" else GROUP_FEATURES)
    reading.check_given(columns, label)
    if not len(dataset):
        if bad_rows:
            first_of = {bad.reason: bad for bad in reversed(bad_rows)}  # one line for what all rows have in common
            shown = "; ".join(f"row {bad.row}: {bad.reason}" for bad in list(first_of.values())[-3:][::-1])
            raise InputError(f"{label}: none of its {len(bad_rows)} rows can be used. {shown}")
        raise InputError(f"{label}: no rows. Expected at least one preference pair.")
    return PreferenceData(dataset, bad_rows, digest.hexdigest(), reading, layout)


def _write_arrow(rows: Iterable[PreferencePair | ResponseGroup], digest: Any, features: Features) -> Dataset:
    path = str(Path(tempfile.mkdtemp(dir=_scratch_folder(os.getpid()))) / "pairs.arrow")
    schema, content_of = features.arrow_schema, [name for name in features if name not in ("file", "row")]
    batch: list[dict] = []
    characters = 0
    with pa.OSFile(path, "wb") as sink, pa.RecordBatchStreamWriter(sink, schema) as writer:

        def flush() -> None:
            if batch:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
                batch.clear()

        for row in rows:
            content = [getattr(row, name) for name in content_of]
            line = json.dumps(content, ensure_ascii=False, sort_keys=True) + "\n"
            digest.update(line.encode())
            batch.append(asdict(row))
            characters += len(line)
            if len(batch) >= _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
                flush()
                characters = 0
        flush()
    return Dataset.from_file(path)


@functools.cache
def _scratch_folder(process_id: int) -> str:
    """One folder per process, removed when that process (not a fork of it) ends."""
    folder = tempfile.mkdtemp(prefix="inform_rm_")

    def remove() -> None:
        if os.getpid() == process_id:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder
