"""Evaluating a reward model on a benchmark suite: from model and suite to a folder of results."""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inform_rm.data import encoding
from inform_rm.data.encoding import Encoded, TokenGroup
from inform_rm.data.pairs import BadRow
from inform_rm.data.rendered_text import not_as_written, warn_of_text
from inform_rm.data.sources import Sources
from inform_rm.errors import InputError
from inform_rm.eval.frame import Frame, json_lines, progress_bars, settings_of
from inform_rm.eval.settings import SuiteSettings
from inform_rm.eval.sources import add_bad_rows, warn_of_left_out
from inform_rm.eval.suites.items import MOST_REASONS, SuiteItem, load_suite_items
from inform_rm.eval.suites.report import SuiteResult
from inform_rm.eval.suites.scores import ScoredItem, item_credit
from inform_rm.eval.suites.summary import summarize_suite
from inform_rm.eval.suites.tables import suite_named
from inform_rm.scoring.scorer import RewardScorer
from inform_rm.util.journal import shortest_float

_CHUNK_ITEMS = 1024
_ENCODED_AT_ONCE = 128


def evaluate_suite(
    model: str | Path | torch.nn.Module | RewardScorer,
    suite: str,
    data: Sources | None = None,
    output: str | Path | None = None,
    *,
    tokenizer: Any = None,
    progress: bool = True,
    **options: Any,
) -> SuiteResult:
    """Score of any sequence-classification reward model on a benchmark suite, with the suite's own aggregation.

    A suite of which something is missing has no score, only the sections that are whole and the subsets that are
    there. With ``output`` the folder receives ``items.jsonl`` (for each item the rewards of its candidates, the
    correct ones first, and its mark), ``sections.png``, ``result.md``, ``result.html`` and at last ``result.json``.
    For interruptions and several processes see `inform_rm.evaluate`.

    Args:
        model: folder, Hub id, loaded model, or a `RewardScorer`, which several evaluations can share.
        suite: a name in `inform_rm.eval.suites.tables.SUITES`.
        data: local files or folders, or rows in memory, in place of the suite's data set on the Hub; see
            `load_suite_items`.
        output: folder for the results; ``None`` only returns them.
        tokenizer: see `RewardScorer`.
        progress: show progress bars.
        options: fields of `SuiteSettings` (``data_revision``, ``on_bad_row``, ``overlong``, ``ties``, ``seed``) and
            keywords of `RewardScorer`.

    Returns:
        The figures, what was read and left out, and what they were computed with.

    Raises:
        InputError: on bad data, a model that is no reward model, or an unfinished run with other settings.
        NonFiniteRewardError: if the model gives NaN or infinity; the item is named.
    """
    table = suite_named(suite)
    settings, scorer_options = settings_of(SuiteSettings, options)
    if settings.ties != "wrong" and suite != "rewardbench":
        raise InputError(
            f"ties: {settings.ties!r} is an option of rewardbench; {suite} counts a tie as wrong. Leave it out."
        )
    with progress_bars(progress):
        items, sources = load_suite_items(table, data, revision=settings.data_revision, on_bad_row=settings.on_bad_row)
    frame = Frame(model, output, tokenizer, scorer_options, progress)
    encoded, counts, bad_rows = encode_items(items, frame.scorer, settings.overlong, settings.on_bad_row)
    ends = np.cumsum([source["items"] for source in sources])
    for place, bad in bad_rows:
        add_bad_rows(sources[int(np.searchsorted(ends, place, side="right"))], [bad], MOST_REASONS)
    dropped = Counter(item.subset for item in items) - Counter(each.item.subset for each in encoded)
    for record in (*sources, {"source": suite, **counts}):
        warn_of_left_out(record)

    described, run = frame.described_with(settings, sources, suite=suite)
    # Rewards depend neither on ties nor on the seed of the bootstrap.
    run["settings"] = {name: value for name, value in run["settings"].items() if name != "ties"}
    del run["seed"]
    scored = _score(frame, encoded, run)
    figures = summarize_suite(table, scored, settings.ties, settings.seed, dropped)
    rows = [
        {
            "id": item.id,
            "subset": item.subset,
            "section": table.section_of(item.subset),
            "rewards": list(item.rewards),
            "num_correct": item.num_correct,
            "characters": [len(text) for text in each.item.candidates],
            "credit": item_credit(item, table.subsets[item.subset].credit, settings.ties),
        }
        for each, item in zip(encoded, scored, strict=True)
    ]
    result = SuiteResult(
        **described,
        title=table.title,
        citation=table.citation,
        on_hub=table.on_hub,
        counts=counts,
        **figures,
        rows=rows,
    )
    frame.finish(result, {"items.jsonl": json_lines(rows)})
    return result


