"""One page about a training run and what was found out about its model: `inform-rm report`."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from inform_rm.errors import InputError
from inform_rm.eval.decompose_report import PLANE_CAPTION, DecompositionResult
from inform_rm.eval.detection.report import MAP_CAPTION, STEPS_CAPTION, DetectionResult, map_figure
from inform_rm.eval.results import EvaluationResult, RankingResult, ScoreResult
from inform_rm.hub.eval_results import refuse_other_models
from inform_rm.util.checkpoints import last_complete
from inform_rm.util.colors import BLUE, VERMILION
from inform_rm.util.files import atomic_write_text
from inform_rm.util.page import (
    Block,
    Heading,
    Note,
    Page,
    Table,
    format_interval,
    settings_table,
    themed_image,
    words_table,
)
from inform_rm.util.papers import differences_of_run
from inform_rm.util.result_folders import (
    RESULT_FILE,
    ResultFolder,
    naming_damage,
    read_result_folder,
)

RUN_RESULT_FILE = "train_result.json"
# Title, and (key in the log, label) of its lines.
_PANELS = (
    ("loss (nats)", (("loss", "training, with KL term"), ("eval_bradley_terry_loss", "evaluation, without it"))),
    ("accuracy (share)", (("accuracy", "training"), ("eval_accuracy", "evaluation"))),
    ("margin of rewards", (("margin", "training"), ("eval_margin", "evaluation"))),
    ("Kendall's tau-b of rankings", (("kendall_tau", "training"), ("eval_kendall_tau", "evaluation"))),
    ("RMSE of scored responses", (("rmse", "training"), ("eval_rmse", "evaluation"))),
    ("KL of a response (nats)", (("kl_nats", "training"), ("eval_kl_nats", "evaluation"))),
    (
        "ln 2 - loss: information on the label (nats)",
        (("label_information_nats", "training"), ("eval_label_information_nats", "evaluation")),
    ),
    ("learning rate", (("learning_rate", "learning rate"),)),
    ("gradient norm", (("grad_norm", "before clipping"),)),
)
_COLORS = (BLUE, VERMILION)
_CURVES_CAPTION = (
    "Training: each point is the mean since the point before it. Evaluation: all evaluation pairs, after so many "
    "steps. The training loss holds the KL term, the evaluation loss does not."
)
_NO_CURVES = Note("The log of this run holds no point.")
_FEW_POINTS = 40  # so many are drawn as points, too
_COUNTS = ("pairs", "overlong", "dropped", "truncated", "bad_rows", "passes")

_Line = tuple[str, str, list[tuple[float, float]]]  # label, colour, points


def write_report(run: str | Path, output: str | Path, results: Sequence[str | Path] = ()) -> None:
    """Write one self-contained HTML page about a training run.

    It shows the training curves, accuracy tables, the plane of prompt-free and prompt-related gaps, the map of
    latents, settings, data and versions. What is not there is named in one line. Of a run that is not finished the
    page shows the curves up to its last complete checkpoint.

    Args:
        run: folder that `train` wrote.
        output: file to write; it appears whole or not at all.
        results: folders of `evaluate` (with data or a suite), `decompose` and `detect` on the run's model.

    Raises:
        InputError: ``run`` is no folder of a run, or a folder of results is unfinished, damaged or about other
            weights.
    """
    target = Path(output)
    if target.is_dir():
        raise InputError(f"output: {target} is a folder; expected the name of a page, such as {target}/report.html.")
    record, is_finished = _read_run(Path(run))
    folders = [read_result_folder(path) for path in results]
    if folders and not is_finished:
        raise InputError(
            f"results: the run in {run} is not finished, so that no result can be of its model. Finish it, or leave "
            "them out."
        )
    refuse_other_models(folders, str(run))
    shown: list[Block] = []
    absent: list[str] = []
    for kind, (name, make) in _KINDS.items():
        of_kind = [folder for folder in folders if folder.kind == kind]
        absent += [] if of_kind or name is None else [name]
        for folder in of_kind:
            with naming_damage("results", folder.path / RESULT_FILE):
                shown += make(folder)
    if absent:
        shown.append(Note(f"Not on this page, because no such results were given: {', '.join(absent)}."))
    with naming_damage("run", Path(run) / RUN_RESULT_FILE):
        log = record["log_history"]
        curves = themed_image(lambda: curves_figure(log), _CURVES_CAPTION) if _panels(log) else _NO_CURVES
        blocks = [*_summary(record, is_finished), Heading("Training"), curves, *shown, *_facts(record)]
    atomic_write_text(target, Page(f"Training run: {Path(run).resolve().name}", blocks).html())


def _read_run(folder: Path) -> tuple[dict[str, Any], bool]:
    """A run's ``train_result.json`` or, of an unfinished run, the like of its last checkpoint; which of them it is."""
    finished = folder / RUN_RESULT_FILE
    if finished.is_file():
        with naming_damage("run", finished):
            record = json.loads(finished.read_text(encoding="utf-8"))
            return {**record, "log_history": list(record["log_history"])}, True
    checkpoint = last_complete(folder / "checkpoints")
    if checkpoint is None:
        raise InputError(
            f"run: {folder} holds no training run: neither {RUN_RESULT_FILE} nor a complete checkpoint. Pass the "
            "folder that inform-rm train wrote."
        )
    started, progress = folder / "checkpoints" / "run.json", checkpoint / "trainer_state.json"
    with naming_damage("run", started):
        settings = json.loads(started.read_text(encoding="utf-8"))
        record = {name: settings.pop(name, {}) for name in ("data_fingerprints", "versions", "contents")}
    with naming_damage("run", progress):
        state = json.loads(progress.read_text(encoding="utf-8"))
        steps = f"{int(state['global_step'])} of {state['max_steps']}"
        return {**record, "settings": settings, "steps": steps, "log_history": list(state["log_history"])}, False


