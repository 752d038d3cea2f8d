"""The preference pairs that an evaluation is asked for, with a record of what was read and left out."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from inform_rm.data.columns import log_reading
from inform_rm.data.encoding import EncodedPairs, encode_pairs
from inform_rm.data.pairs import BadRow
from inform_rm.data.preferences import load_preferences
from inform_rm.data.sources import Sources, parse_source, source_label, source_list
from inform_rm.errors import InputError
from inform_rm.eval.settings import PairSettings
from inform_rm.scoring.scorer import RewardScorer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationSource:
    """One source of pairs.

    Attributes:
        layout: one of `inform_rm.data.groups.LAYOUTS`.
        pairs: columns as in `inform_rm.data.preferences.FEATURES`, of other layouts as in `GROUP_FEATURES`; a random
            subset if one was asked for.
        record: ``source``, whether that ``is_local``, ``fingerprint``, the counts ``pairs_read``, ``not_sampled`` and
            ``bad_rows``, the ``bad_row_reasons`` where there are any, and the ``reading`` of the columns. Rows that
            cannot be encoded join them later.
    """

    pairs: Dataset
    record: dict[str, Any]
    layout: str = "pair"

    def encode(self, scorer: RewardScorer, settings: PairSettings, keep_text: bool = False) -> EncodedPairs:
        """The token ids of the pairs; bad rows and what the chat template deletes of the others join the record.

        With ``keep_text`` a pair over the limit stays under ``overlong="drop"``: its prompt is of use to others.
        """
        rules: dict[str, Any] = {
            "max_length": None if keep_text and settings.overlong == "drop" else scorer.max_length,
            "overlong": settings.overlong,
            "on_bad_row": settings.on_bad_row,
        }
        encoded = encode_pairs(self.pairs, scorer.tokenizer, keep_text=keep_text, **rules)
        add_bad_rows(self.record, encoded.bad_rows)
        self.record["not_as_written"] = encoded.counts["not_as_written"]
        return encoded


def load_sources(
    data: Sources, settings: PairSettings, layouts: tuple[str, ...] = ("pair",)
) -> list[EvaluationSource]:
    """Read every source, and draw ``max_pairs`` of its rows with ``seed`` where it has more; refuse other layouts."""
    sources = source_list(data)
    if not sources:
        raise InputError("data: expected at least one source of preference pairs.")
    if settings.score_weights is not None and "scored" not in layouts:
        raise InputError("score_weights: for scored responses, which are not read here. Leave it out.")
    found: list[EvaluationSource] = []
    for source in sources:
        loaded = load_preferences(
            source, columns=settings.columns, revision=settings.data_revision, on_bad_row=settings.on_bad_row,
            score_weights=settings.score_weights, layouts=layouts,
        )  # fmt: skip
        pairs = loaded.dataset
        if settings.max_pairs is not None and len(pairs) > settings.max_pairs:
            pairs = pairs.shuffle(seed=settings.seed).select(range(settings.max_pairs))
        is_named, name = isinstance(source, str | Path), source_label(source)
        if not is_named and len(sources) > 1:
            name += f" {len(found) + 1}"  # rows of results are told apart by the name of their source
        record = {
            "source": name,
            "is_local": not is_named or Path(parse_source(source).name).exists(),
            "fingerprint": loaded.fingerprint,
            "pairs_read" if loaded.layout == "pair" else "rows_read": len(loaded.dataset),
            "not_sampled": len(loaded.dataset) - len(pairs),
            "bad_rows": 0,
            "reading": loaded.reading.to_dict(),
        }
        log_reading(name, loaded.reading)
        add_bad_rows(record, loaded.bad_rows)
        found.append(EvaluationSource(pairs, record, loaded.layout))
    return found


def add_bad_rows(record: dict[str, Any], bad_rows: Sequence[BadRow], most_reasons: int | None = None) -> None:
    """Count and list rows that were left out in the record of their source."""
    record["bad_rows"] += len(bad_rows)
    if bad_rows:
        reasons = [*record.get("bad_row_reasons", ()), *map(str, bad_rows)]
        record["bad_row_reasons"] = reasons[:most_reasons]


def warn_of_left_out(record: dict[str, Any]) -> None:
    """One log line for a source of which something was cut or left out."""
    left_out = {name: record[name] for name in ("dropped", "truncated", "bad_rows") if record.get(name)}
    if left_out:
        logger.warning("%s: %s", record["source"], ", ".join(f"{name} {count}" for name, count in left_out.items()))
