"""What `check_data` counts in any rows, and what it says of rankings, through their pairs, and of scored responses."""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import stats

from inform_rm.data.encoding import TokenGroup, encode_groups, removable_prompt_tokens
from inform_rm.data.groups import pairs_of_rankings
from inform_rm.data.preferences import FEATURES, PreferenceData
from inform_rm.errors import InputError

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
# Row numbers and texts shown of a finding that many rows have in common.
SHOWN_EXAMPLES = 5
BATCH_ROWS = 256


def content_hash(content: Any) -> int:
    """64 bits of what JSON can hold."""
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def quantiles(values: np.ndarray) -> dict[str, float]:
    """Mean and `QUANTILES`, to one decimal."""
    found = zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)
    named = {"mean": values.mean()} | {f"{quantile:.0%}": value for quantile, value in found}
    return {name: round(float(value), 1) for name, value in named.items()}


def content_figures(
    data: PreferenceData, digest: np.ndarray, subsets: Counter[str], characters: dict[str, np.ndarray]
) -> dict[str, Any]:
    """What a source of any layout holds: rows and bad ones, how they were read, twins, prompts, subsets, lengths.

    ``digest`` ``(N, 3)`` are hashes of its rows: of the prompt, of all that counts, and of that without the label.
    """
    _, whole, unlabelled = digest.T
    _, first, number = np.unique(whole, return_index=True, return_inverse=True)
    _, first_of_group, group = np.unique(unlabelled, return_index=True, return_inverse=True)
    has_other_label = whole != whole[first_of_group][group]
    twins = {}
    for name, is_meant in (
        ("duplicates", first[number] != np.arange(len(digest))),
        ("conflicting_labels", np.isin(group, group[has_other_label])),
    ):
        rows = np.flatnonzero(is_meant)
        twins[name] = {"n": len(rows), "examples": data.dataset.select(rows[:SHOWN_EXAMPLES])["row"][:]}
    kinds = Counter(bad.kind for bad in data.bad_rows)
    return {
        "rows": len(digest) + len(data.bad_rows),
        "fingerprint": data.fingerprint,
        "reading": data.reading.to_dict(),
        "bad_rows": {
            "n": len(data.bad_rows),
            "by_kind": dict(sorted(kinds.items())),
            "rows": [{"row": bad.row, "kind": bad.kind, "reason": bad.reason} for bad in data.bad_rows],
        },
        **twins,
        "prompts": len(np.unique(digest[:, 0])),
        "subsets": dict(sorted(subsets.items())),
        "characters": {name: quantiles(lengths) for name, lengths in characters.items()},
    }


def pairs_and_counts(data: PreferenceData) -> tuple[PreferenceData, dict[str, Any]]:
    """A source of rankings as all its untied pairs; how many rankings, responses and tied pairs there are."""
    sizes: Counter[int] = Counter()
    num_possible = 0
    for batch in data.dataset.select_columns("labels").iter(BATCH_ROWS):
        for labels in batch["labels"]:
            sizes[len(labels)] += 1
            num_possible += len(labels) * (len(labels) - 1) // 2
    pairs = pairs_of_rankings(data.dataset, FEATURES)
    counts = {
        "layout": "ranking",
        "rows": len(data.dataset) + len(data.bad_rows),
        "rankings": len(data.dataset),
        "responses": sum(size * number for size, number in sizes.items()),
        "rankings_by_size": {str(size): number for size, number in sorted(sizes.items())},
        "tied_pairs": num_possible - len(pairs),
    }
    return replace(data, dataset=pairs), counts


def scored_report(data: PreferenceData, tokenizer: Any, max_length: int | None) -> tuple[dict[str, Any], np.ndarray]:
    """The report of a source of scored responses, and three hashes a row as of pairs; with tokens if asked."""
    hashes, lengths, scores = [], [], []
    subsets: Counter[str] = Counter()
    for batch in data.dataset.iter(BATCH_ROWS):
        for prompt, (response,), (score,) in zip(batch["prompt"], batch["responses"], batch["labels"], strict=True):
            hashes.append(
                (content_hash(prompt), content_hash([prompt, response, score]), content_hash([prompt, response]))
            )
            lengths.append((sum(len(turn["content"]) for turn in prompt), len(response)))
            scores.append(score)
        subsets.update(batch["subset"])
    digest, values = np.array(hashes, dtype=np.uint64), np.array(scores)
    prompts, responses = np.array(lengths).T
    report: dict[str, Any] = {
        "layout": "scored",
        "scored": len(values),
        **content_figures(data, digest, subsets, {"prompt": prompts, "response": responses}),
        "scores": quantiles(values),
    }
    if len(values) > 2 and np.ptp(values) and np.ptp(responses):
        report["score_length_correlation"] = float(stats.spearmanr(values, responses).statistic)
    if tokenizer is not None:
        report |= _tokens(data, tokenizer, max_length)
    return report, digest


def _tokens(data: PreferenceData, tokenizer: Any, max_length: int | None) -> dict[str, Any]:
    """Lengths in tokens, rows that cannot be encoded, and what a limit would do."""
    measured, refused = [], []
    for batch in data.dataset.iter(BATCH_ROWS):
        found = encode_groups(tokenizer, batch["prompt"], batch["responses"])
        for row, encoded in zip(batch["row"], found, strict=True):
            if isinstance(encoded, InputError):
                refused.append({"row": row, "reason": str(encoded)})
                continue
            group = TokenGroup([encoded[0].input_ids], len(encoded[0].prompt_ids))
            removable = removable_prompt_tokens(group, tokenizer.bos_token_id)[1]
            measured.append((len(encoded[0].prompt_ids), len(encoded[0].response_ids), removable))
    tokens: dict[str, Any] = {
        "scored": len(measured), "not_encodable": len(refused), "not_encodable_examples": refused[:SHOWN_EXAMPLES],
        "unusable": len(refused),
    }  # fmt: skip
    if not measured:
        return {"tokens": tokens}
    prompt, response, removable = np.array(measured).T
    total = prompt + response
    tokens |= {"prompt": quantiles(prompt), "response": quantiles(response), "total": quantiles(total)}
    if max_length is None:
        return {"tokens": tokens}
    overlong, too_long = int((total > max_length).sum()), int((total - removable > max_length).sum())
    tokens["unusable"] += overlong
    limit = {"limit": max_length, "overlong": overlong, "response_too_long": too_long}
    return {"tokens": tokens, "max_length": limit}


def scored_warnings(report: dict[str, Any]) -> list[str]:
    """What someone should know before training on scored responses."""
    counted = {
        f"of {report['rows']} rows are bad: correct them or pass on_bad_row='skip'": report["bad_rows"]["n"],
        "rows repeat an earlier one": report["duplicates"]["n"],
        "rows have the prompt and response of another row, with another score": report["conflicting_labels"]["n"],
        "responses cannot be encoded; training would stop there": report.get("tokens", {}).get("not_encodable"),
        "responses are over max_length": report.get("max_length", {}).get("overlong"),
    }
    found = [f"{report['source']}: {count:,} {text}." for text, count in counted.items() if count]
    correlation = report.get("score_length_correlation", 0.0)
    if report["scored"] >= 30 and abs(correlation) > 1.96 / np.sqrt(report["scored"] - 1):
        found.append(f"{report['source']}: score and length are related: Spearman's correlation is {correlation:.2f}.")
    return found