def curves_figure(log: Sequence[dict[str, Any]]) -> Figure:
    """Loss, accuracy, margin, KL, learning rate and gradient norm over the steps, as far as the log holds them."""
    panels = _panels(log)
    figure = Figure(figsize=(6.4, 0.5 + 1.9 * len(panels)), layout="constrained")
    column = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, lines) in zip(column, panels.items(), strict=True):
        for label, color, points in lines:
            marker = "o-" if len(points) < _FEW_POINTS else "-"
            axes.plot(*zip(*points, strict=True), marker, markersize=4, color=color, label=label)
        axes.set_title(title, fontsize=11, loc="left")
        if len(lines) > 1:
            axes.legend(fontsize=9)
    column[-1].set_xlabel("optimizer step")
    return figure


def _panels(log: Sequence[dict[str, Any]]) -> dict[str, list[_Line]]:
    """Title to its lines, where there are any; NaN and infinity cannot be drawn."""
    panels: dict[str, list[_Line]] = {}
    for title, keys in _PANELS:
        for (key, label), color in zip(keys, _COLORS, strict=False):
            found = [(float(line["step"]), float(line[key])) for line in log if key in line and "step" in line]
            points = [point for point in found if all(map(math.isfinite, point))]
            if points:
                panels.setdefault(title, []).append((label, color, points))
    return panels


def _summary(record: dict[str, Any], is_finished: bool) -> list[Block]:
    settings, evaluation, counts = record["settings"], record.get("evaluation"), record.get("train_pairs")
    kind = str(settings.get("architecture"))
    rows: list[tuple[str, Any]] = [
        ("model", {"inform": "InfoRM", "standard": "standard reward model"}.get(kind, kind)),
        ("started from", settings.get("model")),
        ("trained for", f"{record['steps']} steps"),
    ]
    if counts and "pairs" in counts:
        rows.append(("training pairs", counts["pairs"]))
    if "train_runtime_seconds" in record:
        rows.append(("training time", f"{record['train_runtime_seconds']:.0f} s since the last start"))
    if record.get("resumed_from_step") is not None:
        rows.append(("continued from step", record["resumed_from_step"]))
    found = evaluation or {}
    if "accuracy" in found:
        interval = format_interval(found["accuracy_interval"])
        accuracy = f"{found['accuracy']:.3f} (n = {found['num_pairs']}, 95 % interval {interval})"
        rows.append(("accuracy on the run's evaluation pairs", accuracy))
    budget = record.get("budget") or {}
    if "nats_per_response" in budget and "kl_nats" in found:
        paid = f"{budget['nats_per_response']:.3g}"
        if "nats_per_response_at_that" in budget:
            flips = f"{100 * budget['flip_rate_at_most']:.0f} %"
            paid += (
                f", or {budget['nats_per_response_at_that']:.3g} if {flips} of the labels are wrong (the most there "
            )
            paid += "can be at random)"
        rows.append(("KL of a response", f"{found['kl_nats']:.3g} nats; beta pays for at most {paid}"))
    if "kendall_tau" in found:
        rows.append(("Kendall's tau-b", f"{found['kendall_tau']:.3f} (n = {found['num_prompts']} prompts)"))
    if "rmse" in found:
        rows.append(("RMSE on scored responses", f"{found['rmse']:.3f} (n = {found['num_scored']})"))
    blocks: list[Block] = [words_table(("this run", ""), rows)]
    if not is_finished:
        blocks.append("This run is not finished; the page shows its last complete checkpoint.")
    elif evaluation is None:
        blocks.append("The run had no evaluation pairs.")
    return blocks


