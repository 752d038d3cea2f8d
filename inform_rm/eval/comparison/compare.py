"""Comparing reward models on the same rows: what `inform-rm evaluate` wrote for each, in one table with tests."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inform_rm.data.sources import Sources
from inform_rm.errors import InputError
from inform_rm.eval.comparison.paired import (
    holm_adjusted,
    length_controlled_accuracy,
    length_scale,
    mcnemar_test,
    paired_bootstrap,
)
from inform_rm.eval.comparison.report import ComparisonResult
from inform_rm.eval.comparison.result_rows import ResultRows, matched, read_result_rows
from inform_rm.eval.evaluate import evaluate
from inform_rm.eval.frame import json_lines
from inform_rm.eval.results import EvaluationResult, RankingResult, ScoreResult
from inform_rm.eval.suites.report import SuiteResult
from inform_rm.scoring.scorer import RewardScorer
from inform_rm.util.files import check_output_directory
from inform_rm.util.intervals import wilson_interval

_OWN_FILES = ("result.json", "result.md", "result.html", "forest.png", "flips.jsonl")
_ROUNDING = 1e-9  # a weighted mean of 0.8 may come out as 0.7999999999999999
Evaluated = str | Path | EvaluationResult | SuiteResult


def compare(
    results: Mapping[str, Evaluated] | Sequence[Evaluated] | Evaluated | None = None,
    output: str | Path | None = None,
    *,
    models: Mapping[str, str | Path | torch.nn.Module | RewardScorer] | None = None,
    data: Sources | None = None,
    fail_below: Mapping[str, float] | None = None,
    num_resamples: int = 10_000,
    seed: int = 0,
    **evaluate_options: Any,
) -> ComparisonResult:
    """Compare reward models row by row: paired intervals, McNemar tests, length-controlled accuracy, flipped rows.

    Takes either results of `inform_rm.evaluate` or `evaluate_suite`, or folders that they wrote (``results``), or
    models, which are first evaluated on ``data`` (into ``output/NAME`` where there is an output). The first is the
    baseline of all differences. Rows are matched by data, subset and id; models that were not evaluated on
    exactly the same rows are refused.

    The accuracy of a group of rows is their mean credit: of a pair 1, 0.5 for a tie, or 0; of a suite's item what the
    suite gives. A suite's published scores weigh rows in their own way and stand beside it. See
    `inform_rm.eval.comparison.paired` for the statistics. P-values come as they are and adjusted by Holm's method,
    where one family is all tests of a level (all rows, sections, subsets) against the baseline.

    With ``output`` the folder receives ``flips.jsonl``, ``forest.png``, ``result.md``, ``result.html`` and at last
    ``result.json``.

    Args:
        results: folders or results by name, or folders that are named by their last part; one is enough for
            ``fail_below``.
        output: folder for the results; ``None`` only returns them.
        models: in place of ``results``, by name: folders, Hub ids, loaded models or scorers.
        data: with ``models``: pairs, as `inform_rm.evaluate` takes them.
        fail_below: least values, each from 0 to 1, for every model. Names are, of a suite, ``suite`` and
            ``suite.section`` (published scores), of pairs ``accuracy`` and the subsets.
        num_resamples: of the bootstrap.
        seed: of the bootstrap, and of `inform_rm.evaluate`.
        evaluate_options: with ``models``: further keywords of `inform_rm.evaluate`.

    Returns:
        Figures by group of rows, and the rows that flipped.

    Raises:
        InputError: if rows or data differ, a folder holds no finished result, names collide, or ``fail_below`` names
            what was not measured.
    """
    folder = None if output is None else check_output_directory(output)
    if (results is None) == (models is None):
        raise InputError("compare: expected either results (folders of evaluations) or models with data.")
    limits = dict(fail_below or {})
    for name, limit in limits.items():
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 <= limit <= 1:
            raise InputError(f"fail_below: {name}={limit!r}; expected a number from 0 to 1.")
    if models is not None:
        found = _evaluated(models, data, folder, seed, evaluate_options)
    elif data is not None or evaluate_options:
        name = "data" if data is not None else next(iter(evaluate_options))
        raise InputError(f"{name}: belongs to models; results are compared as they are.")
    else:
        found = _named(results)
    rows = matched([read_result_rows(name, source) for name, source in found.items()])
    below = [
        {"model": part.name, "name": name, "value": value, "limit": limits[name]}
        for part in rows
        for name, value in _limited_values(part, limits).items()
        if value < limits[name] - _ROUNDING
    ]
    flips = {other.name: _flips(rows[0], other) for other in rows[1:]}
    counts = {name: Counter(flip["change"] for flip in part) for name, part in flips.items()}
    result = ComparisonResult(
        baseline=rows[0].name,
        suite=rows[0].suite,
        models={part.name: _described(part) for part in rows},
        groups=_groups(rows, num_resamples, seed),
        flips={name: {"gained": count["gained"], "lost": count["lost"]} for name, count in counts.items()},
        limits=limits,
        below=below,
        data=rows[0].result.get("data", []),
        settings={"results": {part.name: part.folder for part in rows}, "num_resamples": num_resamples},
        seed=seed,
        flipped_rows=[flip for part in flips.values() for flip in part],
    )
    if folder is not None:
        result.save(folder, {"flips.jsonl": json_lines(result.flipped_rows)})
    return result


def _evaluated(
    models: Mapping[str, str | Path | torch.nn.Module | RewardScorer],
    data: Sources | None,
    output: Path | None,
    seed: int,
    options: dict[str, Any],
) -> dict[str, Evaluated]:
    """One evaluation a model, in its own folder below the output."""
    if data is None or not models:
        raise InputError("models: expected at least one, with data.")
    for name in models:
        if name != Path(name).name or name in ("", ".", "..", *_OWN_FILES):
            raise InputError(f"models: the name {name!r} cannot be that of a folder in output. Name it NAME=MODEL.")
    folders = {name: None if output is None else output / name for name in models}
    results = {name: evaluate(model, data, folders[name], seed=seed, **options) for name, model in models.items()}
    found: dict[str, Evaluated] = {}
    for name, result in results.items():
        if isinstance(result, RankingResult | ScoreResult):
            raise InputError("data: rankings or scored responses; models are compared on pairs. Evaluate them alone.")
        found[name] = folders[name] or result
    return found


def _named(results: Any) -> dict[str, Evaluated]:
    """Results by name; without one, that is the last part of the folder, or of the model's name."""
    if isinstance(results, Mapping):
        named = dict(results)
    else:
        sources = list(results) if isinstance(results, list | tuple) else [results]
        paths = [Path(each if isinstance(each, str | Path) else each.model) for each in sources]
        named = {path.resolve().name: source for path, source in zip(paths, sources, strict=True)}
        if len(named) < len(sources):
            raise InputError("results: two folders have the same name. Name them apart: {'one': FOLDER, ...}.")
    if not named:
        raise InputError("results: expected at least one folder that `inform-rm evaluate` wrote.")
    return named