@dataclass(frozen=True)
class EncodedItem:
    """An item with the different ones among its candidates' token ids, and the place of each candidate among them.

    Candidates that become the same tokens must tie, so they share one reward: computed twice, they may differ in the
    last bit.
    """

    item: SuiteItem
    sequences: list[Sequence[int]]
    places: list[int]
    prompt_length: int


def encode_items(
    items: Sequence[SuiteItem], scorer: RewardScorer, overlong: str, on_bad_row: str
) -> tuple[list[EncodedItem], dict[str, int], list[tuple[int, BadRow]]]:
    """Token ids of all candidates, the counts that `evaluate_suite` reports, and bad rows with their items' places."""
    encoded: list[EncodedItem] = []
    counts = Counter(items=len(items), overlong=0, dropped=0, truncated=0, evaluated=0, indistinguishable=0)
    losses: list[str | None] = []
    bad_rows: list[tuple[int, BadRow]] = []
    for start in range(0, len(items), _ENCODED_AT_ONCE):
        group = items[start : start + _ENCODED_AT_ONCE]
        groups = encoding.encode_groups(scorer.tokenizer, [x.prompt for x in group], [x.candidates for x in group])
        for place, rows in enumerate(groups, start):
            item = items[place]
            try:
                if isinstance(rows, InputError):
                    raise encoding.not_encodable(item.file, item.row, rows)
                found = _encoded_item(item, rows, scorer, overlong, counts)
            except BadRow as bad:
                if on_bad_row == "error":
                    raise encoding.skippable(bad) from None
                bad_rows.append((place, bad))
                continue
            if found is not None:
                encoded.append(found)
                what = next((row.not_as_written for row in rows if row.not_as_written is not None), None)
                losses.append(what and f"{item.file}, row {item.row}: {what}")
    lost = not_as_written(losses)
    warn_of_text(lost, len(encoded), "items")
    if not encoded and bad_rows:
        shown = "; ".join(str(bad) for _, bad in bad_rows[:3])
        raise InputError(f"data: none of the {len(items)} items can be used, {len(bad_rows)} are bad rows. {shown}")
    if not encoded:
        raise InputError(f"max_length: {scorer.max_length} leaves none of the {len(items)} items. Raise it.")
    return encoded, {**counts, "evaluated": len(encoded), "not_as_written": lost["n"]}, bad_rows


def _encoded_item(
    item: SuiteItem, rows: Sequence[Encoded], scorer: RewardScorer, overlong: str, counts: Counter[str]
) -> EncodedItem | None:
    """The item within the scorer's length, ``None`` if it is dropped; what was done is counted."""
    group = TokenGroup([row.input_ids for row in rows], min(len(row.prompt_ids) for row in rows))
    if scorer.max_length is not None and group.longest > scorer.max_length:
        counts["overlong"] += 1
        if overlong == "drop":
            counts["dropped"] += 1
            return None
        bos = scorer.tokenizer.bos_token_id
        group = encoding.fit_group(group, scorer.max_length, overlong, bos, item.file, item.row)
        counts["truncated"] += 1
    different: dict[tuple[int, ...], int] = {}
    places = [different.setdefault(tuple(ids), len(different)) for ids in group.ids]
    counts["indistinguishable"] += not set(places[: item.num_correct]).isdisjoint(places[item.num_correct :])
    return EncodedItem(item, [array("i", ids) for ids in different], places, group.prompt_length)


def _score(frame: Frame, encoded: list[EncodedItem], run: dict[str, Any]) -> list[ScoredItem]:
    ends = np.cumsum([len(item.sequences) for item in encoded])

    def where(entry: int) -> str:
        place = int(np.searchsorted(ends, entry, side="right"))
        each = encoded[place]
        number = each.places.index(entry - int(ends[place]) + len(each.sequences))
        return f"candidate {number} (counted from 0, correct ones first) of item {each.item.id}"

    def chunks() -> Iterator[tuple[list[list[int]], list[int]]]:
        for start in range(0, len(encoded), _CHUNK_ITEMS):
            group = encoded[start : start + _CHUNK_ITEMS]
            lengths = [item.prompt_length for item in group for _ in item.sequences]
            yield [list(ids) for item in group for ids in item.sequences], lengths

    rewards = frame.rewards(chunks(), int(ends[-1]), run, where)
    scored = []
    for end, each in zip(ends, encoded, strict=True):
        values = [shortest_float(value) for value in rewards[end - len(each.sequences) : end]]
        own = tuple(values[place] for place in each.places)
        scored.append(ScoredItem(each.item.id, each.item.subset, own, each.item.num_correct))
    return scored
