"""Results of evaluations in the Hub's words: the entries of a card's ``model-index``."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from inform_rm.data.sources import check_hub_id, parse_source
from inform_rm.errors import InputError
from inform_rm.hub.result_folders import ResultFolder

LEFT_OUT = {"bad_rows": "bad rows left out", "dropped": "over-long pairs left out", "truncated": "prompts cut"}
_TASK: dict[str, Any] = {"task_type": "text-classification", "task_name": "preference between responses"}


def is_local(source: str) -> bool:
    """Whether a name is no Hub id: a file or folder that is there, or one that only a path can be."""
    if Path(source).exists():
        return True
    try:
        check_hub_id(source)
    except InputError:
        return True
    return False


def public_name(value: Any) -> str:
    """A local path's last part, and anything else as it is."""
    return Path(value).name if isinstance(value, str) and is_local(value) else str(value)


def eval_results(folder: ResultFolder) -> list[EvalResult]:
    """The Hub's entries for one folder of results; of an incomplete suite, its whole sections and subsets only."""
    return _suite_results(folder.result) if folder.kind == "suite" else _data_results(folder.result)


def evaluation_of_run(result: dict[str, Any]) -> EvalResult:
    """The Hub's entry for the evaluation pairs of a training run, from its ``train_result.json``."""
    settings = result["settings"]
    sources, limit = settings["eval_data"], settings.get("max_eval_pairs_per_source")
    digests = [result["data_fingerprints"][source][:12] for source in sources]
    arguments = {"fingerprints": digests, "part": "evaluation pairs of the run"}
    arguments |= {} if limit is None else {"max_pairs": limit, "seed": settings["seed"]}
    revision = "-".join(digests) if any(map(is_local, sources)) else None
    return _accuracy(result["evaluation"], list(map(public_name, sources)), None, revision, arguments)


def _data_results(result: dict[str, Any]) -> list[EvalResult]:
    # Results of earlier versions do not say whether a source was local: no name is taken for a Hub id then.
    local = [item.get("is_local", True) for item in result["data"]]
    sources = [parse_source(item["source"]) for item in result["data"]]
    names = [Path(source.name).name if here else source.name for source, here in zip(sources, local, strict=True)]
    splits = " + ".join(dict.fromkeys(source.split for source in sources if source.split is not None)) or None
    settings = result["settings"]
    digests = [item["fingerprint"][:12] for item in result["data"]]
    # Files of the same name are told apart, which the Hub's classes do by type, split and revision alone.
    revision = settings.get("data_revision") or ("-".join(digests) if any(local) else None)
    counts = {name: sum(item.get(name, 0) for item in result["data"]) for name in LEFT_OUT}
    arguments = {"fingerprints": digests, **{name: count for name, count in counts.items() if count}}
    if "max_pairs" in settings:
        arguments |= {"max_pairs": settings["max_pairs"], "seed": result["seed"]}
    parts = {"": result, **{f", {name}": part for name, part in result.get("subsets", {}).items()}}
    return [_accuracy(part, names, splits, revision, arguments, suffix) for suffix, part in parts.items()]


def _accuracy(
    part: dict[str, Any], names: list[str], split: str | None, revision: str | None, arguments: Any, suffix: str = ""
) -> EvalResult:
    return EvalResult(
        **_TASK,
        dataset_type=" + ".join(names),
        dataset_name=" + ".join(names),
        dataset_split=split,
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