def _accuracy(folder: ResultFolder) -> list[Block]:
    is_ranked = "kendall_tau" in folder.result
    result = (RankingResult if is_ranked else EvaluationResult)(**folder.result, rows=[])
    intervals = "bootstraps over prompts" if is_ranked else "Wilson intervals"
    return [
        Heading(f"Accuracy: {folder.path.resolve().name}"),
        _data(result),
        *([result.table()] if is_ranked else []),
        EvaluationResult.table(result),
        Note(f"A tie (equal rewards) counts half. Intervals are 95 % {intervals}."),
    ]


def _scores(folder: ResultFolder) -> list[Block]:
    result = ScoreResult(**folder.result, rows=[])
    return [Heading(f"Scores: {folder.path.resolve().name}"), _data(result), result.table()]


def _data(result: EvaluationResult | ScoreResult) -> Note:
    names = ", ".join(f"{item['source']} ({item['fingerprint'][:12]})" for item in result.data)
    return Note(f"Data: {names}.")


def _suite(folder: ResultFolder) -> list[Block]:
    result = folder.result

    def cells(name: str, part: dict[str, Any], value: float) -> tuple[Any, ...]:
        items, published = part.get("num_items"), part.get("published_items")
        shown = items if published in (None, items) else f"{items} of {published}"
        return name, shown, value, part.get("interval")

    rows = [cells("whole suite", result, result["score"])] if result["complete"] else []
    rows += [cells(f"section {name}", part, part["score"]) for name, part in result["sections"].items()
             if part["score"] is not None]  # fmt: skip
    rows += [cells(f"subset {name}", part, part["accuracy"]) for name, part in result["subsets"].items()]
    blocks: list[Block] = [Heading(f"Suite: {result.get('title', result['suite'])}")]
    if not result["complete"]:
        blocks.append(Note(f"Incomplete: no score of the whole. Missing: {'; '.join(result['missing'])}."))
    return [*blocks, Table(("part", "items", "score or accuracy", "95 % interval"), rows)]


def _decomposition(folder: ResultFolder) -> list[Block]:
    read = pq.read_table(folder.path / "pairs.parquet").to_pydict()
    table = {name: np.asarray(read[name.replace(" ", "_")], dtype=np.float64)
             for name in ("prompt_free_gap", "prompt_related_gap", "characters difference")}  # fmt: skip
    result = DecompositionResult(**folder.result, pairs=table)
    return [
        Heading(f"What the response alone decides: {folder.path.resolve().name}"),
        result.table(),
        *map(Note, result.notes()),
        themed_image(result.figure, PLANE_CAPTION),
    ]


def _detection(folder: ResultFolder) -> list[Block]:
    read = pq.read_table(folder.path / "responses.parquet", columns=["x", "y", "kind"]).to_pydict()
    placed = [row for row, x in enumerate(read["x"]) if x is not None]
    points = {name: [values[row] for row in placed] for name, values in read.items()}
    result = DetectionResult(**folder.result, responses={}, values=np.empty(0))
    blocks: list[Block] = [
        Heading(f"Map of latents: {folder.path.resolve().name}"),
        result.table(),
        *map(Note, result.notes()),
        themed_image(lambda: map_figure(points), MAP_CAPTION),
    ]
    if len(result.candidates) > 1:
        blocks.append(themed_image(result.steps_figure, STEPS_CAPTION))
    return blocks


def _facts(record: dict[str, Any]) -> list[Block]:
    parts = {name.replace("_", " "): record.get(name) or {} for name in ("train_pairs", "eval_pairs")}
    names = [name for name in _COUNTS if any(name in part for part in parts.values())]
    counts = [(label, *(_count(part.get(name)) for name in names)) for label, part in parts.items() if part]
    more = ("batching", "num_processes", "distributed_type", "quantization")
    as_run = {f"{name}, as run": record[name] for name in more if name in record}
    return [
        Heading("Data"),
        *([Table(("", *(name.replace("_", " ") for name in names)), counts)] if counts else []),
        words_table(("source", "SHA-256"), record["data_fingerprints"].items()),
        Heading("Settings"),
        settings_table(record["settings"], as_run),
        *map(Note, differences_of_run(record["settings"])),
        Heading("Versions"),
        words_table(("software", "version"), record["versions"].items()),
    ]


def _count(value: Any) -> Any:
    """Bad rows are listed, not counted, in a run's record."""
    return len(value) if isinstance(value, list) else value


# What the page says of each kind of results, in this order, and its name where none were given (None: not named).
_KINDS: dict[str, tuple[str | None, Callable[[ResultFolder], list[Block]]]] = {
    "evaluate": ("accuracy on other data", _accuracy),
    "scores": (None, _scores),
    "suite": ("benchmark suites", _suite),
    "decompose": ("the plane of prompt-free and prompt-related gaps", _decomposition),
    "detect": ("the map of latents", _detection),
}
