"""Does a policy exploit its reward model? Latents of its responses against those of a reference."""

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.manifold import TSNE

from inform_rm.data.columns import Reading, log_reading
from inform_rm.data.encoding import BAD_ROW_POLICIES
from inform_rm.data.response_rows import RowFault, ScoreRow, score_rows_or_faults
from inform_rm.data.sources import source_digest
from inform_rm.errors import InputError
from inform_rm.eval.detection import report
from inform_rm.eval.detection.early_stopping import CSIEarlyStopping
from inform_rm.eval.detection.latents import Latents, collect_latents
from inform_rm.eval.detection.outliers import (
    auto_eps,
    cluster_separation_index,
    csi_interval,
    fit_mahalanobis,
    null_rank,
    separate_clusters,
    split_half_null,
)
from inform_rm.eval.sources import warn_of_left_out
from inform_rm.scoring.score_files import encoded_or_faults
from inform_rm.scoring.scorer import RewardScorer, as_scorer
from inform_rm.util.files import (
    atomic_write_bytes,
    atomic_write_text,
    check_output_directory,
    versions,
    write_json,
)
from inform_rm.util.intervals import wilson_interval
from inform_rm.util.page import figure_png

_SMALLEST_SET = 20
_LISTED_BAD_ROWS = 1000


