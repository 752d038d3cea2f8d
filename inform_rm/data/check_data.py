"""What is in preference data and what would go wrong with it, before hours of training: `inform-rm check-data`."""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inform_rm.data.columns import lines_of
from inform_rm.data.encoding import TokenPair, check_max_length, encode_each, removable_prompt_tokens
from inform_rm.data.pairs import BadRow
from inform_rm.data.preferences import PreferenceData, load_preferences
from inform_rm.data.rendered_text import partly_rendered
from inform_rm.data.tokenizer import PLAIN_FORM, fix_date, load_tokenizer, with_plain_template
from inform_rm.errors import InputError
from inform_rm.safety.chat_templates import TEMPLATE_DATE, has_fixed_date
from inform_rm.util.files import check_output_directory, versions, write_json
from inform_rm.util.intervals import wilson_interval

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
_SHOWN_EXAMPLES = 5
_BATCH_ROWS = 256


def check_data(
    sources: str | Path | Sequence[str | Path],
    tokenizer: Any = None,
    max_length: int | None = None,
    *,
    chat_template: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    columns: Mapping[str, str] | None = None,
    data_revision: str | None = None,
) -> dict[str, Any]:
    """Report on preference data: rows, faults, label conflicts, overlap of sources, lengths, template audit.

    Args:
        sources: One or more sources as for `load_preferences`; give splits apart, so that overlap is seen.
        tokenizer: A tokenizer, or its folder or Hub id; None leaves out all token counts.
        max_length: Limit in tokens whose effect under every over-long policy is to be shown.
        chat_template: As for `load_tokenizer`.
        revision: Revision of the tokenizer.
        trust_remote_code: Run code that comes with the tokenizer.
        columns: Which columns are prompt, chosen, rejected, ...: see `Columns.of`.
        data_revision: Revision of Hub sources.

    Returns:
        JSON-ready report: ``sources`` (one report each), ``overlap`` (of every two sources), ``unusable_rows`` (at
        which training with default settings would stop), ``warnings``, settings and versions. What was not measured is
        absent.

    Raises:
        InputError: A source or tokenizer that cannot be read, or a source without any usable row.
    """
    names = [sources] if isinstance(sources, str | Path) else list(sources)
    if not names:
        raise InputError("data: got no source. Name at least one file, saved dataset or Hub id.")
    if len({str(name) for name in names}) < len(names):
        raise InputError(f"data: a source is named twice among {', '.join(map(str, names))}. Name each once.")
    check_max_length(max_length)
    if max_length is not None and tokenizer is None:
        raise InputError(f"max_length: {max_length} tokens cannot be checked without a tokenizer. Pass one.")
    tokenizer_name = tokenizer if isinstance(tokenizer, str | Path) else getattr(tokenizer, "name_or_path", None)
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(
            tokenizer, revision=revision, trust_remote_code=trust_remote_code, chat_template=chat_template
        )
    elif chat_template is not None:
        raise InputError("chat_template: set it on the tokenizer that you pass, or pass the tokenizer's folder.")
    elif tokenizer is not None:
        tokenizer = fix_date(tokenizer, str(tokenizer_name or "tokenizer"))

    has_template = tokenizer is None or tokenizer.chat_template is not None
    if not has_template:
        tokenizer = with_plain_template(tokenizer, str(tokenizer_name or "tokenizer"))  # as training does

    reports, digests = [], []
    for name in names:
        data = load_preferences(name, columns=columns, revision=data_revision, on_bad_row="skip")
        digest = _digests(data)
        report = {"source": str(name), **_content_report(data, digest)}
        if tokenizer is not None:
            report.update(_token_report(data, tokenizer, max_length))
        reports.append(report)
        digests.append(digest)
    result: dict[str, Any] = {
        "settings": {
            "tokenizer": None if tokenizer is None else str(tokenizer_name),
            "chat_template": chat_template,
            "max_length": max_length,
            "columns": None if columns is None else dict(columns),
        },
        "sources": reports,
        "overlap": _overlap(reports, digests),
        "versions": versions(),
    }
    if tokenizer is not None:
        result["tokenizer"] = {**_tokenizer_facts(tokenizer), "has_chat_template": has_template}
    result["unusable_rows"] = sum(
        report["bad_rows"]["n"] + report.get("tokens", {}).get("unusable", 0) for report in reports
    )
    result["warnings"] = _warnings(result)
    return result


def write_report(report: dict[str, Any], output_dir: str | Path | None) -> Path | None:
    """Write ``preflight.json`` (whole or not at all) to a folder and return its path; None writes nothing."""
    if output_dir is None:
        return None
    path = check_output_directory(output_dir) / "preflight.json"
    write_json(path, report)
    return path


