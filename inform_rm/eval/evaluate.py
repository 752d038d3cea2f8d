"""Evaluating a reward model on preference data: from model and data to a result, and to a folder of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inform_rm.data.groups import LAYOUTS
from inform_rm.data.sources import Sources
from inform_rm.errors import InputError
from inform_rm.eval.accuracy import pairwise_accuracy
from inform_rm.eval.frame import Frame, json_lines, progress_bars, settings_of
from inform_rm.eval.group_statistics import ranking_statistics, score_statistics
from inform_rm.eval.results import EvaluationResult, RankingResult, ScoreResult
from inform_rm.eval.settings import PairSettings
from inform_rm.eval.sources import load_sources, warn_of_left_out
from inform_rm.scoring.scorer import RewardScorer
from inform_rm.util.journal import shortest_float

_CHUNK_ROWS = 2048
_SIDES = ("chosen", "rejected")
_COUNTS = ("overlong", "dropped", "truncated")
# Of each layout the columns that a result's rows have, and the file that they go to.
_COLUMNS = {
    "pair": ("id", "subset", "chosen_characters", "rejected_characters"),
    **dict.fromkeys(("ranking", "scored"), ("id", "subset", "labels", "characters")),
}
_FILES = {"pair": "pairs.jsonl", "ranking": "rankings.jsonl", "scored": "scored.jsonl"}


def evaluate(
    model: str | Path | torch.nn.Module | RewardScorer,
    data: Sources,
    output: str | Path | None = None,
    *,
    tokenizer: Any = None,
    progress: bool = True,
    **options: Any,
) -> EvaluationResult | ScoreResult:
    """Accuracy of any sequence-classification reward model on preference pairs, overall and per subset.

    Of rankings also Kendall's tau-b and top-1 accuracy (`RankingResult`); of scored responses the error and the
    correlations (`ScoreResult`). All sources of a call have one layout.

    With ``output`` the folder receives ``pairs.jsonl`` (both rewards and lengths of every pair; ``rankings.jsonl``,
    ``scored.jsonl``: labels, rewards and lengths of every row), ``reliability.png`` (``scores.png``),
    ``result.md``, ``result.html`` and at last ``result.json``. After a kill the same call takes up the rewards
    computed before (``rewards.partial``), and refuses if model, data or settings have changed. With a scorer that
    splits its work over processes, all of them read the data and the main one writes.

    Args:
        model: folder, Hub id, loaded model, or a `RewardScorer`, which several evaluations can share.
        data: one or several sources, by name or in memory, as `load_preferences` reads them.
        output: folder for the results; ``None`` only returns them.
        tokenizer: see `RewardScorer`.
        progress: show progress bars.
        options: fields of `inform_rm.eval.settings.PairSettings` (``columns``, ``data_revision``, ``on_bad_row``,
            ``overlong``, ``max_pairs``, ``score_weights``, ``seed``) and keywords of `RewardScorer`
            (``max_length``, ``device``, ``trust_remote_code``, ...).

    Returns:
        The statistics, what was read and left out, and what they were computed with.

    Raises:
        InputError: on bad data, a model that is no reward model, or an unfinished run with other settings.
        NonFiniteRewardError: if the model gives NaN or infinity; the pair is named.
    """
    settings, scorer_options = settings_of(PairSettings, options)
    frame = Frame(model, output, tokenizer, scorer_options, progress)
    parts, records = [], []
    with progress_bars(frame.progress):
        sources = load_sources(data, settings, LAYOUTS)
        if len({source.layout for source in sources}) > 1:
            found = ", ".join(f"{source.record['source']} ({source.layout})" for source in sources)
            raise InputError(f"data: sources of several layouts, {found}. Evaluate each layout in a call of its own.")
        if settings.score_weights is not None and sources[0].layout != "scored":
            raise InputError(f"score_weights: for scored responses; these are of the layout {sources[0].layout!r}.")
        for source in sources:
            encoded = source.encode(frame.scorer, settings)
            counts = {name: encoded.counts[name] for name in _COUNTS}
            records.append({**source.record, **counts, "evaluated": len(encoded.dataset)})
            warn_of_left_out(records[-1])
            parts.append(encoded.dataset)
    described, run = frame.described_with(settings, records)
    layout = sources[0].layout
    rows: list[dict[str, Any]] = [
        {"source": record["source"], **dict(zip(_COLUMNS[layout], values, strict=True))}
        for record, part in zip(records, parts, strict=True)
        for values in zip(*(part[column] for column in _COLUMNS[layout]), strict=True)
    ]
    first = np.cumsum([0, *(2 if layout == "pair" else len(row["labels"]) for row in rows)])

    def where(entry: int) -> str:
        row = int(np.searchsorted(first, entry, side="right")) - 1
        place = int(entry - first[row])
        name = f"the {_SIDES[place]} response of pair" if layout == "pair" else f"response {place + 1} of row"
        return f"{name} {rows[row]['id']}"

    rewards = frame.rewards(_chunks(parts), int(first[-1]), run, where)
    result = _result(layout, rows, rewards, first, described)
    frame.finish(result, {_FILES[layout]: json_lines(rows)})
    return result


def _result(
    layout: str, rows: list[dict[str, Any]], rewards: np.ndarray, first: np.ndarray, described: dict[str, Any]
) -> EvaluationResult | ScoreResult:
    """The statistics of rows, which get their rewards; those of row i begin at ``first[i]``."""
    subsets = [row["subset"] for row in rows]
    if layout == "pair":
        chosen, rejected = rewards.reshape(-1, 2).T
        for row, *values in zip(rows, chosen, rejected, strict=True):
            row |= {f"{side}_reward": shortest_float(value) for side, value in zip(_SIDES, values, strict=True)}
        lengths = ([row[f"{side}_characters"] for row in rows] for side in _SIDES)
        return EvaluationResult(**described, **pairwise_accuracy(chosen, rejected, subsets, *lengths), rows=rows)
    groups = np.split(rewards, first[1:-1])
    for row, group in zip(rows, groups, strict=True):
        row["rewards"] = list(map(shortest_float, group))
    labels = [row["labels"] for row in rows]
    if layout == "ranking":
        statistics = ranking_statistics(groups, labels, subsets, described["seed"])
        return RankingResult(**described, **statistics, rows=rows)
    return ScoreResult(**described, **score_statistics(rewards, np.concatenate(labels), subsets), rows=rows)


def _chunks(parts: list[Any]) -> Iterator[tuple[list[list[int]], list[int]]]:
    """Token ids of all responses in order, and the lengths of their prompts."""
    for part in parts:
        for start in range(0, len(part), _CHUNK_ROWS):
            chunk = part[start : start + _CHUNK_ROWS]
            groups = chunk.get("responses_input_ids")
            if groups is None:
                groups = list(zip(chunk["chosen_input_ids"], chunk["rejected_input_ids"], strict=True))
            lengths = zip(chunk["prompt_length"], groups, strict=True)
            yield [ids for group in groups for ids in group], [length for length, group in lengths for _ in group]
