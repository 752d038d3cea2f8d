"""The preference pairs that an evaluation is asked for, with a record of what was read and left out."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from inform_rm.data.columns import log_reading
from inform_rm.data.encoding import encode_columns, none_usable
from inform_rm.data.pairs import BadRow
from inform_rm.data.preferences import load_preferences
from inform_rm.data.rendered_text import add_partly_rendered, partly_rendered, warn_of_loss
from inform_rm.data.sources import parse_source
from inform_rm.errors import InputError
from inform_rm.scoring.scorer import RewardScorer

logger = logging.getLogger(__name__)

_CHECKED_AT_ONCE = 256


@dataclass(frozen=True)
class EvaluationSource:
    """One source of pairs.

    Attributes:
        pairs: columns as in `inform_rm.data.preferences.FEATURES`; a random subset if one was asked for.
        record: ``source``, whether that ``is_local``, ``fingerprint``, the counts ``pairs_read``, ``not_sampled`` and
            ``bad_rows``, the ``bad_row_reasons`` where there are any, and the ``reading`` of the columns. Rows that
            cannot be encoded join them later.
    """

    pairs: Dataset
    record: dict[str, Any]


def load_sources(
    data: str | Path | Sequence[str | Path],
    *,
    columns: Mapping[str, str] | None,
    revision: str | None,
    on_bad_row: str,
    max_pairs: int | None,
    seed: int,
) -> list[EvaluationSource]:
    """Read every source, and draw ``max_pairs`` of its pairs with ``seed`` where it has more.

    Raises:
        InputError: no source, a wrong ``max_pairs``, or bad data.
    """
    sources = [data] if isinstance(data, str | Path) else list(data)
    if not sources:
        raise InputError("data: expected at least one source of preference pairs.")
    if max_pairs is not None and (isinstance(max_pairs, bool) or not isinstance(max_pairs, int) or max_pairs < 1):
        raise InputError(f"max_pairs: {max_pairs!r}; expected a whole number of at least 1.")
    found = []
    for source in sources:
        loaded = load_preferences(source, columns=columns, revision=revision, on_bad_row=on_bad_row)
        pairs = loaded.dataset
        if max_pairs is not None and len(pairs) > max_pairs:
            pairs = pairs.shuffle(seed=seed).select(range(max_pairs))
        record = {
            "source": str(source),
            "is_local": Path(parse_source(source).name).exists(),
            "fingerprint": loaded.fingerprint,
            "pairs_read": len(loaded.dataset),
            "not_sampled": len(loaded.dataset) - len(pairs),
            "bad_rows": 0,
            "reading": loaded.reading.to_dict(),
        }
        log_reading(str(source), loaded.reading)
        add_bad_rows(record, loaded.bad_rows)
        found.append(EvaluationSource(pairs, record))
    return found


def add_bad_rows(record: dict[str, Any], bad_rows: Sequence[BadRow], most_reasons: int | None = None) -> None:
    """Count and list rows that were left out in the record of their source."""
    record["bad_rows"] += len(bad_rows)
    if bad_rows:
        reasons = [*record.get("bad_row_reasons", ()), *map(str, bad_rows)]
        record["bad_row_reasons"] = reasons[:most_reasons]


def leave_out_bad_rows(source: EvaluationSource, scorer: RewardScorer, overlong: str, on_bad_row: str) -> Dataset:
    """The pairs without the bad rows of `inform_rm.data.encoding.encode_pairs`, which join the source's record.

    The pairs of which the chat template deletes text join it too, as ``partly_rendered``, and are logged.

    Raises:
        BadRow: the first bad row, under ``on_bad_row="error"``.
        InputError: no pair is left.
    """
    good: list[int] = []
    bad_rows: list[BadRow] = []
    lost = partly_rendered([])
    places = source.pairs.add_column("place", np.arange(len(source.pairs)))
    for batch in places.iter(_CHECKED_AT_ONCE):
        # A pair over the limit under "drop" is no bad row: it stays, for its prompt and its count.
        max_length = None if overlong == "drop" else scorer.max_length
        options: dict[str, Any] = {"max_length": max_length, "overlong": overlong, "on_bad_row": on_bad_row}
        columns, bad = encode_columns(batch, scorer.tokenizer, kept=("place",), **options)
        good += columns["place"]
        bad_rows += bad
        add_partly_rendered(lost, partly_rendered(columns["lost"]))
    add_bad_rows(source.record, bad_rows)
    source.record["partly_rendered"] = lost
    warn_of_loss(lost, len(good))
    if not good:
        raise none_usable(len(source.pairs), bad_rows)
    return source.pairs.select(good) if bad_rows else source.pairs


def warn_of_left_out(record: dict[str, Any]) -> None:
    """One log line for a source of which something was cut or left out."""
    left_out = {name: record[name] for name in ("dropped", "truncated", "bad_rows") if record.get(name)}
    if left_out:
        logger.warning("%s: %s", record["source"], ", ".join(f"{name} {count}" for name, count in left_out.items()))
