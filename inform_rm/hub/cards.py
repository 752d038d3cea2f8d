"""Model cards: what a model's README says, and the metadata by which the Hub finds and compares it."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from inform_rm.data.sources import check_hub_id, parse_source
from inform_rm.errors import InputError
from inform_rm.hub.result_folders import RESULT_FILE, ResultFolder, naming_damage
from inform_rm.util.files import atomic_write_text
from inform_rm.util.page import (
    Table,
    cell_text,
    fill_markdown,
    format_interval,
    markdown_paragraph,
    markdown_table,
    words_table,
)

TAGS = ("reward-model", "inform", "rlhf")
_TASK: dict[str, Any] = {"task_type": "text-classification", "task_name": "preference between responses"}
_LEFT_OUT = {"bad_rows": "bad rows left out", "dropped": "over-long pairs left out", "truncated": "prompts cut"}
_RESULTS_START, _RESULTS_END = "<!-- results, from the metadata above -->", "<!-- end of results -->"
_LIMITS_HEADING = "## Limits\n"  # results stand before it
_LOAD_MODEL, _LOAD_ADAPTERS = "load_model.md.j2", "load_adapters.md.j2"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_MOST_CARD_CHARACTERS, _DEEPEST_YAML = 1 << 20, 30


def model_card(config: Any, settings: dict[str, Any], result: dict[str, Any] | None) -> str:
    """README of a trained model, filled from its run.

    Args:
        config: the model's `InfoRMConfig`.
        settings: settings of the run that are worth a line; empty if unknown.
        result: result of the run with its data counts and evaluation; ``None`` if unknown.

    Returns:
        Markdown with the Hub's YAML header. What is not known is left out, and local paths are shortened to their
        last part: what leads to it means nothing elsewhere, and may tell a user's name.
    """
    is_adapter = settings.get("merge_adapters") is False
    base_model = settings.get("model")
    data = settings.get("data", ())
    hub_data = [source for source in data if not is_local(source)]
    metadata = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-classification",
        tags=list(TAGS),
        base_model=None if base_model is None or is_local(base_model) else base_model,
        datasets=hub_data or None,
    )
    values: dict[str, Any] = {"load_template": _LOAD_ADAPTERS if is_adapter else _LOAD_MODEL}
    if result is not None:
        values |= _training_values(settings, result)
    card = card_text(metadata, _card_body(config=config, result=result, **values))
    if result is None or result["evaluation"] is None:
        return card
    return _with_results(card, [_evaluation_of_run(result)], Path(settings["output_dir"]).resolve().name)


def average_card(inform_config: Any, number: int, result_file: str) -> str:
    """README of averaged weights (see `inform_rm.hub.averaging.average_weights`).

    Args:
        inform_config: ``None`` for a model of transformers itself.
        number: how many models were averaged.
        result_file: file that names them.
    """
    tags = TAGS if inform_config is not None else TAGS[:1]
    metadata = ModelCardData(library_name="transformers", pipeline_tag="text-classification", tags=list(tags))
    return card_text(metadata, _card_body(config=inform_config, averaged=number, result_file=result_file))


def _card_body(**values: Any) -> str:
    defaults = {"result": None, "averaged": None, "load_template": _LOAD_MODEL}
    return fill_markdown("model_card.md.j2", **{**defaults, **values})


def _training_values(settings: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """What the card says of a run; of local paths the last part."""
    shown = [
        (name, list(map(public_name, value)) if isinstance(value, list | tuple) else public_name(value))
        for name, value in settings.items()
        if name != "output_dir"
    ]
    values = {
        "settings_table": markdown_table(words_table(("setting", "value"), shown)),
        "software": ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
    }
    evaluation = result.get("evaluation")
    if evaluation is not None:
        values["accuracy"] = cell_text(evaluation["accuracy"])
        values["interval"] = format_interval(evaluation["accuracy_interval"])
    return values


def whole_model_card(path: Path) -> None:
    """Turn the card of an adapter folder into that of the whole model that was made from it: how it is loaded.

    Raises:
        InputError: its header cannot be read.
    """
    with _naming_card():
        parsed = _parsed(path.read_text(encoding="utf-8"))
        parsed.data.library_name = "transformers"
        text = parsed.text.replace(fill_markdown(_LOAD_ADAPTERS), fill_markdown(_LOAD_MODEL))
    atomic_write_text(path, card_text(parsed.data, text))


def complete_card(path: Path, model_name: str, folders: Sequence[ResultFolder], license: str | None) -> None:
    """Put results and licence into a model card file: its metadata (``model-index``, ``license``) and a table.

    A result takes the place of one on the same data that the card has; others stay.

    Args:
        path: Markdown with the Hub's YAML header.
        model_name: name of the model in the ``model-index``.
        folders: results of `evaluate`, with data or a suite; that they are this model's is the caller's to know.
        license: the Hub's name of a licence, such as ``apache-2.0``; ``None`` leaves what the card says.

    Raises:
        InputError: a licence that cannot be a name, a card whose header cannot be read, a damaged result, or two
            results on the same data.
    """
    if license is not None and not _LICENSE.fullmatch(license):
        raise InputError(
            f"license: {license!r} is no name of a licence as the Hub writes them, in small letters without "
            "spaces: apache-2.0, mit, cc-by-sa-4.0, llama3.1, other ..."
        )
    results: list[EvalResult] = []
    given: dict[tuple[Any, ...], ResultFolder] = {}
    for folder in folders:
        with naming_damage("results", folder.path / RESULT_FILE):
            found = eval_results(folder)
        for identifier in {result.unique_identifier for result in found}:
            if identifier in given:
                raise InputError(
                    f"results: {given[identifier].path} and {folder.path} are both about "
                    f"{found[0].dataset_name}. A card names one result for the same data: leave one out."
                )
            given[identifier] = folder
        results += found
    with _naming_card():
        card = path.read_text(encoding="utf-8")
        if license is not None:
            parsed = _parsed(card)
            parsed.data.license = license
            card = card_text(parsed.data, parsed.text)
        if results:
            card = _with_results(card, results, model_name)
    atomic_write_text(path, card)


@contextlib.contextmanager
def _naming_card() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise InputError(
            f"model: its README.md cannot be completed ({' '.join(str(error).split())[:300]}). Mend or remove it."
        ) from error


def eval_results(folder: ResultFolder) -> list[EvalResult]:
    """The Hub's entries for one folder of results; of an incomplete suite, its whole sections and subsets only."""
    return _suite_results(folder.result) if folder.kind == "suite" else _data_results(folder.result)


