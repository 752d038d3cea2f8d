"""The preference pairs that an evaluation is asked for, with a record of what was read and left out."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from inform_rm.columns import log_reading
from inform_rm.errors import InputError
from inform_rm.preferences import load_preferences
from inform_rm.records import parse_source

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationSource:
    """One source of pairs.

    Attributes:
        pairs: columns as in `inform_rm.preferences.FEATURES`; a random subset if one was asked for.
        record: ``source``, whether that ``is_local``, ``fingerprint``, the counts ``pairs_read``, ``not_sampled`` and
            ``bad_rows``, the reasons of bad rows where there are any, and how the columns were read.
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
            "bad_rows": len(loaded.bad_rows),
            "reading": loaded.reading.to_dict(),
        }
        log_reading(str(source), loaded.reading)
        if loaded.bad_rows:
            record["bad_row_reasons"] = [str(row) for row in loaded.bad_rows]
        found.append(EvaluationSource(pairs, record))
    return found


def warn_of_left_out(record: dict[str, Any]) -> None:
    """One log line for a source of which something was cut or left out."""
    left_out = {name: record[name] for name in ("dropped", "truncated", "bad_rows") if record.get(name)}
    if left_out:
        logger.warning("%s: %s", record["source"], ", ".join(f"{name} {count}" for name, count in left_out.items()))