def _digests(data: PreferenceData) -> dict[str, np.ndarray]:
    """64-bit hashes per row of the prompt, of the pair, and of the pair without its order; 24 bytes a row."""
    columns = {name: array("Q") for name in ("prompt", "pair", "unordered")}
    for batch in data.dataset.select_columns(["prompt", "chosen", "rejected"]).iter(_BATCH_ROWS):
        for prompt, chosen, rejected in zip(batch["prompt"], batch["chosen"], batch["rejected"], strict=True):
            columns["prompt"].append(_hash(prompt))
            columns["pair"].append(_hash([prompt, chosen, rejected]))
            columns["unordered"].append(_hash([prompt, *sorted((chosen, rejected))]))
    return {name: np.frombuffer(values, dtype=np.uint64) for name, values in columns.items()}


def _hash(content: Any) -> int:
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _content_report(data: PreferenceData, digest: dict[str, np.ndarray]) -> dict[str, Any]:
    dataset, n = data.dataset, len(data.dataset)
    characters = {name: array("q") for name in ("prompt", "chosen", "rejected")}
    subsets: Counter[str] = Counter()
    num_margins = num_multi_turn = 0
    for batch in dataset.iter(_BATCH_ROWS):
        characters["prompt"].extend(sum(len(turn["content"]) for turn in prompt) for prompt in batch["prompt"])
        characters["chosen"].extend(map(len, batch["chosen"]))
        characters["rejected"].extend(map(len, batch["rejected"]))
        subsets.update(batch["subset"])
        num_margins += sum(margin is not None for margin in batch["margin"])
        num_multi_turn += sum(len(prompt) > 1 for prompt in batch["prompt"])
    _, first, inverse = np.unique(digest["pair"], return_index=True, return_inverse=True)
    duplicates = np.flatnonzero(first[inverse] != np.arange(n))
    conflicts = _conflicting(digest)
    lengths = {name: np.frombuffer(values, dtype=np.int64) for name, values in characters.items()}
    kinds = Counter(bad.kind for bad in data.bad_rows)
    return {
        "rows": n + len(data.bad_rows),
        "pairs": n,
        "fingerprint": data.fingerprint,
        "reading": data.reading.to_dict(),
        "bad_rows": {
            "n": len(data.bad_rows),
            "by_kind": dict(sorted(kinds.items())),
            "rows": [{"row": bad.row, "kind": bad.kind, "reason": bad.reason} for bad in data.bad_rows],
        },
        "identical_sides": kinds["identical sides"],
        "duplicates": {"n": len(duplicates), "examples": _row_numbers(data, duplicates)},
        "conflicting_labels": {"n": len(conflicts), "examples": _row_numbers(data, conflicts)},
        "prompts": len(np.unique(digest["prompt"])),
        "multi_turn_prompts": num_multi_turn,
        "margins": num_margins,
        "subsets": dict(sorted(subsets.items())),
        "characters": {name: _quantiles(values) for name, values in lengths.items()},
        "chosen_longer_characters": _longer(lengths["chosen"], lengths["rejected"]),
    }


def _conflicting(digest: dict[str, np.ndarray]) -> np.ndarray:
    """Indices of rows whose prompt and responses also occur in the opposite order."""
    _, group = np.unique(digest["unordered"], return_inverse=True)
    _, order = np.unique(digest["pair"], return_inverse=True)
    orders_per_group = np.zeros(group.max() + 1, dtype=int)
    groups_of_orders = np.unique(np.stack([group, order], axis=1), axis=0)[:, 0]
    np.add.at(orders_per_group, groups_of_orders, 1)
    return np.flatnonzero(orders_per_group[group] > 1)


def _row_numbers(data: PreferenceData, indices: np.ndarray) -> list[int]:
    return [data.dataset[int(index)]["row"] for index in indices[:_SHOWN_EXAMPLES]]


def _quantiles(values: np.ndarray) -> dict[str, float]:
    found = np.quantile(values, QUANTILES)
    named = {f"{quantile:.0%}": round(float(value), 1) for quantile, value in zip(QUANTILES, found, strict=True)}
    return {"mean": round(float(values.mean()), 1), **named}


def _longer(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, Any]:
    """How often the chosen side is longer; `share` is the accuracy of "longer wins" with a tie as 0.5."""
    longer, equal, n = int((chosen > rejected).sum()), int((chosen == rejected).sum()), len(chosen)
    low, high = wilson_interval(longer + 0.5 * equal, n)
    return {
        "n": n,
        "longer": longer,
        "equal": equal,
        "shorter": n - longer - equal,
        "share": (longer + 0.5 * equal) / n,
        "interval": [low, high],
    }