def _limited_values(rows: ResultRows, limits: dict[str, float]) -> dict[str, float]:
    """What was measured under each name that has a limit; what was not is refused, for it must not pass."""
    result = rows.result
    found: list[tuple[str, Any]]
    if rows.suite is None:
        found = [("accuracy", result["accuracy"])]
        found += [(name, part["accuracy"]) for name, part in result.get("subsets", {}).items()]
    else:
        no_scores: dict[str, Any] = {str(name): {} for name in rows.sections}  # an incomplete section has rows alone
        sections = no_scores | result.get("sections", {})
        found = [(rows.suite, result.get("score"))]
        found += [(f"{rows.suite}.{name}", part.get("score")) for name, part in sections.items()]
    names = [name for name, _ in found]
    measured = {}
    for name in limits:
        if names.count(name) != 1:
            fault = "names two of them" if name in names else "is not among them"
            raise InputError(f"fail_below: {rows.folder} measures {', '.join(map(repr, names))}; {name!r} {fault}.")
        value = dict(found)[name]
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(
                f"fail_below: {name} was not measured in {rows.folder}, because its evaluation is incomplete, and "
                "what is not measured cannot pass. Evaluate all subsets, or set a limit on a section that is complete."
            )
        measured[name] = float(value)
    return measured


def _described(rows: ResultRows) -> dict[str, Any]:
    found: dict[str, Any] = {"folder": rows.folder}
    for name in ("model", "model_fingerprint", "settings", "seed", "versions"):
        if name in rows.result:
            found[name] = rows.result[name]
    if rows.suite is not None:
        found |= {name: rows.result.get(name) for name in ("complete", "score")}
        found["sections"] = {name: part.get("score") for name, part in rows.result.get("sections", {}).items()}
    return found


