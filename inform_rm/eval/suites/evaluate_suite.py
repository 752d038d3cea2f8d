"""Evaluating a reward model on a benchmark suite: from model and suite to a folder of results."""

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inform_rm.data.encoding import OVERLONG_POLICIES, Encoded, encode_groups, not_encodable, skippable
from inform_rm.data.pairs import BadRow
from inform_rm.data.rendered_text import partly_rendered, warn_of_loss
from inform_rm.errors import InputError
from inform_rm.eval.journaled import journaled_rewards
from inform_rm.eval.sources import add_bad_rows, warn_of_left_out
from inform_rm.eval.suites import report
from inform_rm.eval.suites.items import MOST_REASONS, SuiteItem, load_suite_items
from inform_rm.eval.suites.scores import TIES, ScoredItem
from inform_rm.eval.suites.summary import item_credits, summarize_suite
from inform_rm.eval.suites.tables import Suite, suite_named
from inform_rm.scoring.scorer import RewardScorer, as_scorer
from inform_rm.util.files import atomic_write_bytes, atomic_write_text, check_output_directory, versions, write_json
from inform_rm.util.journal import RewardJournal, shortest_float
from inform_rm.util.page import figure_png
from inform_rm.util.processes import is_main_process

JOURNAL_FILE = "rewards.partial"
_CHUNK_ITEMS = 1024
_ENCODED_AT_ONCE = 128


def evaluate_suite(
    model: str | Path | torch.nn.Module | RewardScorer,
    suite: str,
    data: str | Path | Sequence[str | Path] | None = None,
    output: str | Path | None = None,
    *,
    tokenizer: Any = None,
    data_revision: str | None = None,
    on_bad_row: str = "error",
    overlong: str = "error",
    ties: str = "wrong",
    seed: int = 0,
    progress: bool = True,
    **scorer_options: Any,
) -> dict[str, Any]:
    """Score of any sequence-classification reward model on a benchmark suite, with the suite's own aggregation.

    A suite of which something is missing has no score, only the sections that are whole and the subsets that are
    there. With ``output`` the folder receives ``items.jsonl`` (for each item the rewards of its candidates, the
    correct ones first, and its mark), ``sections.png``, ``result.md``, ``result.html`` and at last ``result.json``,
    each written whole. After a kill the same call takes up the rewards computed before, and refuses if model, data or
    settings have changed. With a scorer that splits its work over processes, all read the data and the main one
    writes.

    Args:
        model: folder, Hub id, loaded model, or a `RewardScorer`, which several evaluations can share.
        suite: a name in `inform_rm.eval.suites.tables.SUITES`.
        data: local files or folders in place of the suite's data set on the Hub; see `load_suite_items`.
        output: folder for the results; ``None`` only returns them.
        tokenizer: see `RewardScorer`.
        data_revision: revision of the data on the Hub.
        on_bad_row: ``"error"`` or ``"skip"``, which leaves out, counts and lists bad rows, those among them that
            cannot be encoded or do not fit; the suite is then incomplete.
        overlong: what becomes of items with a candidate over the scorer's ``max_length``: ``"error"``; ``"drop"``,
            which makes the suite incomplete; or ``"truncate_prompt"``, which takes the same tokens from the left of
            the prompt of all candidates. Counted.
        ties: what equal rewards give in suites of pairs: nothing (``"wrong"``, as published), or ``"half"``
            (RewardBench only).
        seed: of the bootstrap intervals; nothing else is random.
        progress: show a progress bar.
        scorer_options: keywords of `RewardScorer`, such as ``max_length``, ``device`` and ``trust_remote_code``.

    Returns:
        The figures of `summarize_suite`, with ``model``, ``settings``, ``seed``, ``versions``, ``model_fingerprint``,
        ``tokenizer_fingerprint``, ``data`` (as `load_suite_items` describes each source) and ``counts``: items read,
        over-long, dropped, truncated, evaluated, those of which a correct and a wrong candidate become the same
        tokens (``indistinguishable``), and those of which the chat template deleted text (``partly_rendered``).

    Raises:
        InputError: on bad data, a model that is no reward model, or an unfinished run with other settings.
        NonFiniteRewardError: if the model gives NaN or infinity; the item is named.
    """
    table = suite_named(suite)
    if ties not in TIES:
        raise InputError(f"ties: {ties!r}; expected one of {', '.join(TIES)}.")
    if ties != "wrong" and suite != "rewardbench":
        raise InputError(f"ties: {ties!r} is an option of rewardbench; {suite} counts a tie as wrong. Leave it out.")
    if overlong not in OVERLONG_POLICIES:
        raise InputError(f"overlong: got {overlong!r}; expected one of {', '.join(OVERLONG_POLICIES)}.")
    folder = None if output is None else check_output_directory(output)
    loaded = load_suite_items(table, data, revision=data_revision, on_bad_row=on_bad_row)
    scorer = as_scorer(model, tokenizer, scorer_options)
    encoded, counts, bad_rows = encode_items(loaded.items, scorer, overlong, on_bad_row)
    ends = np.cumsum([source["items"] for source in loaded.sources])
    for place, bad in bad_rows:
        add_bad_rows(loaded.sources[int(np.searchsorted(ends, place, side="right"))], [bad], MOST_REASONS)
    dropped = Counter(item.subset for item in loaded.items) - Counter(each.item.subset for each in encoded)
    for source in loaded.sources:
        warn_of_left_out(source)
    warn_of_left_out({"source": suite, **counts})

    identity = scorer.identity()
    settings = {
        "suite": suite,
        "data": [source["source"] for source in loaded.sources],
        "data_revision": data_revision,
        "on_bad_row": on_bad_row,
        "overlong": overlong,
        "max_length": scorer.max_length,
        "dtype": identity["dtype"],
    }
    run = {**identity, "data": [source["fingerprint"] for source in loaded.sources], "settings": settings}
    writes = not scorer.split_over_processes or is_main_process()
    journal = None if folder is None else RewardJournal(folder / JOURNAL_FILE, run, scorer.split_over_processes)
    try:
        scored = _score(scorer, encoded, journal, progress and writes)
        result = {
            "model": scorer.name,
            "title": table.title,
            "citation": table.citation,
            **summarize_suite(table, scored, ties, seed, dropped),
            "counts": counts,
            "settings": {name: value for name, value in {**settings, "ties": ties}.items() if value is not None},
            "seed": seed,
            "versions": versions(),
            "model_fingerprint": identity["model"],
            "tokenizer_fingerprint": identity["tokenizer"],
            "data": loaded.sources,
        }
        if folder is not None and journal is not None:
            if writes:
                _write(folder, table, result, encoded, scored)
            journal.delete()
    finally:
        if journal is not None:
            journal.close()
    return result