def _data_results(result: dict[str, Any]) -> list[EvalResult]:
    # Results of earlier versions do not say whether a source was local: no name is taken for a Hub id then.
    local = [item.get("is_local", True) for item in result["data"]]
    sources = [parse_source(item["source"]) for item in result["data"]]
    names = [Path(source.name).name if here else source.name for source, here in zip(sources, local, strict=True)]
    splits = " + ".join(dict.fromkeys(source.split for source in sources if source.split is not None))
    settings = result["settings"]
    digests = [item["fingerprint"][:12] for item in result["data"]]
    # Files of the same name are told apart, which the Hub's classes do by type, split and revision alone.
    revision = settings.get("data_revision") or ("-".join(digests) if any(local) else None)
    arguments = {"fingerprints": digests}
    counts = {name: sum(item.get(name, 0) for item in result["data"]) for name in _LEFT_OUT}
    arguments |= {name: count for name, count in counts.items() if count}
    if "max_pairs" in settings:
        arguments |= {"max_pairs": settings["max_pairs"], "seed": result["seed"]}
    parts = {"": result, **{f", {name}": part for name, part in result.get("subsets", {}).items()}}
    return [
        _accuracy(part, " + ".join(names), revision, dict(arguments), splits or None, suffix)
        for suffix, part in parts.items()
    ]


