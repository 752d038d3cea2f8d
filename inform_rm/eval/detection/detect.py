"""Does a policy exploit its reward model? Latents of its responses against those of a reference."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inform_rm.data.columns import Reading, log_reading
from inform_rm.data.response_rows import RowFault, ScoreRow, score_rows_or_faults
from inform_rm.data.sources import Source, source_digest, source_label, source_list
from inform_rm.errors import InputError
from inform_rm.eval.detection.clusters import auto_eps
from inform_rm.eval.detection.early_stopping import CSIEarlyStopping, RewardFallStopping
from inform_rm.eval.detection.labels import FIELD, agreement, join_labels, labels_by_name
from inform_rm.eval.detection.latents import Latents, collect_latents
from inform_rm.eval.detection.outliers import null_rank, split_half_null
from inform_rm.eval.detection.report import REFERENCE, DetectionResult
from inform_rm.eval.detection.settings import DetectionSettings
from inform_rm.eval.detection.statistic import STATISTICS, Statistic
from inform_rm.eval.frame import Frame, parquet, settings_of
from inform_rm.eval.sources import warn_of_left_out
from inform_rm.scoring.score_files import encoded_or_faults
from inform_rm.scoring.scorer import RewardScorer
from inform_rm.util.intervals import grouped_bootstrap

_SMALLEST_SET = 20
_LISTED_BAD_ROWS = 1000


def detect(
    model: str | Path | torch.nn.Module | RewardScorer,
    reference: Source,
    candidates: "Source | Sequence[Source] | Mapping[str, Source]",
    output: str | Path | None = None,
    *,
    labels: "Source | Sequence[Source] | Mapping[str, Source] | None" = None,
    tokenizer: Any = None,
    progress: bool = True,
    **options: Any,
) -> DetectionResult:
    """Compare the latents of candidate responses with those of a reference (arXiv:2402.09345, arXiv:2510.13694).

    With ``output`` the folder receives ``responses.parquet`` (every response with reward, distance, tail probability,
    cluster and place on the map), ``map.png``, with several candidates ``steps.png``, ``result.html`` (a map on which
    pointing at a point shows its response), ``result.md`` and at last ``result.json``.

    Args:
        model: folder, Hub id, loaded model, or a `RewardScorer`: an InfoRM model; others give hidden states, and the
            result says so.
        reference: responses of the policy before training, with ``prompt`` and ``response``: a file, folder or Hub
            id, a `Dataset`, or a list of dictionaries, see `inform_rm.data.response_rows.score_rows_or_faults`.
        candidates: responses of the policy under test: one such set, several in order (one for each checkpoint), or
            several by name.
        output: folder for the results; ``None`` only returns them.
        labels: which candidate responses exploit a reward, by a judge or by people: one source a candidate, in order
            or by name; see `inform_rm.eval.detection.labels.join_labels`. They add precision and recall of each
            statistic's outliers, and marks on the map. An outlier of CSI is a response whose cluster lies farther
            from the reference than all but ``alpha`` of the responses in halves of the reference do.
        tokenizer: see `RewardScorer`.
        progress: show progress bars.
        options: fields of `inform_rm.eval.detection.settings.DetectionSettings` and keywords of `RewardScorer`.

    Returns:
        The statistics of each candidate, and what they are by chance.

    Raises:
        InputError: on bad or too few responses, one prompt only, or wrong arguments.
    """
    settings, scorer_options = settings_of(DetectionSettings, options)
    sources = {REFERENCE: reference, **_named(candidates)}
    names = {name: _label(name, source) for name, source in sources.items()}
    labelled = labels_by_name(labels, [name for name in sources if name != REFERENCE])
    frame = Frame(model, output, tokenizer, scorer_options, progress)
    read = {name: _read(frame.scorer, source, name, settings, labelled.get(name)) for name, source in sources.items()}
    rows = {name: part.rows for name, part in read.items()}
    size, least = len(rows[REFERENCE]), 2 * math.floor(1 / settings.alpha) + 1
    if settings.tail == "reference" and size < least:  # halves stand for it in the null, and need ranks below alpha
        raise InputError(
            f"{names[REFERENCE]}: {size} responses; with alpha {settings.alpha} their halves show no outliers by "
            f"rank: pass at least {least}, a larger alpha, or tail='chi2'."
        )
    latents = {
        name: collect_latents(
            frame.scorer,
            [row.prompt for row in part],
            [row.response for row in part],
            places=[row.where for row in part],
            progress=frame.progress,
        )
        for name, part in rows.items()
    }
    base = latents[REFERENCE].values
    eps: Any = settings.eps
    if eps == "auto":  # one radius for all candidates and the null
        smallest = min(map(len, rows.values()))
        eps = auto_eps(base, min_samples=settings.min_samples, num_points=smallest, seed=settings.seed)
    null, csi_limit = _null(base, replace(settings, eps=eps), frame.progress)
    table, found = _measure(read, latents, replace(settings, eps=eps), null, csi_limit)
    found = {
        name: {**_text_statistics(part.rows, latents[name], settings), **part.left_out, **found[name]}
        for name, part in read.items()
    }
    asked = {"reference": names.pop(REFERENCE), "candidates": list(names.values()), **asdict(settings)}
    asked |= {"labels": [source_label(source) for source in labelled.values()]} if labelled else {}
    del asked["seed"]  # it has a place of its own
    result = DetectionResult(
        **frame.described(asked, settings.seed),
        kind=latents[REFERENCE].kind,
        dimensions=base.shape[1],
        eps=eps,
        reference=found.pop(REFERENCE),
        candidates=[{"name": name, **values} for name, values in found.items()],
        null={"splits": settings.num_splits}
        | {
            name: {"mean": float(values.mean()), "interval": np.quantile(values, [0.025, 0.975]).tolist()}
            for name, values in null.items()
        },
        digests={_label(name, source): source_digest(source) for name, source in sources.items()}
        | {f"labels of {name}": source_digest(source) for name, source in labelled.items()},
        responses=table,
        values=np.concatenate([part.values for part in latents.values()]),
    )
    if frame.folder is not None:
        (frame.folder / "steps.png").unlink(missing_ok=True)  # of an earlier call with several candidates
        frame.finish(result, {"responses.parquet": parquet({**table, **result.places})})
    return result


def repeated_trigrams(text: str) -> float:
    """Share of a text's word trigrams that occurred in it before; 0 for a text of fewer than three words."""
    words = text.split()
    trigrams = Counter(zip(words, words[1:], words[2:], strict=False))
    total = sum(trigrams.values())
    return (total - len(trigrams)) / total if total else 0.0