def _groups(rows: list[ResultRows], num_resamples: int, seed: int) -> list[dict[str, Any]]:
    """All rows, then sections, then subsets; a level that divides the rows as an earlier one does is left out."""
    labels = {
        "all": np.full(len(rows[0].keys), "all", dtype=object),
        "section": np.array(["" if name is None else name for name in rows[0].sections], dtype=object),
        "subset": np.array([subset for _, subset, _ in rows[0].keys], dtype=object),
    }
    lengths = rows[0].length_differences
    known = lengths[np.isfinite(lengths)]
    scale = length_scale(known) if len(known) else None
    groups = []
    divisions = set()
    for level, names in labels.items():
        distinct = {name: number for number, name in enumerate(dict.fromkeys(names.tolist()))}
        division = tuple(distinct[name] for name in names.tolist())
        if division in divisions:
            continue
        divisions.add(division)
        found = []
        for name in distinct:
            inside = names == name
            base = rows[0].credits[inside]
            models = {part.name: _accuracy(part.credits[inside], lengths[inside], scale) for part in rows}
            for part in rows[1:]:
                models[part.name] |= _difference(base, part.credits[inside], num_resamples, seed)
            found.append({"level": level, "name": name, "num_rows": int(inside.sum()), "models": models})
        tests = [entry["mcnemar"] for group in found for entry in group["models"].values() if "mcnemar" in entry]
        for test, adjusted in zip(tests, holm_adjusted([test["p_value"] for test in tests]), strict=True):
            test["p_value_holm"] = adjusted
        groups += found
    return groups


def _accuracy(credits: np.ndarray, lengths: np.ndarray, scale: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "accuracy": float(credits.mean()),
        "accuracy_interval": list(wilson_interval(min(float(credits.sum()), len(credits)), len(credits))),
    }
    if np.isfinite(lengths).all():
        controlled = length_controlled_accuracy(credits, lengths, scale=scale)
        found["length_controlled_accuracy"] = controlled.accuracy.estimate
        found["length_controlled_accuracy_interval"] = [controlled.accuracy.low, controlled.accuracy.high]
        found["length_coefficient"] = controlled.length_coefficient
    return found


def _difference(base: np.ndarray, credits: np.ndarray, num_resamples: int, seed: int) -> dict[str, Any]:
    interval = paired_bootstrap(credits - base, num_resamples=num_resamples, seed=seed)
    found: dict[str, Any] = {
        "difference": interval.estimate, "difference_interval": [interval.low, interval.high]
    }  # fmt: skip
    test = mcnemar_test(base, credits)
    if test.left_out < len(credits):
        found["mcnemar"] = {
            "lost": test.first_only, "gained": test.second_only, "left_out": test.left_out, "p_value": test.p_value,
        }  # fmt: skip
    return found


def _flips(baseline: ResultRows, other: ResultRows) -> list[dict[str, Any]]:
    """Rows that exactly one of the two has right and the other wrong, in the baseline's order.

    Reward models have no common unit: ``margin_change`` is in units of each one's root mean square margin.
    """
    data = baseline.result.get("data", []) if baseline.suite is None else []
    sources = {item["fingerprint"]: item["source"] for item in data}
    scales = [_root_mean_square(part.margins) for part in (baseline, other)]
    flips = []
    for place in np.flatnonzero(np.abs(other.credits - baseline.credits) == 1).tolist():
        source, subset, identifier = baseline.keys[place]
        one, two = (float(part.margins[place]) for part in (baseline, other))
        flip: dict[str, Any] = {
            "model": other.name,
            "change": "gained" if other.credits[place] == 1 else "lost",
            "source": sources.get(source, source),
            "section": baseline.sections[place],
            "subset": subset,
            "id": identifier,
        }
        if math.isfinite(one) and math.isfinite(two):
            # Rewards are float32: more digits than 7 are noise of the subtraction.
            flip |= {"baseline_margin": float(f"{one:.7g}"), "margin": float(f"{two:.7g}")}
            flip["margin_change"] = two / scales[1] - one / scales[0]
        flips.append({name: value for name, value in flip.items() if value is not None})
    return flips


def _root_mean_square(margins: np.ndarray) -> float:
    known = margins[np.isfinite(margins)]
    return (float(np.sqrt(np.mean(known**2))) if len(known) else 0.0) or 1.0