def _accuracy(
    part: dict[str, Any],
    names: str,
    revision: str | None,
    arguments: dict[str, Any],
    split: str | None = None,
    suffix: str = "",
) -> EvalResult:
    return EvalResult(
        **_TASK,
        dataset_type=names,
        dataset_name=names,
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
        if "interval" in part:
            arguments["interval_95"] = list(map(float, part["interval"]))
        found.append(
            EvalResult(
                **_TASK,
                dataset_type=str(result["suite"]),
                dataset_name=title,
                dataset_args={"complete": complete, **({"missing": list(missing)} if missing else {})},
                metric_type=metric,
                metric_name=name if complete else f"{name} of an incomplete suite",
                metric_value=float(part[metric]),
                metric_args=arguments or None,
            )
        )
    return found


def _evaluation_of_run(result: dict[str, Any]) -> EvalResult:
    sources = result["settings"]["eval_data"]
    names = " + ".join(public_name(source) for source in sources)
    evaluation, limit = result["evaluation"], result["settings"].get("max_eval_pairs_per_source")
    digests = [result["data_fingerprints"][source][:12] for source in sources]
    arguments = {"fingerprints": digests, "part": "evaluation pairs of the run"}
    if limit is not None:
        arguments |= {"max_pairs": limit, "seed": result["settings"]["seed"]}
    return _accuracy(evaluation, names, "-".join(digests) if any(map(is_local, sources)) else None, arguments)


def public_name(value: Any) -> str:
    """A local path's last part, and anything else as it is."""
    return Path(value).name if isinstance(value, str) and is_local(value) else str(value)


def is_local(source: str) -> bool:
    """Whether a name is no Hub id: a file or folder that is there, or one that only a path can be."""
    if Path(source).exists():
        return True
    try:
        check_hub_id(source)
    except InputError:
        return True
    return False


def card_text(metadata: ModelCardData, text: str) -> str:
    """Metadata and Markdown as the Hub reads them."""
    return f"---\n{metadata.to_yaml()}\n---\n\n{text.lstrip()}"


def _parsed(card: str) -> Any:
    """The card with its metadata; refused is YAML in which few characters ask for much memory or time."""
    if len(card) > _MOST_CARD_CHARACTERS:
        raise ValueError(f"it has {len(card)} characters")
    header = REGEX_YAML_BLOCK.search(card)
    depth = 0
    for event in yaml.parse(header.group(2), Loader=yaml.SafeLoader) if header else ():
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > _DEEPEST_YAML:
            raise ValueError(f"its metadata holds YAML aliases, or is nested more than {_DEEPEST_YAML} deep")
    return ModelCard(card)


def _with_results(card: str, results: list[EvalResult], model_name: str) -> str:
    parsed = _parsed(card)
    identifiers = {result.unique_identifier for result in results}
    kept = [result for result in parsed.data.eval_results or [] if result.unique_identifier not in identifiers]
    parsed.data.eval_results = kept + results
    parsed.data.model_name = model_name
    section = _results_section(kept + results)
    before, start, rest = parsed.text.partition(_RESULTS_START)
    _, end, after = rest.partition(_RESULTS_END)
    if start and end:
        text = f"{before}{section}{after.lstrip()}"
    else:
        before, heading, after = parsed.text.partition(_LIMITS_HEADING)
        text = f"{before.rstrip()}\n\n{section}{heading}{after}"
    return card_text(parsed.data, text)


def _results_section(results: Iterable[EvalResult]) -> str:
    """A table of what the metadata holds; files of one name are told apart by their fingerprints."""
    results = list(results)
    revisions: dict[str, set[str | None]] = {}
    for result in results:
        revisions.setdefault(result.dataset_name, set()).add(result.dataset_revision)
    rows, notes = [], []
    for result in results:
        arguments, dataset = result.metric_args or {}, result.dataset_args or {}
        name = result.dataset_name
        name = f"{name} ({result.dataset_revision})" if len(revisions[name]) > 1 else name
        metric, interval = result.metric_name or result.metric_type, arguments.get("interval_95")
        rows.append((name, metric, arguments.get("n"), result.metric_value, interval))
        found = [f"{dataset[count]} {text}" for count, text in _LEFT_OUT.items() if dataset.get(count)]
        if dataset.get("complete") is False:
            found.append(f"no score of the whole. Missing: {'; '.join(dataset.get('missing', []))}")
        note = f"{name}: {', '.join(found)}."
        notes += [note] if found and note not in notes else []
    table = Table(("data", "metric", "n", "value", "95 % interval"), rows, align="llrrr")
    text = fill_markdown("card_results.md.j2", table=markdown_table(table), notes=map(markdown_paragraph, notes))
    return f"{_RESULTS_START}\n{text}{_RESULTS_END}\n\n"
