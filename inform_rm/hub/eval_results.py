"""Results of evaluations in the Hub's words: entries of a card's ``model-index``, and files of ``.eval_results``.

The Hub calls ``model-index`` legacy, yet only there is room for every subset, interval and local file. In
``.eval_results`` goes what can be held against others: one value for a whole data set of the Hub.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from inform_rm.data.sources import SourceName, check_hub_id, parse_source
from inform_rm.errors import InputError
from inform_rm.scoring.reward_models import fingerprint_model, load_reward_model
from inform_rm.util.files import atomic_write_text
from inform_rm.util.page import format_interval
from inform_rm.util.result_folders import RESULT_FILE, ResultFolder, naming_damage

ENTRIES_FOLDER = ".eval_results"
LEFT_OUT = {"bad_rows": "bad rows left out", "dropped": "over-long pairs left out", "truncated": "prompts cut"}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TASK: dict[str, Any] = {"task_type": "text-classification", "task_name": "preference between responses"}


def is_local(source: str) -> bool:
    """Whether a name is no Hub id: a file or folder that is there, or one that only a path can be."""
    try:
        name = parse_source(source).name
        if Path(name).exists():
            return True
        check_hub_id(name)
    except InputError:
        return True
    return False


def public_name(value: Any) -> str:
    """A local path's last part, and anything else as it is."""
    return Path(value).name if isinstance(value, str) and is_local(value) else str(value)


def refuse_other_models(folders: Sequence[ResultFolder], model: str, revision: str | None = None) -> None:
    """`InputError` if a result is about other weights than those of this folder or Hub id.

    The fingerprints are compared in the float type in which the model was scored.
    """
    known: dict[str, str] = {}
    for folder in folders:
        with naming_damage("results", folder.path / RESULT_FILE):
            found, name = folder.result["model_fingerprint"], folder.result["model"]
            dtype = str(folder.result["settings"]["dtype"])
        if dtype not in known:
            known[dtype] = fingerprint_model(load_reward_model(model, dtype=dtype, device="cpu", revision=revision))
        if found != known[dtype]:
            raise InputError(
                f"results: {folder.path} is about another model, {name}: its weights have the fingerprint "
                f"{str(found)[:12]}, those of {model} {known[dtype][:12]}. Run it for {model}, or leave it out."
            )


def eval_results(folder: ResultFolder) -> list[EvalResult]:
    """The Hub's entries for one folder of results; of an incomplete suite, its whole sections and subsets only."""
    return _suite_results(folder.result) if folder.kind == "suite" else _data_results(folder.result)


def evaluation_of_run(result: dict[str, Any]) -> EvalResult:
    """The Hub's entry for the evaluation pairs of a training run, from its ``train_result.json``."""
    settings = result["settings"]
    sources, limit = settings["eval_data"], settings.get("max_eval_pairs_per_source")
    local = list(map(is_local, sources))
    digests = [result["data_fingerprints"][source][:12] for source in sources]
    arguments = {"fingerprints": digests, "part": "evaluation pairs of the run"}
    arguments |= {} if limit is None else {"max_pairs": limit, "seed": settings["seed"]}
    revision = "-".join(digests) if any(local) else None
    return _accuracy(result["evaluation"], list(map(parse_source, sources)), local, revision, arguments)


def eval_entries(folder: ResultFolder) -> list[tuple[str, EvalResultEntry]]:
    """File name and entry of ``.eval_results`` for a folder of results, if there is one.

    There is for the accuracy on all pairs of one data set of the Hub, and for the score of a whole suite by its
    published rule; the data set is then where the suite's authors put it, wherever its items were read.
    """
    with naming_damage("results", folder.path / RESULT_FILE):
        result, revision = folder.result, folder.result["settings"].get("data_revision")
        if folder.kind != "suite":
            cut = sum(item.get("truncated", 0) for item in result["data"])
            is_part = "max_pairs" in result["settings"] or any(
                item.get("is_local", True) or item.get("bad_rows") or item.get("dropped") for item in result["data"]
            )
            sources = [] if is_part else [parse_source(item["source"]) for item in result["data"]]
            return _entry(sources, revision, **_values_of(result, cut))
        if not result["complete"] or result["settings"].get("ties") == "half":
            return []
        sources = [SourceName(part["id"], part["split"], part["config"]) for part in result.get("on_hub") or ()]
        what = "score of the whole" + _cut(result.get("counts", {}).get("truncated"))
        return _entry(sources, revision, result["score"], result.get("interval"), what)


def entries_of_run(result: dict[str, Any]) -> list[tuple[str, EvalResultEntry]]:
    """The same for the evaluation pairs of a training run, from its ``train_result.json``."""
    settings, counts = result["settings"], result.get("eval_pairs") or {}
    sources = settings.get("eval_data") or ()
    limited = settings.get("max_eval_pairs_per_source") is not None or counts.get("dropped") or counts.get("bad_rows")
    if "accuracy" not in (result.get("evaluation") or ()) or limited or any(map(is_local, sources)):
        return []
    values = _values_of(result["evaluation"], counts.get("truncated", 0))
    if settings.get("load_best_model_at_end"):
        values["what"] += ", by which the checkpoint was chosen"
    return _entry(list(map(parse_source, sources)), None, **values)


