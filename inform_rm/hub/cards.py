"""Model cards: what a model's README says, and the metadata by which the Hub finds and compares it."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from inform_rm.data.sources import parse_source
from inform_rm.errors import InputError
from inform_rm.hub.eval_results import LEFT_OUT, eval_results, evaluation_of_run, is_local, public_name
from inform_rm.util.files import atomic_write_text
from inform_rm.util.page import (
    Markdown,
    Table,
    cell_text,
    fill_markdown,
    markdown_paragraph,
    markdown_table,
    words_table,
)
from inform_rm.util.papers import TRL_TRAINS_BT, differences_of_run
from inform_rm.util.result_folders import RESULT_FILE, ResultFolder, naming_damage

TAGS = ("reward-model", "inform", "rlhf")
_RESULTS_START, _RESULTS_END = "<!-- results, from the metadata above -->", "<!-- end of results -->"
_LIMITS_HEADING = "## Limits\n"  # results stand before it
_LOAD_MODEL, _LOAD_ADAPTERS = "load_model.md.j2", "load_adapters.md.j2"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_MOST_CARD_CHARACTERS, _DEEPEST_YAML = 1 << 20, 30


def model_card(config: Any, settings: dict[str, Any], result: dict[str, Any] | None) -> str:
    """README of a trained model, filled from its run: Markdown with the Hub's YAML header.

    What is not known (no ``settings``, a ``result`` of ``None``) is left out, and local paths are shortened to their
    last part: what leads to it means nothing elsewhere, and may tell a user's name.
    """
    is_adapter = settings.get("merge_adapters") is False
    base_model = settings.get("model")
    is_public = base_model is not None and not is_local(base_model)
    metadata = _metadata(
        TAGS,
        library_name="peft" if is_adapter else "transformers",
        base_model=base_model if is_public else None,
        base_model_relation=("adapter" if is_adapter else "finetune") if is_public else None,
        datasets=list({parse_source(source).name: 0 for source in settings.get("data", ()) if not is_local(source)})
        or None,
    )
    body = fill_markdown(
        "model_card.md.j2",
        config=config,
        result=result,
        averaged=None,
        load_template=_LOAD_ADAPTERS if is_adapter else _LOAD_MODEL,
        trl_trains_bt=Markdown(TRL_TRAINS_BT),
        **({} if result is None else _training_values(settings, result)),
    )
    if result is None or "accuracy" not in (result["evaluation"] or ()):
        return card_text(metadata, body)
    return _with_results(metadata, body, [evaluation_of_run(result)], Path(settings["output_dir"]).resolve().name)


def average_card(inform_config: Any, number: int, result_file: str) -> str:
    """README of averaged weights (`inform_rm.hub.averaging.average_weights`) of so many models, named in a file.

    ``inform_config`` is ``None`` for a model of transformers itself.
    """
    tags = TAGS if inform_config is not None else TAGS[:1]
    body = fill_markdown(
        "model_card.md.j2",
        config=inform_config,
        result=None,
        averaged=number,
        result_file=result_file,
        load_template=_LOAD_MODEL,
        trl_trains_bt=None,
    )
    return card_text(_metadata(tags), body)


def _metadata(tags: Sequence[str], library_name: str = "transformers", **values: Any) -> ModelCardData:
    return ModelCardData(library_name=library_name, pipeline_tag="text-classification", tags=list(tags), **values)


def _training_values(settings: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """What the card says of a run; of local paths the last part."""
    shown = [
        (name, list(map(public_name, value)) if isinstance(value, list | tuple) else public_name(value))
        for name, value in settings.items()
        if name != "output_dir"
    ]
    evaluation = result.get("evaluation") or {}
    measured = ("accuracy", "accuracy_interval", "kendall_tau", "rmse")
    return {
        "settings_table": markdown_table(words_table(("setting", "value"), shown)),
        "software": ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        "differences": differences_of_run(settings),
        **{name: cell_text(evaluation.get(name)) for name in measured},
    }


def whole_model_card(path: Path) -> None:
    """Turn the card of an adapter folder into that of the whole model that was made from it: how it is loaded."""

    def change(data: ModelCardData, text: str) -> str:
        data.library_name = "transformers"
        if data.base_model is not None:
            data.base_model_relation = "finetune"  # type: ignore[attr-defined]  # not one of its own names
        return card_text(data, text.replace(fill_markdown(_LOAD_ADAPTERS), fill_markdown(_LOAD_MODEL)))

    _edit(path, change)


def complete_card(path: Path, model_name: str, folders: Sequence[ResultFolder], license: str | None) -> None:
    """Put results and licence into a model card file: its metadata (``model-index``, ``license``) and a table.

    A result takes the place of one on the same data that the card has; others stay. That the results of `evaluate` are
    this model's is the caller's to know. A licence of ``None`` leaves what the card says. `InputError` for one that
    cannot be a name, a card whose header cannot be read, a damaged result, or two results on the same data.
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

    def change(data: ModelCardData, text: str) -> str:
        if license is not None:
            data.license = license
        return _with_results(data, text, results, model_name) if results else card_text(data, text)

    _edit(path, change)