def _token_report(data: PreferenceData, tokenizer: Any, max_length: int | None) -> dict[str, Any]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = [token for token in {*tokenizer.all_special_tokens, *added} if token]
    special_rows: list[int] = []
    counts = array("q")  # prompt, chosen, rejected, removable, whether identical: five numbers a pair
    faults: Counter[str] = Counter()
    refused: list[dict[str, Any]] = []
    losses: list[str | None] = []
    endings: Counter[tuple[int, ...]] = Counter()
    example: TokenPair | None = None
    for batch in data.dataset.iter(_BATCH_ROWS):
        for index, pair in enumerate(encode_each(tokenizer, batch)):
            if isinstance(pair, BadRow):
                refused.append({"row": pair.row, "reason": str(pair)})
                continue
            example = example or pair
            losses.append(pair.lost and f"row {batch['row'][index]}: {pair.lost}")
            _, removable = removable_prompt_tokens(pair, tokenizer.bos_token_id)
            both = (pair.chosen_ids, pair.rejected_ids)
            counts.extend((pair.prompt_length, *map(len, both), removable, both[0] == both[1]))
            bos, eos, unknown = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
            faults["starts_with_bos"] += bos is not None and all(ids[0] == bos for ids in both)
            faults["double_bos"] += bos is not None and any(ids[:2] == [bos, bos] for ids in both)
            faults["double_eos"] += eos is not None and any(ids[-2:] == [eos, eos] for ids in both)
            if unknown not in (None, bos, eos):
                faults["with_unknown_tokens"] += any(unknown in ids for ids in both)
            for ids in both:
                endings[_after_last(ids[pair.prompt_length :], eos)] += 1
            texts = [turn["content"] for turn in batch["prompt"][index]]
            texts += [batch["chosen"][index], batch["rejected"][index]]
            if any(token in text for text in texts for token in special):
                faults["special_tokens_in_text"] += 1
                special_rows += [batch["row"][index]] if len(special_rows) < _SHOWN_EXAMPLES else []
    if example is None:
        number = len(refused)
        return {
            "tokens": {
                "pairs": 0, "not_encodable": number, "not_encodable_examples": refused[:5], "unusable": number
            }
        }  # fmt: skip
    prompt, chosen, rejected, removable_tokens, identical = np.frombuffer(counts, dtype=np.int64).reshape(-1, 5).T
    longest = np.maximum(chosen, rejected)
    faults["identical_tokens"] = int(identical.sum())
    is_unusable = (identical > 0) | (max_length is not None and longest > max_length)
    report: dict[str, Any] = {
        "tokens": {
            "pairs": len(prompt),
            "not_encodable": len(refused),
            "not_encodable_examples": refused[:_SHOWN_EXAMPLES],
            "unusable": len(refused) + int(is_unusable.sum()),
            "prompt": _quantiles(prompt),
            "chosen": _quantiles(chosen - prompt),
            "rejected": _quantiles(rejected - prompt),
            "total": _quantiles(longest),
        },
        "chosen_longer_tokens": _longer(chosen, rejected),
        "template": {
            **{name: int(count) for name, count in sorted(faults.items())},
            "special_tokens_in_text": faults["special_tokens_in_text"],
            "special_tokens_in_text_rows": special_rows,
            "partly_rendered": partly_rendered(losses),
            "responses": sum(endings.values()),
            "endings": [
                {"ending": tokenizer.decode(ending), "ids": list(ending), "n": count}
                for ending, count in endings.most_common(_SHOWN_EXAMPLES)
            ],
            "example_chosen": tokenizer.decode(example.chosen_ids),
            "example_rejected_response": tokenizer.decode(example.rejected_ids[example.prompt_length :]),
            "example_last_ids": example.chosen_ids[-5:],
        },
    }
    if max_length is not None:
        report["max_length"] = _limit_report(longest, removable_tokens, max_length)
    return report


def _after_last(ids: list[int], end_id: int | None) -> tuple[int, ...]:
    """The end token and what follows it; empty when the response has no end token."""
    if end_id is None or end_id not in ids:
        return ()
    return tuple(ids[len(ids) - 1 - ids[::-1].index(end_id) :])


