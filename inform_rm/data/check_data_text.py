"""The report of `check_data` as text for a terminal."""

from typing import Any

from inform_rm.data.check_data import TOKEN_FAULTS
from inform_rm.data.check_groups import QUANTILES, SHOWN_EXAMPLES
from inform_rm.data.columns import lines_of


def format_report(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    lines = [line for source in report["sources"] for line in _format_source(source)]
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
    return "\n".join(
        [*lines, f"Warnings: {len(report['warnings']) or 'none'}", *(f"  - {text}" for text in report["warnings"])]
    )


def _format_source(source: dict[str, Any]) -> list[str]:
    if source.get("layout") == "scored":
        return _format_scored(source)
    longer = source["chosen_longer_characters"]
    low, high = longer["interval"]
    lines = [
        *_format_rows(source, f"usable pairs {source['pairs']:,}"),
        *([_format_rankings(source)] if "rankings" in source else []),
        f"  prompts {source['prompts']:,}, with several turns {source['multi_turn_prompts']:,}, "
        f"margins {source['margins']:,}, subsets {len(source['subsets']):,}",
    ]
    for name in ("duplicates", "conflicting_labels"):
        rows = f", e.g. rows {', '.join(map(str, source[name]['examples']))}" if source[name]["n"] else ""
        lines.append(f"  {name.replace('_', ' ')} {source[name]['n']:,}{rows}")
    lines += [
        f"  identical sides {source['identical_sides']:,}",
        f"  chosen longer {longer['longer']:,}, equal {longer['equal']:,}, shorter {longer['shorter']:,}: longer wins "
        f"{longer['share']:.1%} (n {longer['n']:,}, 95 % interval {low:.1%} to {high:.1%}, tie 0.5)",
    ]
    return lines + _format_lengths(source) + _format_tokens(source)


def _format_lengths(source: dict[str, Any]) -> list[str]:
    """A table of quantiles of lengths in characters and in tokens."""
    lines = []
    for unit in ("characters", "tokens"):
        table = {name: value for name, value in source.get(unit, {}).items() if isinstance(value, dict)}
        if table:
            lines.append(f"  {unit:<11}{'mean':>9}" + "".join(f"{quantile:>9.0%}" for quantile in QUANTILES))
        for name, quantiles in table.items():
            lines.append(f"    {name:<9}" + "".join(f"{value:>9,.0f}" for value in quantiles.values()))
    return lines


def _format_rankings(source: dict[str, Any]) -> str:
    sizes = ", ".join(f"{number:,} of {size}" for size, number in source["rankings_by_size"].items())
    return (
        f"  rankings {source['rankings']:,} with {source['responses']:,} responses ({sizes}), tied pairs "
        f"{source['tied_pairs']:,}; what follows is about their untied pairs"
    )


def _format_rows(source: dict[str, Any], usable: str) -> list[str]:
    """Name and number of rows of a source, the bad ones, and how its columns were read."""
    bad = source["bad_rows"]
    return [
        source["source"],
        f"  rows {source['rows']:,}, {usable}, bad rows {bad['n']:,}",
        *(f"    row {row['row']}: {row['reason']}" for row in bad["rows"][:SHOWN_EXAMPLES]),
        *([f"    ... and {bad['n'] - SHOWN_EXAMPLES:,} more"] if bad["n"] > SHOWN_EXAMPLES else []),
        *(f"  {line}" for line in lines_of(source["reading"], source["rows"])),
    ]


def _format_scored(source: dict[str, Any]) -> list[str]:
    lines = [
        *_format_rows(source, f"usable scored responses {source['scored']:,}"),
        f"  prompts {source['prompts']:,}, subsets {len(source['subsets']):,}, duplicates "
        f"{source['duplicates']['n']:,}, conflicting labels {source['conflicting_labels']['n']:,}",
        "  scores: " + ", ".join(f"{name} {value:g}" for name, value in source["scores"].items()),
    ]
    if "score_length_correlation" in source:
        lines.append(f"  score and characters of the response: Spearman {source['score_length_correlation']:.2f}")
    lines += _format_lengths(source)
    if limit := source.get("max_length"):
        lines.append(
            f"  max_length {limit['limit']:,}: {limit['overlong']:,} responses over it with their prompt, "
            f"{limit['response_too_long']:,} even alone"
        )
    if number := source.get("tokens", {}).get("not_encodable"):
        lines.append(f"  not encodable {number:,}")
        lines += [f"    row {row['row']}: {row['reason']}" for row in source["tokens"]["not_encodable_examples"]]
    return lines


def _format_tokens(source: dict[str, Any]) -> list[str]:
    """What a limit would do, what cannot be encoded, and what the chat template makes of the rest."""
    lines = []
    if limit := source.get("max_length"):
        cut = limit["truncate_prompt"]
        lines += [
            f"  max_length {limit['limit']:,}: {limit['overlong']:,} pairs over it",
            f"    error: {'stops at the first' if limit['error']['stops'] else 'nothing to stop for'}",
            f"    drop: {limit['drop']['dropped']:,} dropped, {limit['drop']['left']:,} left",
            f"    truncate_prompt: {cut['truncated']:,} cut ({cut['prompt_tokens_removed']:,} prompt tokens), "
            f"{cut['response_too_long']:,} with a response too long alone (error)",
        ]
    if number := source.get("tokens", {}).get("not_encodable"):
        examples = source["tokens"]["not_encodable_examples"]
        lines += [f"  not encodable {number:,}", *(f"    row {row['row']}: {row['reason']}" for row in examples)]
    if template := source.get("template"):
        counts = ", ".join(f"{name.replace('_', ' ')} {template.get(name, 0):,}" for name in TOKEN_FAULTS[1:])
        lines += [
            f"  template: {counts}",
            *(
                f"    {ending['n']:,} of {template['responses']:,} responses end with "
                + (f"{ending['ending']!r} {ending['ids']}" if ending["ids"] else "no end token")
                for ending in template["endings"]
            ),
            "  chosen side of the first pair, as the model reads it:",
            *(f"    | {line}" for line in template["example_chosen"].split("\n")),
        ]
    return lines