@dataclass(frozen=True)
class EncodedItem:
    """An item with its candidates as token ids.

    Attributes:
        item: the item.
        sequences: the different ones among the candidates' token ids. Candidates that become the same tokens must
            tie, so they share one reward; computed twice, they may differ in the last bit.
        places: for each candidate its place in ``sequences``.
        prompt_length: tokens at the start that are the prompt.
    """

    item: SuiteItem
    sequences: list[Sequence[int]]
    places: list[int]
    prompt_length: int


def encode_items(
    items: Sequence[SuiteItem], scorer: RewardScorer, overlong: str, on_bad_row: str = "error"
) -> tuple[list[EncodedItem], dict[str, int], list[tuple[int, BadRow]]]:
    """Token ids of all candidates, the counts that `evaluate_suite` reports, and bad rows with their items' places.

    Raises:
        BadRow: an item that cannot be encoded, or is over the limit as the policy does not allow, under
            ``on_bad_row="error"``.
        InputError: no item is left.
    """
    encoded: list[EncodedItem] = []
    counts = {"items": len(items), "overlong": 0, "dropped": 0, "truncated": 0, "evaluated": 0, "indistinguishable": 0}
    losses: list[str | None] = []
    bad_rows: list[tuple[int, BadRow]] = []

    def leave_out(place: int, bad: BadRow) -> None:
        if on_bad_row == "error":
            raise skippable(bad)
        bad_rows.append((place, bad))

    for start in range(0, len(items), _ENCODED_AT_ONCE):
        group = items[start : start + _ENCODED_AT_ONCE]
        for place, rows in enumerate(_token_ids(scorer.tokenizer, group), start):
            item = items[place]
            if isinstance(rows, BadRow):
                leave_out(place, rows)
                continue
            sequences = [row.input_ids for row in rows]
            prompt_length = min(len(row.prompt_ids) for row in rows)
            excess = 0 if scorer.max_length is None else max(map(len, sequences)) - scorer.max_length
            if excess > 0:
                counts["overlong"] += 1
                if overlong == "drop":
                    counts["dropped"] += 1
                    continue
                try:
                    sequences = _fitted(item, sequences, prompt_length, excess, overlong, scorer)
                except BadRow as bad:
                    leave_out(place, bad)
                    continue
                prompt_length -= excess
                counts["truncated"] += 1
            what = next((row.lost for row in rows if row.lost is not None), None)
            losses.append(what and f"{item.file}, row {item.row}: {what}")
            different: dict[tuple[int, ...], int] = {}
            places = [different.setdefault(tuple(ids), len(different)) for ids in sequences]
            shared = set(places[: item.num_correct]) & set(places[item.num_correct :])
            counts["indistinguishable"] += bool(shared)
            encoded.append(EncodedItem(item, [array("i", ids) for ids in different], places, prompt_length))
    counts["evaluated"] = len(encoded)
    lost = partly_rendered(losses)
    counts["partly_rendered"] = lost["n"]
    warn_of_loss(lost, len(encoded), "items")
    if not encoded and bad_rows:
        shown = "; ".join(str(bad) for _, bad in bad_rows[:3])
        raise InputError(f"data: none of the {len(items)} items can be used, {len(bad_rows)} are bad rows. {shown}")
    if not encoded:
        raise InputError(f"max_length: {scorer.max_length} leaves none of the {len(items)} items. Raise it.")
    return encoded, counts, bad_rows


