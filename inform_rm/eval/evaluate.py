"""Evaluating a reward model on preference data: from model and data to a result, and to a folder of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from inform_rm.data.sources import Sources
from inform_rm.eval import report
from inform_rm.eval.accuracy import pairwise_accuracy
from inform_rm.eval.frame import Frame, ModelResult, json_lines, progress_bars, settings_of, unwritten
from inform_rm.eval.sources import PairSettings, load_sources, warn_of_left_out
from inform_rm.scoring.scorer import RewardScorer
from inform_rm.util.journal import shortest_float
from inform_rm.util.page import Page, Table, figure_png

_CHUNK_PAIRS = 2048
_SIDES = ("chosen", "rejected")
_COUNTS = ("overlong", "dropped", "truncated")
_ROW = ("id", "subset", "chosen_characters", "rejected_characters")


@dataclass(frozen=True, kw_only=True)
class EvaluationResult(ModelResult):
    """The accuracy of a reward model on preference pairs.

    The statistics are those of `inform_rm.eval.accuracy.pairwise_accuracy`, lengths in characters.

    Attributes:
        data: per source its fingerprint and counts of pairs read, not sampled, over-long, dropped, truncated and
            evaluated, the bad rows, and ``partly_rendered``: ``n`` pairs of which the chat template deleted text, and
            up to 5 ``examples``.
        rows: of each pair source, id, subset, lengths and rewards: the lines of ``pairs.jsonl``.
    """

    data: list[dict[str, Any]]
    num_pairs: int
    accuracy: float
    accuracy_interval: list[float]
    accuracy_ties_wrong: float
    accuracy_ties_wrong_interval: list[float]
    num_ties: int
    mean_margin: float
    calibration: dict[str, Any]
    by_length: dict[str, dict[str, Any]] | None = None
    longer_wins_accuracy: float | None = None
    subsets: dict[str, dict[str, Any]] | None = None
    rows: list[dict[str, Any]] = unwritten()

    @property
    def title(self) -> str:
        """What was evaluated."""
        return f"Accuracy of {self.model}"

    def table(self) -> Table:
        """All pairs, each subset, each part by length."""
        return report.accuracy_table(self.to_dict())

    def figure(self) -> Figure:
        """Accuracy against predicted probability."""
        return report.reliability_figure(self.calibration["bins"])

    def page(self) -> Page:
        """All of it."""
        return report.result_page(self.to_dict(), figure_png(self.figure()))


def evaluate(
    model: str | Path | torch.nn.Module | RewardScorer,
    data: Sources,
    output: str | Path | None = None,
    *,
    tokenizer: Any = None,
    progress: bool = True,
    **options: Any,
) -> EvaluationResult:
    """Accuracy of any sequence-classification reward model on preference pairs, overall and per subset.

    With ``output`` the folder receives ``pairs.jsonl`` (both rewards and lengths of every pair), ``reliability.png``,
    ``result.md``, ``result.html`` and at last ``result.json``. After a kill the same call takes up the rewards
    computed before (``rewards.partial``), and refuses if model, data or settings have changed. With a scorer that
    splits its work over processes, all of them read the data and the main one writes.

    Args:
        model: folder, Hub id, loaded model, or a `RewardScorer`, which several evaluations can share.
        data: one or several sources of pairs, by name or in memory, as `load_preferences` reads them.
        output: folder for the results; ``None`` only returns them.
        tokenizer: see `RewardScorer`.
        progress: show progress bars.
        options: fields of `inform_rm.eval.sources.PairSettings` (``columns``, ``data_revision``, ``on_bad_row``,
            ``overlong``, ``max_pairs``, ``seed``) and keywords of `RewardScorer` (``max_length``, ``device``,
            ``trust_remote_code``, ...).

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
        for source in load_sources(data, settings):
            encoded = source.encode(frame.scorer, settings)
            counts = {name: encoded.counts[name] for name in _COUNTS}
            records.append({**source.record, **counts, "evaluated": len(encoded.dataset)})
            warn_of_left_out(records[-1])
            parts.append(encoded.dataset)
    described, run = frame.described_with(settings, records)
    rows = [
        {"source": record["source"], **dict(zip(_ROW, values, strict=True))}
        for record, part in zip(records, parts, strict=True)
        for values in zip(*(part[column] for column in _ROW), strict=True)
    ]

    def where(entry: int) -> str:
        return f"the {_SIDES[entry % 2]} response of pair {rows[entry // 2]['id']}"

    rewards = frame.rewards(_chunks(parts), 2 * len(rows), run, where).reshape(-1, 2)
    for row, values in zip(rows, rewards, strict=True):
        row |= {f"{side}_reward": shortest_float(value) for side, value in zip(_SIDES, values, strict=True)}
    lengths = ([row[f"{side}_characters"] for row in rows] for side in _SIDES)
    statistics = pairwise_accuracy(rewards[:, 0], rewards[:, 1], [row["subset"] for row in rows], *lengths)
    result = EvaluationResult(**described, **statistics, rows=rows)
    frame.finish(result, {"pairs.jsonl": json_lines(rows)})
    return result


def _chunks(parts: list[Any]) -> Iterator[tuple[list[list[int]], list[int]]]:
    for part in parts:
        for start in range(0, len(part), _CHUNK_PAIRS):
            chunk = part[start : start + _CHUNK_PAIRS]
            sides = zip(chunk["chosen_input_ids"], chunk["rejected_input_ids"], strict=True)
            yield [ids for pair in sides for ids in pair], [length for length in chunk["prompt_length"] for _ in "cr"]