def detect(
    model: str | Path | torch.nn.Module | RewardScorer,
    reference: str | Path,
    candidates: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    tokenizer: Any = None,
    columns: Mapping[str, str] | None = None,
    eps: float | str = "auto",
    min_samples: int = 5,
    noise: str = "cluster",
    alpha: float = 0.01,
    tail: str = "reference",
    max_change_ratio: float = 10.0,
    max_responses: int | None = None,
    on_bad_row: str = "error",
    num_outliers: int = 20,
    num_splits: int = 100,
    num_resamples: int = 100,
    map_points: int = 600,
    seed: int = 0,
    progress: bool = True,
    **scorer_options: Any,
) -> dict[str, Any]:
    """Compare the latents of candidate responses with those of a reference (arXiv:2402.09345, arXiv:2510.13694).

    With ``output`` the folder receives ``responses.parquet`` (every response with reward, distance, tail probability,
    cluster and place on the map), ``map.png``, with several candidates ``steps.png``, ``result.html`` (a map on which
    pointing at a point shows its response) and at last ``result.json``.

    Args:
        model: folder, Hub id, loaded model, or a `RewardScorer`: an InfoRM model; others give hidden states, and the
            result says so.
        reference: responses of the policy before training, with ``prompt`` and ``response``: see
            `inform_rm.data.response_rows.read_score_rows`.
        candidates: responses of the policy under test, one file, or one for each checkpoint in order.
        output: folder for the results; ``None`` only returns them.
        tokenizer: see `RewardScorer`.
        columns: which columns are prompt, response, system and history: see `inform_rm.data.columns.Columns.of`.
        eps: radius of DBSCAN, see `inform_rm.eval.detection.outliers.cluster_separation_index`; ``"auto"`` takes one
            radius from the reference, for all candidates and the null.
        min_samples: see there.
        noise: see there.
        alpha: tail probability below which a response is an outlier.
        tail: ``"reference"`` or ``"chi2"``, see `inform_rm.eval.detection.outliers.mahalanobis_outlier_probability`.
        max_change_ratio: see `inform_rm.eval.detection.early_stopping.CSIEarlyStopping`, applied to the normalized CSI
            over the candidates in order.
        max_responses: use a random subset of this many responses of each file.
        on_bad_row: ``"error"`` or ``"skip"``, which leaves out, counts and lists rows that cannot be scored. All rows
            in use are checked before the first is scored.
        num_outliers: outliers of each candidate that the result names, the farthest first.
        num_splits: splits of the reference that show what comes by chance.
        num_resamples: bootstrap resamples for the interval of CSI.
        map_points: most points of each set on the map.
        seed: of subsets, splits, resamples and the map.
        progress: show progress bars.
        scorer_options: keywords of `RewardScorer`.

    Returns:
        ``kind`` and ``dimensions`` of the latents, ``eps``, ``reference`` and ``candidates`` (each with counts,
        ``bad_rows``, where there are any the first ``bad_row_reasons``, mean reward, words and repeated trigrams;
        candidates with ``csi``, ``csi_normalized``, ``mop``, their intervals and ``_null_rank``, ``most_outlying``
        and, from the third on, ``stop``), ``null``, settings, seed, versions and digests of the files.

    Raises:
        InputError: on bad or too few responses, one prompt only, or wrong arguments.
    """
    files = [candidates] if isinstance(candidates, str | Path) else list(candidates)
    if on_bad_row not in BAD_ROW_POLICIES:
        raise InputError(f"on_bad_row: got {on_bad_row!r}; expected one of {', '.join(BAD_ROW_POLICIES)}.")
    if not files:
        raise InputError("candidates: expected at least one file of responses.")
    for name, value, least in (("num_outliers", num_outliers, 0), ("map_points", map_points, 10)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name}: {value!r}; expected a whole number of at least {least}.")
    folder = None if output is None else check_output_directory(output)
    scorer = as_scorer(model, tokenizer, scorer_options)
    names = _distinct_names([Path(file).name for file in files])
    rows: dict[str, list[ScoreRow]] = {}
    left_out: dict[str, dict[str, Any]] = {}
    for name, file in zip(("(reference)", *names), (reference, *files), strict=True):
        rows[name], left_out[name] = _read(scorer, file, columns, max_responses, seed, on_bad_row)
        warn_of_left_out({"source": str(file), **left_out[name]})
    _check_size(reference, len(rows["(reference)"]), alpha, tail)
    latents = {
        name: collect_latents(
            scorer,
            [row.prompt for row in part],
            [row.response for row in part],
            places=[row.where for row in part],
            progress=progress,
        )
        for name, part in rows.items()
    }
    base = latents["(reference)"]
    fitted = fit_mahalanobis(base.values, seed=seed)
    smallest = min(len(part) for part in rows.values())
    radius = eps if eps != "auto" else auto_eps(base.values, min_samples=min_samples, num_points=smallest, seed=seed)
    clustering: dict[str, Any] = {"eps": radius, "min_samples": min_samples, "noise": noise, "seed": seed}
    by_chance = _null(base, clustering, alpha, tail, num_splits, seed, progress)
    stopping = CSIEarlyStopping(max_change_ratio)
    found = []
    table: dict[str, list[Any]] = {"set": [], "row": [], "response": [], "reward": [], "squared_mahalanobis": [],
                                     "tail_probability": [], "cluster": []}  # fmt: skip
    for name, part in rows.items():
        own = latents[name]
        squared = fitted.squared_distances(own.values)
        tails = fitted.tail_probabilities(squared, tail)
        clusters = separate_clusters(own.values, base.values, **clustering)
        cluster_of: list[int | None] = [None] * len(part)
        for row, cluster in zip(clusters.rows.tolist(), clusters.cluster_of_row.tolist(), strict=True):
            cluster_of[row] = cluster
        table["set"] += [name] * len(part)
        table["row"] += [row.where for row in part]
        table["response"] += [row.response for row in part]
        for column, values in (("reward", own.rewards), ("squared_mahalanobis", squared), ("tail_probability", tails)):
            table[column] += values.tolist()
        table["cluster"] += cluster_of
        if name == "(reference)":
            continue
        entry = {
            "name": name,
            **_text_statistics(part, own),
            **left_out[name],
            "csi": clusters.csi,
            "csi_normalized": clusters.normalized_csi,
            "csi_normalized_interval": _csi_interval(own, base, clustering, num_resamples),
            "mop": float((tails < alpha).mean()),
            "mop_interval": list(wilson_interval(int((tails < alpha).sum()), len(tails))),
            "noise_share": float(clusters.is_noise.mean()),
            "subsampled": clusters.subsampled,
            "most_outlying": _most_outlying(part, own, squared, tails, num_outliers),
        }
        for statistic, values in by_chance.items():
            entry[f"{statistic}_null_rank"] = null_rank(entry[statistic], values)
        entry["stop"] = stopping.update(entry["csi_normalized"])
        found.append(entry)
    null = {
        name: {"mean": float(values.mean()), "interval": np.quantile(values, [0.025, 0.975]).tolist()}
        for name, values in by_chance.items()
    }
    result = {
        "model": scorer.name,
        "model_fingerprint": scorer.identity()["model"],
        "kind": base.kind,
        "dimensions": base.values.shape[1],
        "eps": radius,
        "reference": {**_text_statistics(rows["(reference)"], base), **left_out["(reference)"]},
        "candidates": found,
        "null": {"splits": num_splits, **null},
        "settings": {
            "reference": str(reference), "candidates": [str(file) for file in files], "eps": eps,
            "min_samples": min_samples, "noise": noise, "alpha": alpha, "tail": tail,
            "max_change_ratio": max_change_ratio, "max_responses": max_responses, "on_bad_row": on_bad_row,
            "columns": None if columns is None else dict(columns),
        },
        "digests": {str(file): source_digest(file) for file in (reference, *files)},
        "seed": seed,
        "versions": versions(),
    }  # fmt: skip
    if folder is not None:
        _add_places(table, latents, alpha, map_points, seed)
        _write(folder, result, table)
    return result


