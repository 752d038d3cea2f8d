"""What the reports of pairs and of scored responses in `check_data` have in common: hashes, quantiles, bad rows."""

import hashlib
import json
from collections import Counter
from typing import Any

import numpy as np

from inform_rm.data.preferences import PreferenceData

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
# Row numbers and texts shown of a finding that many rows have in common.
SHOWN_EXAMPLES = 5
BATCH_ROWS = 256


def content_hash(content: Any) -> int:
    """64 bits of what JSON can hold."""
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def repeated_and_conflicting(digest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each row repeats an earlier one, and whether it has a twin with another label, ``(N,)`` of bool.

    Args:
        digest: ``(N, 3)`` hashes; the second column is of all that counts of a row, the third without its label.
    """
    _, whole, unlabelled = digest.T
    _, first, number = np.unique(whole, return_index=True, return_inverse=True)
    _, first_of_group, group = np.unique(unlabelled, return_index=True, return_inverse=True)
    is_other = whole != whole[first_of_group][group]
    return first[number] != np.arange(len(digest)), np.isin(group, group[is_other])


def counted_rows(data: PreferenceData, is_meant: np.ndarray) -> dict[str, Any]:
    """How many rows are meant, and the numbers of the first ones."""
    indices = np.flatnonzero(is_meant)
    return {"n": len(indices), "examples": data.dataset.select(indices[:SHOWN_EXAMPLES])["row"][:]}


def quantiles(values: np.ndarray) -> dict[str, float]:
    """Mean and `QUANTILES`, to one decimal."""
    found = zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)
    named = {"mean": values.mean()} | {f"{quantile:.0%}": value for quantile, value in found}
    return {name: round(float(value), 1) for name, value in named.items()}


def how_it_was_read(data: PreferenceData) -> dict[str, Any]:
    """Fingerprint, columns and bad rows of a source."""
    kinds = Counter(bad.kind for bad in data.bad_rows)
    return {
        "fingerprint": data.fingerprint,
        "reading": data.reading.to_dict(),
        "bad_rows": {
            "n": len(data.bad_rows),
            "by_kind": dict(sorted(kinds.items())),
            "rows": [{"row": bad.row, "kind": bad.kind, "reason": bad.reason} for bad in data.bad_rows],
        },
    }
