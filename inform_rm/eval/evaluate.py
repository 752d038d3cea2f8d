"""Evaluating a reward model on preference data: from model and data to a folder of results."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inform_rm.data.encoding import encode_pairs
from inform_rm.eval import accuracy, report
from inform_rm.eval.journaled import journaled_rewards
from inform_rm.eval.sources import add_bad_rows, load_sources, warn_of_left_out
from inform_rm.scoring.scorer import RewardScorer, as_scorer
from inform_rm.util.files import atomic_write_bytes, atomic_write_text, check_output_directory, versions, write_json
from inform_rm.util.journal import RewardJournal, shortest_float
from inform_rm.util.page import figure_png
from inform_rm.util.processes import is_main_process

JOURNAL_FILE = "rewards.partial"
_CHUNK_PAIRS = 2048


def evaluate(
    model: str | Path | torch.nn.Module | RewardScorer,
    data: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    tokenizer: Any = None,
    columns: Mapping[str, str] | None = None,
    data_revision: str | None = None,
    on_bad_row: str = "error",
    overlong: str = "error",
    max_pairs: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **scorer_options: Any,
) -> dict[str, Any]:
    """Accuracy of any sequence-classification reward model on preference pairs, overall and per subset.

    With ``output`` the folder receives ``pairs.jsonl`` (both rewards and lengths of every pair), ``reliability.png``,
    ``result.md``, ``result.html`` and at last ``result.json``, each written whole. After a kill the same call takes up
    the rewards computed before (``rewards.partial``), and refuses if model, data or settings have changed. With a
    scorer that splits its work over processes, all of them read the data and the main one writes.

    Args:
        model: folder, Hub id, loaded model, or a `RewardScorer`, which several evaluations can share.
        data: one or several sources of pairs, as `load_preferences` reads them.
        output: folder for the results; ``None`` only returns them.
        tokenizer: see `RewardScorer`.
        columns: which columns are prompt, chosen, rejected, ...: see `Columns.of`.
        data_revision: revision of the data on the Hub.
        on_bad_row: ``"error"`` or ``"skip"``, which leaves out, counts and lists bad rows, those among them that
            cannot be encoded or do not fit (see `inform_rm.data.encoding.encode_pairs`).
        overlong: what becomes of pairs over the scorer's ``max_length``: ``"error"``, ``"drop"`` or
            ``"truncate_prompt"``; counted.
        max_pairs: evaluate a random subset of this many pairs of each source.
        seed: seed of that subset; nothing else is random.
        progress: show a progress bar.
        scorer_options: keywords of `RewardScorer`, such as ``max_length``, ``device`` and ``trust_remote_code``.

    Returns:
        The statistics of `pairwise_accuracy` (lengths in characters), with ``model``, ``settings``, ``seed``,
        ``versions``, ``model_fingerprint`` and ``data``: per source its fingerprint and counts of pairs read,
        not sampled, over-long, dropped, truncated and evaluated, the bad rows, and ``partly_rendered``: ``n`` pairs of
        which the chat template deleted text, and up to 5 ``examples``.

    Raises:
        InputError: on bad data, a model that is no reward model, or an unfinished run with other settings.
        NonFiniteRewardError: if the model gives NaN or infinity; the pair is named.
    """
    folder = None if output is None else check_output_directory(output)
    scorer = as_scorer(model, tokenizer, scorer_options)

    parts, described = [], []
    for source in load_sources(
        data, columns=columns, revision=data_revision, on_bad_row=on_bad_row, max_pairs=max_pairs, seed=seed
    ):
        encoded = encode_pairs(
            source.pairs, scorer.tokenizer, max_length=scorer.max_length, overlong=overlong, on_bad_row=on_bad_row
        )
        add_bad_rows(source.record, encoded.bad_rows)
        counts = {name: encoded.counts[name] for name in ("overlong", "dropped", "truncated", "partly_rendered")}
        described.append({**source.record, **counts, "evaluated": len(encoded.dataset)})
        warn_of_left_out(described[-1])
        parts.append(encoded.dataset)

    identity = scorer.identity()
    settings = {
        "data": [item["source"] for item in described],
        "columns": None if columns is None else dict(columns),
        "data_revision": data_revision,
        "on_bad_row": on_bad_row,
        "overlong": overlong,
        "max_pairs": max_pairs,
        "max_length": scorer.max_length,
        "dtype": identity["dtype"],
    }
    run = {**identity, "data": [item["fingerprint"] for item in described], "settings": settings, "seed": seed}
    writes = not scorer.split_over_processes or is_main_process()
    journal = None if folder is None else RewardJournal(folder / JOURNAL_FILE, run, scorer.split_over_processes)
    try:
        rewards = _score_pairs(scorer, parts, journal, progress and writes)
        subsets = [name for part in parts for name in part["subset"]]
        lengths = [np.concatenate([part[f"{side}_characters"] for part in parts]) for side in ("chosen", "rejected")]
        result = {
            "model": scorer.name,
            "model_fingerprint": identity["model"],
            "tokenizer_fingerprint": identity["tokenizer"],
            "settings": {name: value for name, value in settings.items() if value is not None},
            "seed": seed,
            "versions": versions(),
            "data": described,
            **accuracy.pairwise_accuracy(rewards[:, 0], rewards[:, 1], subsets, *lengths),
        }
        if folder is not None and journal is not None:
            if writes:
                _write(folder, result, parts, rewards)
            journal.delete()
    finally:
        if journal is not None:
            journal.close()
    return result


def _score_pairs(scorer: RewardScorer, parts: list[Any], journal: RewardJournal | None, progress: bool) -> np.ndarray:
    """Rewards ``(N, 2)``, chosen and rejected; entry 2 i + side of the journal is side ``side`` of pair i."""
    num_pairs = sum(len(part) for part in parts)

    def where(entry: int) -> str:
        pair, side = divmod(entry, 2)
        for part in parts:
            if pair < len(part):
                break
            pair -= len(part)
        return f"the {('chosen', 'rejected')[side]} response of pair {part[pair]['id']}"

    chunks = _chunks(parts)
    rewards = journaled_rewards(
        scorer, chunks, 2 * num_pairs, journal, where, description="evaluate", progress=progress
    )
    return rewards.reshape(-1, 2)


def _chunks(parts: list[Any]) -> Iterator[tuple[list[list[int]], list[int]]]:
    for part in parts:
        for start in range(0, len(part), _CHUNK_PAIRS):
            chunk = part[start : start + _CHUNK_PAIRS]
            sides = zip(chunk["chosen_input_ids"], chunk["rejected_input_ids"], strict=True)
            yield [ids for pair in sides for ids in pair], [length for length in chunk["prompt_length"] for _ in "cr"]


def _write(folder: Path, result: dict[str, Any], parts: list[Any], rewards: np.ndarray) -> None:
    lines = []
    columns = ("id", "subset", "chosen_characters", "rejected_characters")
    described = ((source["source"], row) for source, part in zip(result["data"], parts, strict=True)
                 for row in zip(*(part[column] for column in columns), strict=True))  # fmt: skip
    for (source, row), (chosen, rejected) in zip(described, rewards, strict=True):
        pair = {"source": source, **dict(zip(columns, row, strict=True))}
        pair |= {"chosen_reward": shortest_float(chosen), "rejected_reward": shortest_float(rejected)}
        lines.append(json.dumps(pair, ensure_ascii=False) + "\n")
    atomic_write_text(folder / "pairs.jsonl", "".join(lines))
    plot = figure_png(report.reliability_figure(result["calibration"]["bins"]))
    atomic_write_bytes(folder / "reliability.png", plot)
    page = report.result_page(result, plot)
    atomic_write_text(folder / "result.md", page.markdown())
    atomic_write_text(folder / "result.html", page.html())
    write_json(folder / "result.json", result)  # last: its presence says that the rest is complete