def repeated_trigrams(text: str) -> float:
    """Share of a text's word trigrams that occurred in it before; 0 for a text of fewer than three words."""
    words = text.split()
    trigrams = Counter(zip(words, words[1:], words[2:], strict=False))
    total = sum(trigrams.values())
    return (total - len(trigrams)) / total if total else 0.0


def _read(
    scorer: RewardScorer,
    file: str | Path,
    columns: Mapping[str, str] | None,
    max_responses: int | None,
    seed: int,
    on_bad_row: str,
) -> tuple[list[ScoreRow], dict[str, Any]]:
    """The responses of a file that can be scored, a random subset if one is asked for, and what was left out."""
    reading = Reading()
    read = list(score_rows_or_faults(file, columns, reading))
    log_reading(str(file), reading)
    faults = [row for row in read if isinstance(row, RowFault)]
    rows = [row for row in read if isinstance(row, ScoreRow)]
    if max_responses is not None and len(rows) > max_responses:
        chosen = np.random.default_rng(seed).choice(len(rows), max_responses, replace=False)
        rows = [rows[place] for place in sorted(chosen.tolist())]
    checked = encoded_or_faults(scorer, rows)
    faults += [row for row in checked if isinstance(row, RowFault)]
    rows = [row[0] for row in checked if not isinstance(row, RowFault)]
    if faults and on_bad_row == "error":
        raise InputError(f"{faults[0].reason} (on_bad_row='skip' leaves bad rows out and lists them.)")
    left_out: dict[str, Any] = {"bad_rows": len(faults)}
    if faults:
        left_out["bad_row_reasons"] = [fault.reason for fault in faults[:_LISTED_BAD_ROWS]]
    if len(rows) < _SMALLEST_SET:
        bad = f" and {len(faults)} bad rows ({faults[0].reason})" if faults else ""
        raise InputError(
            f"{file}: {len(rows)} responses{bad}; a comparison of latents needs at least {_SMALLEST_SET}."
        )
    if len({str(row.prompt) for row in rows}) < 2:
        raise InputError(
            f"{file}: all responses have the same prompt; what its latents show would be that prompt. Pass responses "
            "to several prompts."
        )
    return rows, left_out


def _check_size(reference: str | Path, size: int, alpha: float, tail: str) -> None:
    """Halves of the reference stand for it in the null, and must have ranks below alpha."""
    if not 0 < alpha < 1:
        raise InputError(f"alpha: {alpha!r}; it is a probability, above 0 and below 1 (default 0.01).")
    least = 2 * math.floor(1 / alpha) + 1
    if tail == "reference" and size < least:
        raise InputError(
            f"{reference}: {size} responses; with alpha {alpha} their halves show no outliers by rank: pass at least "
            f"{least}, a larger alpha, or tail='chi2'."
        )


def _distinct_names(names: list[str]) -> list[str]:
    """File names, numbered where one comes twice."""
    return [
        name if names.count(name) == 1 else f"{name} ({place + 1})" for place, name in enumerate(names)
    ]  # fmt: skip


def _null(
    base: Latents, clustering: dict[str, Any], alpha: float, tail: str, num_splits: int, seed: int, progress: bool
) -> dict[str, np.ndarray]:
    """What CSI and MOP are when candidate and reference are halves of the same responses: one value a split."""

    def csi(candidate: np.ndarray, reference: np.ndarray) -> float:
        return cluster_separation_index(candidate, reference, normalized=True, **clustering)

    def mop(candidate: np.ndarray, reference: np.ndarray) -> float:
        return fit_mahalanobis(reference).outlier_probability(candidate, alpha=alpha, tail=tail).estimate

    return {
        name: split_half_null(base.values, statistic, num_splits=num_splits, seed=seed, progress=progress)
        for name, statistic in (("csi_normalized", csi), ("mop", mop))
    }