def _named(candidates: "Source | Sequence[Source] | Mapping[str, Source]") -> dict[str, Source]:
    """The sets by name: as given, by the file's name (numbered where one comes twice), or by number."""
    if isinstance(candidates, Mapping):
        found = {str(name): source for name, source in candidates.items()}
    else:
        sources = source_list(candidates)
        names = [Path(source).name if isinstance(source, str | Path) else "candidate" for source in sources]
        found = {
            name if names.count(name) == 1 else f"{name} ({place})": source
            for place, (name, source) in enumerate(zip(names, sources, strict=True), start=1)
        }
    if not found or REFERENCE in found:
        raise InputError(
            f"candidates: {list(found)}; expected at least one set of responses, none called {REFERENCE}."
        )
    return found


def _label(name: str, source: Source) -> str:
    """How a set is called in messages and settings: by its source as it was written, if it was."""
    return source_label(source) if isinstance(source, str | Path) else name


@dataclass(frozen=True)
class _ReadSet:
    """Responses of a set, how many were left out and why, and labels by the ``where`` of a row."""

    rows: list[ScoreRow]
    left_out: dict[str, Any]
    labels: dict[str, bool] | None


def _read(
    scorer: RewardScorer, source: Source, name: str, settings: DetectionSettings, label_source: Source | None
) -> _ReadSet:
    """The responses of a set that can be scored, a random subset if one is asked for, and what was left out."""
    reading = Reading()
    label = _label(name, source)
    read = list(score_rows_or_faults(source, settings.columns, reading))
    log_reading(label, reading)
    labels = None if label_source is None else join_labels(read, label_source)
    rows = [row for row in read if isinstance(row, ScoreRow)]
    if settings.max_responses is not None and len(rows) > settings.max_responses:
        chosen = np.random.default_rng(settings.seed).choice(len(rows), settings.max_responses, replace=False)
        rows = [rows[place] for place in sorted(chosen.tolist())]
    checked = encoded_or_faults(scorer, rows)
    reasons = [row.reason for row in [*read, *checked] if isinstance(row, RowFault)]
    rows = [row[0] for row in checked if not isinstance(row, RowFault)]
    if reasons and settings.on_bad_row == "error":
        of_set = "" if isinstance(source, str | Path) else f"{name}: "  # a row in memory does not say whose it is
        raise InputError(f"{of_set}{reasons[0]} (on_bad_row='skip' leaves bad rows out and lists them.)")
    if len(rows) < _SMALLEST_SET:
        bad = f" and {len(reasons)} bad rows ({reasons[0]})" if reasons else ""
        raise InputError(
            f"{label}: {len(rows)} responses{bad}; a comparison of latents needs at least {_SMALLEST_SET}."
        )
    if len({str(row.prompt) for row in rows}) < 2:
        raise InputError(
            f"{label}: all responses have the same prompt; what its latents show would be that prompt. Pass responses "
            "to several prompts."
        )
    left_out: dict[str, Any] = {"bad_rows": len(reasons)}
    if reasons:
        left_out["bad_row_reasons"] = reasons[:_LISTED_BAD_ROWS]
    warn_of_left_out({"source": label, **left_out})
    return _ReadSet(rows, left_out, labels)