def _edit(path: Path, change: Callable[[ModelCardData, str], str]) -> None:
    """Write a card anew; refused is YAML in which few characters ask for much memory or time."""
    try:
        card = path.read_text(encoding="utf-8")
        if len(card) > _MOST_CARD_CHARACTERS:
            raise ValueError(f"it has {len(card)} characters")
        header = REGEX_YAML_BLOCK.search(card)
        depth = 0
        for event in yaml.parse(header.group(2), Loader=yaml.SafeLoader) if header else ():
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > _DEEPEST_YAML:
                raise ValueError(f"its metadata holds YAML aliases, or is nested more than {_DEEPEST_YAML} deep")
        parsed = ModelCard(card)
        changed = change(parsed.data, parsed.text)  # type: ignore[arg-type]
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise InputError(
            f"model: its README.md cannot be completed ({' '.join(str(error).split())[:300]}). Mend or remove it."
        ) from error
    atomic_write_text(path, changed)


def card_text(metadata: ModelCardData, text: str) -> str:
    """Metadata and Markdown as the Hub reads them."""
    return f"---\n{metadata.to_yaml()}\n---\n\n{text.lstrip()}"


def _with_results(metadata: ModelCardData, text: str, results: list[EvalResult], model_name: str) -> str:
    identifiers = {result.unique_identifier for result in results}
    kept = [result for result in metadata.eval_results or [] if result.unique_identifier not in identifiers]
    metadata.eval_results, metadata.model_name = kept + results, model_name
    section = _results_section(kept + results)
    before, start, rest = text.partition(_RESULTS_START)
    _, end, after = rest.partition(_RESULTS_END)
    if start and end:
        return card_text(metadata, f"{before}{section}{after.lstrip()}")
    before, heading, after = text.partition(_LIMITS_HEADING)
    return card_text(metadata, f"{before.rstrip()}\n\n{section}{heading}{after}")


def _results_section(results: Sequence[EvalResult]) -> str:
    """A table of what the metadata holds; files of one name are told apart by their fingerprints."""
    revisions: dict[str, set[str | None]] = {}
    for result in results:
        revisions.setdefault(result.dataset_name, set()).add(result.dataset_revision)
    rows, notes = [], []
    for result in results:
        arguments, dataset, name = result.metric_args or {}, result.dataset_args or {}, result.dataset_name
        name = f"{name} ({result.dataset_revision})" if len(revisions[name]) > 1 else name
        metric = result.metric_name or result.metric_type
        rows.append((name, metric, arguments.get("n"), result.metric_value, arguments.get("interval_95")))
        found = [f"{dataset[count]} {text}" for count, text in LEFT_OUT.items() if dataset.get(count)]
        if dataset.get("complete") is False:
            found.append(f"no score of the whole. Missing: {'; '.join(dataset.get('missing', []))}")
        notes += [f"{name}: {', '.join(found)}."] if found else []
    table = Table(("data", "metric", "n", "value", "95 % interval"), rows, align="llrrr")
    said = map(markdown_paragraph, dict.fromkeys(notes))
    text = fill_markdown("card_results.md.j2", table=markdown_table(table), notes=said)
    return f"{_RESULTS_START}\n{text}{_RESULTS_END}\n\n"
