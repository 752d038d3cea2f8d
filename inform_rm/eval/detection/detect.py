"""Does a policy exploit its reward model? Latents of its responses against those of a reference."""

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from inform_rm.data.columns import Reading, log_reading
from inform_rm.data.response_rows import RowFault, ScoreRow, score_rows_or_faults
from inform_rm.data.sources import Source, source_digest, source_label, source_list
from inform_rm.errors import InputError
from inform_rm.eval.detection.early_stopping import CSIEarlyStopping
from inform_rm.eval.detection.latents import Latents, collect_latents
from inform_rm.eval.detection.outliers import auto_eps, null_rank, split_half_null
from inform_rm.eval.detection.report import REFERENCE, DetectionResult
from inform_rm.eval.detection.settings import DetectionSettings
from inform_rm.eval.detection.statistic import STATISTICS, Statistic
from inform_rm.eval.frame import Frame
from inform_rm.eval.sources import warn_of_left_out
from inform_rm.scoring.score_files import encoded_or_faults
from inform_rm.scoring.scorer import RewardScorer

_SMALLEST_SET = 20
_LISTED_BAD_ROWS = 1000


def detect(
    model: str | Path | torch.nn.Module | RewardScorer,
    reference: Source,
    candidates: "Source | Sequence[Source] | Mapping[str, Source]",
    output: str | Path | None = None,
    *,
    settings: DetectionSettings = DetectionSettings(),  # noqa: B008 (it cannot be changed)
    tokenizer: Any = None,
    columns: Mapping[str, str] | None = None,
    progress: bool = True,
    **scorer_options: Any,
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
        settings: of the comparison.
        tokenizer: see `RewardScorer`.
        columns: which columns are prompt, response, system and history: see `inform_rm.data.columns.Columns.of`.
        progress: show progress bars.
        scorer_options: keywords of `RewardScorer`.

    Raises:
        InputError: on bad or too few responses, one prompt only, or wrong arguments.

    Example:
        >>> result = detect("runs/first", before, {"step 100": after})  # doctest: +SKIP
        >>> result.candidates[0]["mop"], result.candidates[0]["mop_null_rank"]  # doctest: +SKIP
    """
    sources = {REFERENCE: reference, **_named(candidates)}
    for name in scorer_options.keys() & asdict(settings).keys():
        raise InputError(f"{name}: a setting of the comparison. Pass settings=DetectionSettings({name}=...).")
    stopping = CSIEarlyStopping(settings.max_change_ratio)
    frame = Frame(model, output, tokenizer, scorer_options, progress)
    rows: dict[str, list[ScoreRow]] = {}
    about: dict[str, dict[str, Any]] = {}
    for name, source in sources.items():
        rows[name], about[name] = _read(frame.scorer, source, name, columns, settings)
        warn_of_left_out({"source": _label(name, source), **about[name]})
    _check_size(_label(REFERENCE, reference), len(rows[REFERENCE]), settings)
    latents = {name: _latents(frame, part) for name, part in rows.items()}
    base = latents[REFERENCE].values
    eps: Any = settings.eps
    if eps == "auto":  # one radius for all candidates and the null
        smallest = min(map(len, rows.values()))
        eps = auto_eps(base, min_samples=settings.min_samples, num_points=smallest, seed=settings.seed)
    measured_with = replace(settings, eps=eps)
    null = _null(base, measured_with, frame.progress)
    measures = [statistic.fit(base, measured_with) for statistic in STATISTICS]
    table: dict[str, list[Any]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, part in rows.items():
        own = latents[name]
        values: dict[str, Any] = {}
        columns_of_set = {"set": [name] * len(part), "row": [row.where for row in part]}
        columns_of_set |= {"response": [row.response for row in part], "reward": own.rewards.tolist()}
        for measure in measures:
            more, per_response = measure(own.values, 0 if name == REFERENCE else settings.num_resamples)
            values |= more
            columns_of_set |= per_response
        for column, entries in columns_of_set.items():
            table.setdefault(column, []).extend(entries)
        found[name] = {**_text_statistics(part, own), **about[name]}
        if name != REFERENCE:
            values["most_outlying"] = _most_outlying(part, columns_of_set, settings.num_outliers)
            values |= {f"{key}_null_rank": null_rank(values[key], by_chance) for key, by_chance in null.items()}
            found[name] |= {**values, "stop": stopping.update(values["csi_normalized"])}
    labels = [_label(name, source) for name, source in sources.items()]
    asked = asdict(settings) | {"reference": labels[0], "candidates": labels[1:], "columns": columns and dict(columns)}
    result = DetectionResult(
        **frame.described(asked, asked.pop("seed")),
        kind=latents[REFERENCE].kind,
        dimensions=base.shape[1],
        eps=eps,
        reference=found.pop(REFERENCE),
        candidates=[{"name": name, **values} for name, values in found.items()],
        null={"splits": settings.num_splits, **{name: _spread(values) for name, values in null.items()}},
        digests={label: source_digest(source) for label, source in zip(labels, sources.values(), strict=True)},
        responses=table,
        values=np.concatenate([part.values for part in latents.values()]),
    )
    if frame.folder is not None:
        (frame.folder / "steps.png").unlink(missing_ok=True)  # of an earlier call with several candidates
        buffer = io.BytesIO()
        pq.write_table(pa.table({**table, **result.places}), buffer)
        frame.finish(result, {"responses.parquet": buffer.getvalue()})
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


def _read(
    scorer: RewardScorer, source: Source, name: str, columns: Mapping[str, str] | None, settings: DetectionSettings
) -> tuple[list[ScoreRow], dict[str, Any]]:
    """The responses of a set that can be scored, a random subset if one is asked for, and what was left out."""
    reading = Reading()
    label = _label(name, source)
    read = list(score_rows_or_faults(source, columns, reading))
    log_reading(label, reading)
    faults = [row for row in read if isinstance(row, RowFault)]
    rows = [row for row in read if isinstance(row, ScoreRow)]
    if settings.max_responses is not None and len(rows) > settings.max_responses:
        chosen = np.random.default_rng(settings.seed).choice(len(rows), settings.max_responses, replace=False)
        rows = [rows[place] for place in sorted(chosen.tolist())]
    checked = encoded_or_faults(scorer, rows)
    faults += [row for row in checked if isinstance(row, RowFault)]
    rows = [row[0] for row in checked if not isinstance(row, RowFault)]
    of_set = "" if isinstance(source, str | Path) else f"{name}: "  # a row in memory does not say whose it is
    if faults and settings.on_bad_row == "error":
        raise InputError(f"{of_set}{faults[0].reason} (on_bad_row='skip' leaves bad rows out and lists them.)")
    left_out: dict[str, Any] = {"bad_rows": len(faults)}
    if faults:
        left_out["bad_row_reasons"] = [fault.reason for fault in faults[:_LISTED_BAD_ROWS]]
    if len(rows) < _SMALLEST_SET:
        bad = f" and {len(faults)} bad rows ({faults[0].reason})" if faults else ""
        raise InputError(
            f"{label}: {len(rows)} responses{bad}; a comparison of latents needs at least {_SMALLEST_SET}."
        )
    if len({str(row.prompt) for row in rows}) < 2:
        raise InputError(
            f"{label}: all responses have the same prompt; what its latents show would be that prompt. Pass responses "
            "to several prompts."
        )
    return rows, left_out


def _check_size(reference: str, size: int, settings: DetectionSettings) -> None:
    """Halves of the reference stand for it in the null, and must have ranks below alpha."""
    least = 2 * math.floor(1 / settings.alpha) + 1
    if settings.tail == "reference" and size < least:
        raise InputError(
            f"{reference}: {size} responses; with alpha {settings.alpha} their halves show no outliers by rank: pass "
            f"at least {least}, a larger alpha, or tail='chi2'."
        )


def _latents(frame: Frame, rows: list[ScoreRow]) -> Latents:
    prompts, responses, places = zip(*((row.prompt, row.response, row.where) for row in rows), strict=True)
    return collect_latents(frame.scorer, prompts, responses, places=places, progress=frame.progress)


def _null(reference: np.ndarray, settings: DetectionSettings, progress: bool) -> dict[str, np.ndarray]:
    """What each statistic is when candidate and reference are halves of the same responses: one value a split."""

    def values(statistic: Statistic) -> np.ndarray:
        return split_half_null(
            reference,
            lambda candidate, others: statistic.fit(others, settings)(candidate, 0)[0][statistic.name],
            num_splits=settings.num_splits,
            seed=settings.seed,
            progress=progress,
        )

    return {statistic.name: values(statistic) for statistic in STATISTICS}


def _spread(values: np.ndarray) -> dict[str, Any]:
    return {"mean": float(values.mean()), "interval": np.quantile(values, [0.025, 0.975]).tolist()}


def _text_statistics(rows: list[ScoreRow], own: Latents) -> dict[str, Any]:
    """Appendix D of arXiv:2402.09345: responses of an overoptimized policy are longer, or repeat themselves."""
    return {
        "num_responses": len(rows),
        "num_prompts": len({str(row.prompt) for row in rows}),
        "mean_reward": float(own.rewards.mean()),
        "mean_words": float(np.mean([len(row.response.split()) for row in rows])),
        "repeated_trigrams": float(np.mean([repeated_trigrams(row.response) for row in rows])),
    }


def _most_outlying(rows: list[ScoreRow], columns: dict[str, list[Any]], number: int) -> list[dict[str, Any]]:
    """The farthest by Mahalanobis distance, with what every statistic says of them."""
    squared = np.array(columns["squared_mahalanobis"])
    return [
        {
            "prompt": "\n".join(message["content"] for message in rows[place].prompt),
            **{name: entries[place] for name, entries in columns.items() if name != "set"},
        }
        for place in np.argsort(-squared, kind="stable")[:number].tolist()
    ]