def _token_ids(tokenizer: Any, items: Sequence[SuiteItem]) -> list[list[Encoded] | BadRow]:
    """Of each item the token ids of its candidates, or why it has none."""

    def refusal(place: int, error: InputError) -> BadRow:
        return not_encodable(items[place].file, items[place].row, error)

    prompts, groups = [item.prompt for item in items], [item.candidates for item in items]
    try:
        return [*encode_groups(tokenizer, prompts, groups, refusal)]
    except BadRow as bad:
        if len(items) == 1:
            return [bad]
        return [_token_ids(tokenizer, [item])[0] for item in items]


def _fitted(
    item: SuiteItem, sequences: list[list[int]], prompt_length: int, excess: int, overlong: str, scorer: RewardScorer
) -> list[list[int]]:
    """The sequences with ``excess`` prompt tokens fewer, the same ones of each; a BOS token stays."""
    length = max(map(len, sequences))
    if overlong == "error":
        reason = (
            f"{length} tokens, over max_length {scorer.max_length}. Raise max_length, or choose overlong='drop' or "
        )
        raise BadRow(item.file, item.row, reason + "'truncate_prompt'.", "overlong")
    keep = int(prompt_length > 0 and sequences[0][0] == scorer.tokenizer.bos_token_id)
    if excess > prompt_length - keep:
        reason = (
            f"its longest candidate alone takes {length - prompt_length + keep} of max_length {scorer.max_length} "
            "tokens, and candidates are never cut. Raise max_length, or choose overlong='drop'."
        )
        raise BadRow(item.file, item.row, reason, "overlong")
    return [ids[:keep] + ids[keep + excess :] for ids in sequences]


def _score(
    scorer: RewardScorer, encoded: list[EncodedItem], journal: RewardJournal | None, progress: bool
) -> list[ScoredItem]:
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

    rewards = journaled_rewards(
        scorer, chunks(), int(ends[-1]), journal, where, description="evaluate", progress=progress
    )
    scored = []
    for end, each in zip(ends, encoded, strict=True):
        values = [shortest_float(value) for value in rewards[end - len(each.sequences) : end]]
        own = tuple(values[place] for place in each.places)
        scored.append(ScoredItem(each.item.id, each.item.subset, own, each.item.num_correct))
    return scored


def _write(
    folder: Path, table: Suite, result: dict[str, Any], encoded: list[EncodedItem], scored: list[ScoredItem]
) -> None:
    lines = []
    credits = item_credits(table, scored, result["settings"]["ties"])
    for each, item, credit in zip(encoded, scored, credits, strict=True):
        line = {
            "id": item.id,
            "subset": item.subset,
            "section": table.section_of(item.subset),
            "rewards": list(item.rewards),
            "num_correct": item.num_correct,
            "characters": [len(text) for text in each.item.candidates],
            "credit": credit,
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    atomic_write_text(folder / "items.jsonl", "".join(lines))
    plot = figure_png(report.sections_figure(result))
    atomic_write_bytes(folder / "sections.png", plot)
    page = report.suite_page(table, result, plot)
    atomic_write_text(folder / "result.md", page.markdown())
    atomic_write_text(folder / "result.html", page.html())
    write_json(folder / "result.json", result)  # last: its presence says that the rest is complete