def _null(reference: np.ndarray, settings: DetectionSettings, progress: bool) -> tuple[dict[str, np.ndarray], float]:
    """What each statistic is when candidate and reference are halves of the same responses: one value a split.

    Also the distance of a response's cluster that only a share of alpha of these responses exceeds.
    """
    distances: list[float] = []

    def values(statistic: Statistic) -> np.ndarray:
        def measure(candidate: np.ndarray, others: np.ndarray) -> float:
            found, columns = statistic.fit(others, settings)(candidate, 0)
            distances.extend(distance for distance in columns.get("csi_distance", ()) if distance is not None)
            return found[statistic.name]

        return split_half_null(
            reference, measure, num_splits=settings.num_splits, seed=settings.seed, progress=progress
        )

    null = {statistic.name: values(statistic) for statistic in STATISTICS}
    limit = np.quantile(distances, 1 - settings.alpha, method="higher") if distances else np.inf
    return null, float(limit)


def _measure(
    read: dict[str, _ReadSet],
    latents: dict[str, Latents],
    settings: DetectionSettings,
    null: dict[str, np.ndarray],
    csi_limit: float,
) -> tuple[dict[str, list[Any]], dict[str, dict[str, Any]]]:
    """Columns with one entry for each response of all sets; and by set what the statistics say of it."""
    measures = [statistic.fit(latents[REFERENCE].values, settings) for statistic in STATISTICS]
    stopping, falling = CSIEarlyStopping(settings.max_change_ratio), RewardFallStopping(settings.max_reward_fall)
    table: dict[str, list[Any]] = {}
    found: dict[str, dict[str, Any]] = {REFERENCE: {}}
    has_labels = any(of_set.labels for of_set in read.values())
    for name, of_set in read.items():
        part = of_set.rows
        columns: dict[str, list[Any]] = {"set": [name] * len(part), "row": [row.where for row in part]}
        columns |= {"response": [row.response for row in part], "reward": latents[name].rewards.tolist()}
        values: dict[str, Any] = {}
        for measure in measures:
            more, per_response = measure(latents[name].values, 0 if name == REFERENCE else settings.num_resamples)
            values |= more
            columns |= per_response
        columns["csi_outlier"] = [
            None if distance is None else distance > csi_limit for distance in columns["csi_distance"]
        ]
        if has_labels:
            columns[FIELD] = [(of_set.labels or {}).get(row.where) for row in part]
        if of_set.labels is not None:
            values["labels"] = agreement(columns)
        for column, entries in columns.items():
            table.setdefault(column, []).extend(entries)
        rewards = latents[name].rewards
        fell = falling.update(float(rewards.mean()), float(rewards.std(ddof=1)) / math.sqrt(len(rewards)))
        if name != REFERENCE:
            values["most_outlying"] = _most_outlying(part, columns, settings.num_outliers)
            values |= {f"{key}_null_rank": null_rank(values[key], by_chance) for key, by_chance in null.items()}
            found[name] = {**values, "stop": stopping.update(values["csi_normalized"]), "reward_fell": fell}
    return table, found


def _text_statistics(rows: list[ScoreRow], own: Latents, settings: DetectionSettings) -> dict[str, Any]:
    """Appendix D of arXiv:2402.09345: responses of an overoptimized policy are longer, or repeat themselves."""
    words = [len(row.response.split()) for row in rows]
    interval = grouped_bootstrap(words, [str(row.prompt) for row in rows], seed=settings.seed)
    return {
        "num_responses": len(rows),
        "num_prompts": len({str(row.prompt) for row in rows}),
        "mean_reward": float(own.rewards.mean()),
        "mean_words": float(np.mean(words)),
        "mean_words_interval": list(interval),
        "repeated_trigrams": float(np.mean([repeated_trigrams(row.response) for row in rows])),
    }


def _most_outlying(rows: list[ScoreRow], columns: dict[str, list[Any]], number: int) -> list[dict[str, Any]]:
    """The farthest by Mahalanobis distance, with what every statistic says of them."""
    order = np.argsort(-np.array(columns["squared_mahalanobis"]), kind="stable")
    return [
        {
            "prompt": "\n".join(message["content"] for message in rows[place].prompt),
            **{name: entries[place] for name, entries in columns.items() if name != "set"},
        }
        for place in order[:number].tolist()
    ]