def _csi_interval(own: Latents, base: Latents, clustering: dict[str, Any], num_resamples: int) -> list[float]:
    interval = csi_interval(own.values, base.values, normalized=True, num_resamples=num_resamples, **clustering)
    return [interval.low, interval.high]


def _text_statistics(rows: list[ScoreRow], own: Latents) -> dict[str, Any]:
    """Appendix D of arXiv:2402.09345: responses of an overoptimized policy are longer, or repeat themselves."""
    return {
        "num_responses": len(rows),
        "num_prompts": len({str(row.prompt) for row in rows}),
        "mean_reward": float(own.rewards.mean()),
        "mean_words": float(np.mean([len(row.response.split()) for row in rows])),
        "repeated_trigrams": float(np.mean([repeated_trigrams(row.response) for row in rows])),
    }


def _most_outlying(
    rows: list[ScoreRow], own: Latents, squared: np.ndarray, tails: np.ndarray, number: int
) -> list[dict[str, Any]]:
    return [
        {
            "row": rows[place].where,
            "prompt": "\n".join(message["content"] for message in rows[place].prompt),
            "response": rows[place].response,
            "reward": float(own.rewards[place]),
            "squared_mahalanobis": float(squared[place]),
            "tail_probability": float(tails[place]),
        }
        for place in np.argsort(-squared, kind="stable")[:number].tolist()
    ]


def _add_places(
    columns: dict[str, list[Any]], latents: dict[str, Latents], alpha: float, map_points: int, seed: int
) -> None:
    """Columns ``kind``, and ``x`` and ``y`` on a t-SNE map for a random part of each set (``None`` for the rest)."""
    columns["kind"] = [
        "reference" if name == "(reference)" else "outlier" if tail < alpha else "candidate"
        for name, tail in zip(columns["set"], columns["tail_probability"], strict=True)
    ]
    rng = np.random.default_rng(seed)
    starts = np.cumsum([0, *(len(part.values) for part in latents.values())])
    kept = np.concatenate([
        first + np.sort(rng.choice(size, min(size, map_points), replace=False))
        for first, size in zip(starts[:-1], np.diff(starts), strict=True)
    ])  # fmt: skip
    values = np.concatenate([part.values for part in latents.values()])[kept]
    # Equal scales, so that no dimension rules the map by its unit.
    values = (values - values.mean(axis=0)) / np.maximum(values.std(axis=0), 1e-12)
    placed = TSNE(perplexity=min(30.0, (len(values) - 1) / 3), init="pca", random_state=seed).fit_transform(values)
    for number, axis in enumerate("xy"):
        columns[axis] = [None] * len(columns["set"])
        for row, place in zip(kept.tolist(), placed[:, number].round(3).tolist(), strict=True):
            columns[axis][row] = place


def _points(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """What the map shows of the placed rows; outliers last, so that they are drawn over the others."""
    rows = [row for row, x in enumerate(columns["x"]) if x is not None]
    rows.sort(key=lambda row: columns["kind"][row] == "outlier")
    points = {name: [columns[name][row] for row in rows] for name in ("x", "y", "kind", "set", "reward", "response")}
    return points | {"response": [report.shortened(text) for text in points["response"]]}


def _write(folder: Path, result: dict[str, Any], columns: dict[str, list[Any]]) -> None:
    points = _points(columns)
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    atomic_write_bytes(folder / "responses.parquet", buffer.getvalue())
    map_png = figure_png(report.map_figure(points))
    atomic_write_bytes(folder / "map.png", map_png)
    steps_png = None
    if len(result["candidates"]) > 1:
        steps_png = figure_png(report.steps_figure(result))
        atomic_write_bytes(folder / "steps.png", steps_png)
    else:
        (folder / "steps.png").unlink(missing_ok=True)
    atomic_write_text(folder / "result.html", report.result_page(result, points, map_png, steps_png).html())
    write_json(folder / "result.json", result)  # last: its presence says that the rest is complete
