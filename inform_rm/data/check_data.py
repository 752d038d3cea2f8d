"""What is in preference data and what would go wrong with it, before hours of training: `inform-rm check-data`."""

import itertools
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inform_rm.data.check_groups import (
    BATCH_ROWS,
    SHOWN_EXAMPLES,
    content_figures,
    content_hash,
    pairs_and_counts,
    quantiles,
    scored_report,
    scored_warnings,
)
from inform_rm.data.encoding import TokenGroup, encode_each, removable_prompt_tokens
from inform_rm.data.pairs import BadRow
from inform_rm.data.preferences import PreferenceData, load_preferences
from inform_rm.data.rendered_text import not_as_written
from inform_rm.data.tokenizer import PLAIN_FORM, fix_date, load_tokenizer, with_plain_template
from inform_rm.errors import InputError, check_whole_number
from inform_rm.safety.chat_templates import TEMPLATE_DATE, has_fixed_date
from inform_rm.util.files import check_output_directory, versions, write_json
from inform_rm.util.intervals import wilson_interval

TOKEN_FAULTS = ("identical_tokens", "starts_with_bos", "double_bos", "double_eos", "with_unknown_tokens")


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
    score_weights: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Report on preference data: rows, faults, label conflicts, overlap of sources, lengths, template audit.

    Of rankings it is about all their untied pairs.

    Args:
        sources: One or more sources as for `load_preferences`; give splits apart, so that overlap is seen.
        tokenizer: A tokenizer, or its folder or Hub id; None leaves out all token counts.
        max_length: Limit in tokens whose effect under every over-long policy is to be shown.
        chat_template: As for `load_tokenizer`.
        revision: Revision of the tokenizer.
        trust_remote_code: Run code that comes with the tokenizer.
        columns: Which columns are prompt, chosen, rejected, ...: see `Columns.of`.
        data_revision: Revision of Hub sources.
        score_weights: Of scored responses, columns whose weighted sum is the score.

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
    if len(set(map(str, names))) < len(names):
        raise InputError(f"data: a source is named twice among {', '.join(map(str, names))}. Name each once.")
    if max_length is not None:
        check_whole_number("max_length", max_length)
        if tokenizer is None:
            raise InputError(f"max_length: {max_length} tokens cannot be checked without a tokenizer. Pass one.")
    tokenizer_name = tokenizer if isinstance(tokenizer, str | Path) else getattr(tokenizer, "name_or_path", None)
    if isinstance(tokenizer, str | Path):
        hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        tokenizer = load_tokenizer(tokenizer, chat_template=chat_template, **hub)
    elif chat_template is not None:
        raise InputError("chat_template: set it on the tokenizer that you pass, or pass the tokenizer's folder.")
    elif tokenizer is not None:
        tokenizer = fix_date(tokenizer, str(tokenizer_name or "tokenizer"))
    has_template = tokenizer is None or tokenizer.chat_template is not None
    if not has_template:
        tokenizer = with_plain_template(tokenizer, str(tokenizer_name or "tokenizer"))  # as training does

    reports, digests = [], []
    for name in names:
        data = load_preferences(
            name, columns=columns, revision=data_revision, on_bad_row="skip", score_weights=score_weights
        )
        if data.layout == "scored":
            report, digest = scored_report(data, tokenizer, max_length)
        else:
            data, counts = pairs_and_counts(data) if data.layout == "ranking" else (data, {})
            report, digest = _content_report(data)
            report |= counts
            if tokenizer is not None:
                report |= _token_report(data, tokenizer, max_length)
        reports.append({"source": str(name), **report})
        digests.append(digest)
    result: dict[str, Any] = {
        "settings": {
            "tokenizer": None if tokenizer is None else str(tokenizer_name),
            "chat_template": chat_template,
            "max_length": max_length,
            "columns": None if columns is None else dict(columns),
            **({} if score_weights is None else {"score_weights": dict(score_weights)}),
        },
        "sources": reports,
        "overlap": [
            _overlap([reports[one]["source"], reports[other]["source"]], digests[one], digests[other])
            for one, other in itertools.combinations(range(len(names)), 2)
        ],
        "versions": versions(),
        "unusable_rows": sum(
            report["bad_rows"]["n"] + report.get("tokens", {}).get("unusable", 0) for report in reports
        ),
    }
    if tokenizer is not None:
        result["tokenizer"] = {**_tokenizer_facts(tokenizer), "has_chat_template": has_template}
    result["warnings"] = _warnings(result)
    return result


