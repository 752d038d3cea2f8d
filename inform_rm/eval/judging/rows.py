"""The responses that are judged, and which two belong together."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from inform_rm.data.columns import Reading, log_reading
from inform_rm.data.response_rows import RowFault, ScoreRow, score_rows_or_faults
from inform_rm.data.sources import Source, source_label
from inform_rm.errors import InputError

_LISTED = 1000


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt; ``key`` is equal for equal prompts."""

    own: ScoreRow
    baseline: ScoreRow
    key: str


def read_responses(
    source: Source, columns: Mapping[str, str] | None, on_bad_row: str
) -> tuple[list[ScoreRow], dict[str, Any]]:
    """The rows of a source, and how many could not be read and why; `InputError` unless they may be left out."""
    reading = Reading()
    read = list(score_rows_or_faults(source, columns, reading))
    log_reading(source_label(source), reading)
    reasons = [row.reason for row in read if isinstance(row, RowFault)]
    if reasons and on_bad_row == "error":
        raise InputError(f"{reasons[0]} (on_bad_row='skip' leaves bad rows out and lists them.)")
    rows = [row for row in read if isinstance(row, ScoreRow)]
    if not rows:
        raise InputError(f"{source_label(source)}: no responses{f' ({reasons[0]})' if reasons else ''}.")
    return rows, {"rows": len(read), "bad_rows": len(reasons), "bad_row_reasons": reasons[:_LISTED]}


def matched(own: list[ScoreRow], baseline: list[ScoreRow]) -> tuple[list[Pair], dict[str, Any]]:
    """The k-th response to a prompt with the k-th of the baseline to it; and those that have no partner."""
    others: dict[str, list[ScoreRow]] = defaultdict(list)
    for row in baseline:
        others[_key(row)].append(row)
    taken: dict[str, int] = defaultdict(int)
    pairs, alone = [], []
    for row in own:
        key = _key(row)
        if taken[key] < len(others[key]):
            pairs.append(Pair(row, others[key][taken[key]], key))
            taken[key] += 1
        else:
            alone.append(row.where)
    left = [row.where for key, rows in others.items() for row in rows[taken[key] :]]
    if not pairs:
        raise InputError(
            f"baseline: none of its {len(baseline)} responses is to a prompt of the {len(own)} others "
            f"({own[0].where}, {baseline[0].where}). Pass responses to the same prompts."
        )
    unpaired = {"responses": len(alone), "baseline": len(left), "examples": [*alone[:10], *left[:10]]}
    return pairs, unpaired


def _key(row: ScoreRow) -> str:
    return json.dumps(row.prompt, sort_keys=True)