def _limit_report(longest: np.ndarray, removable: np.ndarray, max_length: int) -> dict[str, Any]:
    """What every over-long policy of `encode_pairs` would do."""
    excess = longest - max_length
    overlong = excess > 0
    impossible = overlong & (excess > removable)
    truncated = overlong & ~impossible
    return {
        "limit": max_length,
        "overlong": int(overlong.sum()),
        "error": {"stops": bool(overlong.any())},
        "drop": {"dropped": int(overlong.sum()), "left": int((~overlong).sum())},
        "truncate_prompt": {
            "truncated": int(truncated.sum()),
            "prompt_tokens_removed": int(excess[truncated].sum()),
            "response_too_long": int(impossible.sum()),
        },
    }


def _tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    return {
        "class": type(tokenizer).__name__,
        "size": len(tokenizer),
        "template_date": f"{TEMPLATE_DATE:%Y-%m-%d}" if has_fixed_date(tokenizer.chat_template) else None,
        **{name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")},
        "pad_is_eos": tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id,
    }


def _overlap(reports: list[dict[str, Any]], digests: list[dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    found = []
    for index, first in enumerate(digests):
        for other in range(index + 1, len(digests)):
            shared = np.intersect1d(first["prompt"], digests[other]["prompt"])
            found.append(
                {
                    "sources": [reports[index]["source"], reports[other]["source"]],
                    "shared_prompts": len(shared),
                    "shared_pairs": len(np.intersect1d(first["unordered"], digests[other]["unordered"])),
                    "rows_with_shared_prompt": [
                        int(np.isin(digest["prompt"], shared).sum()) for digest in (first, digests[other])
                    ],
                }
            )
    return found


def _warnings(result: dict[str, Any]) -> list[str]:
    """What someone should know before training on this, one sentence each."""
    found = []
    for report in result["sources"]:
        name, pairs = report["source"], report["pairs"]
        template, tokens = report.get("template", {}), report.get("tokens", {})
        without_end = sum(ending["n"] for ending in template.get("endings", []) if not ending["ids"])
        for count, text in (
            (report["bad_rows"]["n"], f"of {report['rows']} rows are bad: correct them or pass on_bad_row='skip'"),
            (report["duplicates"]["n"], "rows repeat an earlier pair"),
            (report["conflicting_labels"]["n"], "rows have a twin with the opposite label"),
            (tokens.get("not_encodable", 0), "pairs cannot be encoded; training would stop there"),
            (
                template.get("partly_rendered", {}).get("n", 0),
                "pairs lose text in the chat template, so that training would not read it: "
                + "; ".join(template.get("partly_rendered", {}).get("examples", [])),
            ),
            (
                template.get("identical_tokens", 0),
                "pairs have the same tokens on both sides; training would stop there",
            ),
            (template.get("double_bos", 0), "pairs start with two BOS tokens: the chat template repeats it"),
            (template.get("double_eos", 0), "pairs end with two end tokens: the text or the template repeats it"),
            (template.get("with_unknown_tokens", 0), "pairs hold unknown tokens: the tokenizer lost their text"),
            (
                template.get("special_tokens_in_text", 0),
                "pairs hold a special token's name in their text, which becomes that token: rows "
                + ", ".join(map(str, template.get("special_tokens_in_text_rows", []))),
            ),
            (without_end, "responses hold no end token"),
            (report.get("max_length", {}).get("overlong", 0), "pairs are over max_length"),
        ):
            if count:
                found.append(f"{name}: {count:,} {text}.")
        low, high = report["chosen_longer_characters"]["interval"]
        if pairs >= 30 and not low <= 0.5 <= high:
            share = report["chosen_longer_characters"]["share"]
            found.append(f"{name}: length and label are related: the longer response is chosen in {share:.1%}.")
    for overlap in result["overlap"]:
        if overlap["shared_prompts"]:
            first, second = overlap["sources"]
            found.append(f"{first} and {second} share {overlap['shared_prompts']:,} prompts: not train and test.")
    if not result.get("tokenizer", {}).get("has_chat_template", True):
        found.append(
            f"the tokenizer has no chat template: this shows the plain one, {PLAIN_FORM!r}, which training uses; a "
            "trained model without template is scored with nothing between prompt and response."
        )
    if result.get("tokenizer", {}).get("pad_is_eos"):
        found.append("the pad token is the end token: harmless here (masks decide), wrong where ids decide.")
    return found


def format_report(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    lines: list[str] = []
    for source in report["sources"]:
        lines += _format_source(source)
    overlaps = [overlap for overlap in report["overlap"] if overlap["shared_prompts"]]
    if report["overlap"] and not overlaps:
        lines.append("Overlap of sources: none")
    for overlap in overlaps:
        rows = " and ".join(f"{count:,}" for count in overlap["rows_with_shared_prompt"])
        lines.append(
            f"Overlap of {' and '.join(overlap['sources'])}: {overlap['shared_prompts']:,} prompts ({rows} rows), "
            f"{overlap['shared_pairs']:,} pairs"
        )
    if "tokenizer" in report:
        facts = ", ".join(f"{name} {value!r}" for name, value in report["tokenizer"].items())
        lines.append(f"Tokenizer {report['settings']['tokenizer']}: {facts}")
    if report["unusable_rows"]:
        lines.append(f"Rows that training with default settings would stop at: {report['unusable_rows']:,}")
    lines.append(f"Warnings: {len(report['warnings']) or 'none'}")
    lines += [f"  - {warning}" for warning in report["warnings"]]
    return "\n".join(lines)


def _format_source(source: dict[str, Any]) -> list[str]:
    bad, longer = source["bad_rows"], source["chosen_longer_characters"]
    lines = [
        source["source"],
        f"  rows {source['rows']:,}, usable pairs {source['pairs']:,}, bad rows {bad['n']:,}",
        *(f"    row {row['row']}: {row['reason']}" for row in bad["rows"][:_SHOWN_EXAMPLES]),
        *([f"    ... and {bad['n'] - _SHOWN_EXAMPLES:,} more"] if bad["n"] > _SHOWN_EXAMPLES else []),
        *(f"  {line}" for line in lines_of(source["reading"], source["rows"])),
        f"  prompts {source['prompts']:,}, with several turns {source['multi_turn_prompts']:,}, "
        f"margins {source['margins']:,}, subsets {len(source['subsets']):,}",
    ]
    for name in ("duplicates", "conflicting_labels"):
        rows = f", e.g. rows {', '.join(map(str, source[name]['examples']))}" if source[name]["n"] else ""
        lines.append(f"  {name.replace('_', ' ')} {source[name]['n']:,}{rows}")
    lines.append(f"  identical sides {source['identical_sides']:,}")
    low, high = longer["interval"]
    lines.append(
        f"  chosen longer {longer['longer']:,}, equal {longer['equal']:,}, shorter {longer['shorter']:,}: longer wins "
        f"{longer['share']:.1%} (n {longer['n']:,}, 95 % interval {low:.1%} to {high:.1%}, tie 0.5)"
    )
    for unit in ("characters", "tokens"):
        table = {name: value for name, value in source.get(unit, {}).items() if isinstance(value, dict)}
        for number, (name, quantiles) in enumerate(table.items()):
            if number == 0:
                lines.append(f"  {unit:<11}" + "".join(f"{column:>9}" for column in quantiles))
            lines.append(f"    {name:<9}" + "".join(f"{value:>9,.0f}" for value in quantiles.values()))
    if "max_length" in source:
        limit, cut = source["max_length"], source["max_length"]["truncate_prompt"]
        lines += [
            f"  max_length {limit['limit']:,}: {limit['overlong']:,} pairs over it",
            f"    error: {'stops at the first' if limit['error']['stops'] else 'nothing to stop for'}",
            f"    drop: {limit['drop']['dropped']:,} dropped, {limit['drop']['left']:,} left",
            f"    truncate_prompt: {cut['truncated']:,} cut ({cut['prompt_tokens_removed']:,} prompt tokens), "
            f"{cut['response_too_long']:,} with a response too long alone (error)",
        ]
    tokens = source.get("tokens", {})
    if tokens.get("not_encodable"):
        lines.append(f"  not encodable {tokens['not_encodable']:,}")
        lines += [f"    row {row['row']}: {row['reason']}" for row in tokens["not_encodable_examples"]]
    template = source.get("template")
    if template:
        lost = template["partly_rendered"]
        if lost["n"]:
            lines.append(f"  pairs that lose text in the chat template {lost['n']:,}")
            lines += [f"    {example}" for example in lost["examples"]]
        audit = ("starts_with_bos", "double_bos", "double_eos", "with_unknown_tokens", "special_tokens_in_text")
        lines.append(
            "  template: " + ", ".join(f"{name.replace('_', ' ')} {template.get(name, 0):,}" for name in audit)
        )
        lines += [
            f"    {ending['n']:,} of {template['responses']:,} responses end with "
            + (f"{ending['ending']!r} {ending['ids']}" if ending["ids"] else "no end token")
            for ending in template["endings"]
        ]
        lines += ["  chosen side of the first pair, as the model reads it:"]
        lines += [f"    | {line}" for line in template["example_chosen"].split("\n")]
    return lines