def _tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    return {
        "class": type(tokenizer).__name__,
        "size": len(tokenizer),
        "template_date": f"{TEMPLATE_DATE:%Y-%m-%d}" if has_fixed_date(tokenizer.chat_template) else None,
        **{name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")},
        "pad_is_eos": tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id,
    }


def write_report(report: dict[str, Any], output_dir: str | Path | None) -> Path | None:
    """Write ``preflight.json`` (whole or not at all) to a folder and return its path; None writes nothing."""
    if output_dir is None:
        return None
    path = check_output_directory(output_dir) / "preflight.json"
    write_json(path, report)
    return path


def _content_report(data: PreferenceData) -> tuple[dict[str, Any], np.ndarray]:
    """What can be said without a tokenizer, and three 64-bit hashes a row: prompt, pair, pair without its order."""
    hashes, characters = array("Q"), array("q")  # three numbers a pair each
    subsets: Counter[str] = Counter()
    num_margins = num_multi_turn = 0
    for batch in data.dataset.iter(BATCH_ROWS):
        for prompt, *sides in zip(batch["prompt"], batch["chosen"], batch["rejected"], strict=True):
            hashes.extend(map(content_hash, (prompt, [prompt, *sides], [prompt, *sorted(sides)])))
            characters.extend((sum(len(turn["content"]) for turn in prompt), *map(len, sides)))
            num_multi_turn += len(prompt) > 1
        subsets.update(batch["subset"])
        num_margins += sum(margin is not None for margin in batch["margin"])
    digest = np.frombuffer(hashes, dtype=np.uint64).reshape(-1, 3)
    prompts, chosen, rejected = np.frombuffer(characters, dtype=np.int64).reshape(-1, 3).T
    report = {
        "pairs": len(digest),
        **content_figures(data, digest, subsets, {"prompt": prompts, "chosen": chosen, "rejected": rejected}),
        "identical_sides": sum(bad.kind == "identical sides" for bad in data.bad_rows),
        "multi_turn_prompts": num_multi_turn,
        "margins": num_margins,
        "chosen_longer_characters": _longer(chosen, rejected),
    }
    return report, digest


def _longer(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, Any]:
    """How often the chosen side is longer; `share` is the accuracy of "longer wins" with a tie as 0.5."""
    longer, equal, n = int((chosen > rejected).sum()), int((chosen == rejected).sum()), len(chosen)
    credit = longer + 0.5 * equal
    counts = {"n": n, "longer": longer, "equal": equal, "shorter": n - longer - equal}
    return {**counts, "share": credit / n, "interval": list(wilson_interval(credit, n))}


def _token_report(data: PreferenceData, tokenizer: Any, max_length: int | None) -> dict[str, Any]:
    measured = array("q")  # the numbers of `_measured`, pair after pair
    refused: list[dict[str, Any]] = []
    changed: list[str | None] = []
    endings: Counter[tuple[int, ...]] = Counter()
    example: TokenGroup | None = None
    # A ranking, of which training takes all pairs or none, counts once: its pairs, side by side, have one number.
    numbers, number, last = array("q"), -1, None
    unusable: set[int] = set()
    for batch in data.dataset.iter(BATCH_ROWS):
        for index, pair in enumerate(encode_each(tokenizer, batch)):
            place = batch["file"][index], batch["row"][index]
            number, last = number + (place != last), place
            if isinstance(pair, BadRow):
                unusable.add(number)
                refused.append({"row": pair.row, "reason": str(pair)})
                continue
            example = example or pair
            row = batch["row"][index]
            numbers.append(number)
            measured.extend(_measured(pair, tokenizer))
            endings.update(_ending(ids[pair.prompt_length :], tokenizer.eos_token_id) for ids in pair.ids)
            changed.append(pair.not_as_written and f"row {row}: {pair.not_as_written}")
    tokens: dict[str, Any] = {
        "pairs": len(changed), "not_encodable": len(refused), "not_encodable_examples": refused[:SHOWN_EXAMPLES],
        "unusable": len(unusable),
    }  # fmt: skip
    if example is None:
        return {"tokens": tokens}
    columns = np.frombuffer(measured, dtype=np.int64).reshape(len(changed), -1).T
    prompt, chosen, rejected, removable, *faults = columns
    longest = np.maximum(chosen, rejected)
    is_unusable = (faults[0] > 0) | (longest > (longest.max() if max_length is None else max_length))
    tokens["unusable"] = len(unusable.union(np.frombuffer(numbers, dtype=np.int64)[is_unusable].tolist()))
    lengths = {"prompt": prompt, "chosen": chosen - prompt, "rejected": rejected - prompt, "total": longest}
    report: dict[str, Any] = {
        "tokens": tokens | {name: quantiles(values) for name, values in lengths.items()},
        "chosen_longer_tokens": _longer(chosen, rejected),
        "template": {
            **{name: int(found.sum()) for name, found in zip(TOKEN_FAULTS, faults, strict=False)},
            "not_as_written": not_as_written(changed),
            "responses": sum(endings.values()),
            "endings": [
                {"ending": tokenizer.decode(ending), "ids": list(ending), "n": count}
                for ending, count in endings.most_common(SHOWN_EXAMPLES)
            ],
            "example_chosen": tokenizer.decode(example.ids[0]),
            "example_rejected_response": tokenizer.decode(example.ids[1][example.prompt_length :]),
            "example_last_ids": example.ids[0][-5:],
        },
    }
    if max_length is not None:
        report["max_length"] = _limit_report(longest, removable, max_length)
    return report


def _measured(pair: TokenGroup, tokenizer: Any) -> list[int]:
    """Tokens of prompt and sides, prompt tokens that may go, and `TOKEN_FAULTS`; the last only if there is <unk>."""
    both = pair.ids
    bos, eos, unknown = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
    numbers = [pair.prompt_length, *map(len, both), removable_prompt_tokens(pair, bos)[1], both[0] == both[1]]
    numbers.append(bos is not None and all(ids[0] == bos for ids in both))
    numbers.append(bos is not None and any(ids[:2] == [bos, bos] for ids in both))
    numbers.append(eos is not None and any(ids[-2:] == [eos, eos] for ids in both))
    return numbers if unknown in (None, bos, eos) else [*numbers, any(unknown in ids for ids in both)]


def _ending(ids: list[int], end_id: int | None) -> tuple[int, ...]:
    """The last end token and what follows it; empty where there is none."""
    return tuple(ids[len(ids) - 1 - ids[::-1].index(end_id) :]) if end_id in ids else ()


def _limit_report(longest: np.ndarray, removable: np.ndarray, max_length: int) -> dict[str, Any]:
    """What every over-long policy of `encode_pairs` would do."""
    excess = longest - max_length
    overlong, is_cut = int((excess > 0).sum()), (excess > 0) & (excess <= removable)
    truncated = int(is_cut.sum())
    return {
        "limit": max_length,
        "overlong": overlong,
        "error": {"stops": overlong > 0},
        "drop": {"dropped": overlong, "left": len(longest) - overlong},
        "truncate_prompt": {
            "truncated": truncated,
            "prompt_tokens_removed": int(excess[is_cut].sum()),
            "response_too_long": overlong - truncated,
        },
    }


def _overlap(names: list[str], first: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """What two sources share, by the hashes of `_content_report`."""
    shared = np.intersect1d(first[:, 0], other[:, 0])
    return {
        "sources": names,
        "shared_prompts": len(shared),
        "shared_pairs": len(np.intersect1d(first[:, 2], other[:, 2])),
        "rows_with_shared_prompt": [int(np.isin(digest[:, 0], shared).sum()) for digest in (first, other)],
    }


def _warnings(result: dict[str, Any]) -> list[str]:
    """What someone should know before training on this, one sentence each."""
    found = []
    for report in result["sources"]:
        if report.get("layout") == "scored":
            found += scored_warnings(report)
            continue
        template, longer = report.get("template", {}), report["chosen_longer_characters"]
        changed = template.get("not_as_written", {"n": 0, "examples": []})
        without_end = sum(ending["n"] for ending in template.get("endings", []) if not ending["ids"])
        counted = {
            f"of {report['rows']} rows are bad: correct them or pass on_bad_row='skip'": report["bad_rows"]["n"],
            "rows repeat an earlier pair": report["duplicates"]["n"],
            "rows have a twin with the opposite label": report["conflicting_labels"]["n"],
            "pairs cannot be encoded; training would stop there": report.get("tokens", {}).get("not_encodable"),
            "pairs would not be read as they stand: " + "; ".join(changed["examples"]): changed["n"],
            "pairs have the same tokens on both sides; training would stop there": template.get("identical_tokens"),
            "pairs start with two BOS tokens: the chat template repeats it": template.get("double_bos"),
            "pairs end with two end tokens: the text or the template repeats it": template.get("double_eos"),
            "pairs hold unknown tokens: the tokenizer lost their text": template.get("with_unknown_tokens"),
            "responses hold no end token": without_end,
            "pairs are over max_length": report.get("max_length", {}).get("overlong"),
        }  # fmt: skip
        found += [f"{report['source']}: {count:,} {text}." for text, count in counted.items() if count]
        low, high = longer["interval"]
        if report["pairs"] >= 30 and not low <= 0.5 <= high:
            found.append(
                f"{report['source']}: length and label are related: the longer response is chosen in "
                f"{longer['share']:.1%}."
            )
    for overlap in result["overlap"]:
        if overlap["shared_prompts"]:
            names = " and ".join(overlap["sources"])
            found.append(f"{names} share {overlap['shared_prompts']:,} prompts: not train and test.")
    tokenizer = result.get("tokenizer", {"has_chat_template": True, "pad_is_eos": False})
    if not tokenizer["has_chat_template"]:
        found.append(
            f"the tokenizer has no chat template: this shows the plain one, {PLAIN_FORM!r}, which training uses; a "
            "trained model without template is scored with nothing between prompt and response."
        )
    if tokenizer["pad_is_eos"]:
        found.append("the pad token is the end token: harmless here (masks decide), wrong where ids decide.")
    return found