def write_entries(folder: Path, entries: Iterable[tuple[str, EvalResultEntry]]) -> None:
    """Write ``.eval_results`` of a model folder; a file of the same name, of the same data, is replaced."""
    by_file: dict[str, list[EvalResultEntry]] = {}
    for name, entry in entries:
        by_file.setdefault(name, []).append(entry)
    for name, group in by_file.items():
        text = yaml.safe_dump(eval_result_entries_to_yaml(group), sort_keys=False, allow_unicode=True)
        atomic_write_text(folder / ENTRIES_FOLDER / name, text)


def _cut(number: int | None) -> str:
    return f", {number} prompts cut" if number else ""


def _values_of(part: dict[str, Any], num_cut: int) -> dict[str, Any]:
    what = f"pairwise accuracy of n = {part['num_pairs']}, ties half{_cut(num_cut)}"
    return {"value": part["accuracy"], "interval": part["accuracy_interval"], "what": what}


def _entry(
    sources: list[SourceName], revision: str | None, value: float, interval: Any, what: str
) -> list[tuple[str, EvalResultEntry]]:
    """An entry for sources that are one data set of the Hub in one configuration, which names the task."""
    if len({(source.name, source.config) for source in sources}) != 1 or "/" not in sources[0].name:
        return []
    dataset, splits = sources[0].name, _splits(sources)
    notes = ", ".join(filter(None, [what, splits and f"split {splits}",
                                    interval and f"95 % interval {format_interval(interval)}"]))  # fmt: skip
    entry = EvalResultEntry(
        dataset_id=dataset,
        task_id=sources[0].config or "default",
        value=float(value),
        dataset_revision=revision if revision and _COMMIT.fullmatch(revision) else None,
        notes=notes,
    )
    return [(re.sub(r"[^\w.-]+", "--", "/".join(filter(None, (dataset, sources[0].config, splits)))) + ".yaml", entry)]


def _splits(sources: list[SourceName]) -> str | None:
    return " + ".join(dict.fromkeys(source.split for source in sources if source.split is not None)) or None


def _data_results(result: dict[str, Any]) -> list[EvalResult]:
    # Results of earlier versions do not say whether a source was local: no name is taken for a Hub id then.
    local = [item.get("is_local", True) for item in result["data"]]
    sources = [parse_source(item["source"]) for item in result["data"]]
    settings = result["settings"]
    digests = [item["fingerprint"][:12] for item in result["data"]]
    # Files of the same name are told apart, which the Hub's classes do by type, split and revision alone.
    revision = settings.get("data_revision") or ("-".join(digests) if any(local) else None)
    counts = {name: sum(item.get(name, 0) for item in result["data"]) for name in LEFT_OUT}
    arguments = {"fingerprints": digests, **{name: count for name, count in counts.items() if count}}
    if "max_pairs" in settings:
        arguments |= {"max_pairs": settings["max_pairs"], "seed": result["seed"]}
    parts = {"": result, **{f", {name}": part for name, part in result.get("subsets", {}).items()}}
    return [_accuracy(part, sources, local, revision, arguments, suffix) for suffix, part in parts.items()]


def _accuracy(
    part: dict[str, Any],
    sources: list[SourceName],
    local: list[bool],
    revision: str | None,
    arguments: dict[str, Any],
    suffix: str = "",
) -> EvalResult:
    names = [Path(source.name).name if here else source.name for source, here in zip(sources, local, strict=True)]
    return EvalResult(
        **_TASK,
        dataset_type=" + ".join(names),
        dataset_name=" + ".join(names),
        dataset_split=_splits(sources),
        dataset_revision=revision,
        dataset_args=arguments,
        metric_type="accuracy",
        metric_name=f"pairwise accuracy{suffix}",
        metric_value=float(part["accuracy"]),
        metric_args={"n": int(part["num_pairs"]), "interval_95": list(map(float, part["accuracy_interval"]))},
    )


def _suite_results(result: dict[str, Any]) -> list[EvalResult]:
    """Of an incomplete suite the sections that have a score and the subsets that hold all of their items."""
    complete, missing = bool(result["complete"]), [str(lack) for lack in result.get("missing", [])]
    rules = ["ties count half"] if result["settings"].get("ties") == "half" else []  # the published rule is another
    rules += [] if complete else ["incomplete"]
    title = str(result.get("title", result["suite"])) + (f" ({', '.join(rules)})" if rules else "")
    entries = [("score", "score", result)] if complete else []
    entries += [("score", f"section {name}", part) for name, part in result["sections"].items()]
    entries += [("accuracy", f"subset {name}", part) for name, part in result["subsets"].items()]
    found = []
    for metric, name, part in entries:
        is_part = part.get("num_dropped") or part.get("published_items") not in (None, part.get("num_items"))
        if part[metric] is None or is_part:
            continue
        arguments: dict[str, Any] = {"n": int(part["num_items"])} if "num_items" in part else {}
        arguments |= {"interval_95": list(map(float, part["interval"]))} if "interval" in part else {}
        found.append(
            EvalResult(
                **_TASK,
                dataset_type=str(result["suite"]),
                dataset_name=title,
                dataset_args={"complete": complete, **({"missing": missing} if missing else {})},
                metric_type=metric,
                metric_name=name if complete else f"{name} of an incomplete suite",
                metric_value=float(part[metric]),
                metric_args=arguments or None,
            )
        )
    return found
