"""The pairs of a training run as token ids, read from the cache while nothing that decides them has changed."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from datasets import Dataset, Features, concatenate_datasets, load_from_disk

from inform_rm.data.columns import log_reading
from inform_rm.data.encoding import ENCODED_GROUPS, EncodedPairs, encode_pairs
from inform_rm.data.pairs import BadRow
from inform_rm.data.preferences import load_preferences
from inform_rm.data.rendered_text import add_not_as_written, warn_of_text
from inform_rm.data.sources import source_digest
from inform_rm.errors import InputError
from inform_rm.scoring.reward_models import fingerprint_tokenizer
from inform_rm.training.augmentation import add_non_contextual_pairs
from inform_rm.training.losses import MOST_TIED
from inform_rm.training.reward_arguments import RewardTrainingArguments
from inform_rm.util.files import atomic_directory, file_digest, package_version, write_json
from inform_rm.util.rankings import untied_gaps

logger = logging.getLogger(__name__)

_RECORD = "inform_rm.json"
_PACKAGE = Path(__file__).parents[1]
_DECIDING_FILES = (
    *sorted(f"data/{path.name}" for path in (_PACKAGE / "data").glob("*.py") if not path.name.startswith("check_")),
    "safety/chat_templates.py", "training/augmentation.py", "training/data.py",
)  # fmt: skip


ARGUMENTS = {"data": "train_dataset", "eval_data": "eval_dataset"}  # setting -> argument of the trainer


def in_memory(setting: str) -> str:
    """How rows that were passed as an object are called, in place of a file; no Hub dataset can be called so."""
    return f"{ARGUMENTS[setting]} (in memory)"


@dataclass(frozen=True)
class TrainingPairs:
    """Encoded pairs of all sources of one setting.

    Attributes:
        dataset: see `inform_rm.data.encoding.EncodedPairs`; groups where rankings or scored responses are among the
            sources.
        counts: pairs used (of rankings all untied ones; with them ``rows``, ``responses`` and ``layouts``, too),
            overlong, dropped and truncated rows, those ``not_as_written`` (see `EncodedPairs`), the ``bad_rows`` that
            were left out, as text, and the ``reading`` of each source: which columns were read, and how.
        fingerprints: per source the SHA-256 of its pairs, see `inform_rm.data.preferences.PreferenceData`.
    """

    dataset: Dataset
    counts: dict[str, Any]
    fingerprints: dict[str, str]


def names_in(rows: Any) -> tuple[str, ...]:
    """The sources that are given by name where rows may be, as ``args.data`` takes them; else none."""
    names = [rows] if isinstance(rows, str | Path) else rows if isinstance(rows, list | tuple) else []
    return tuple(map(str, names)) if all(isinstance(name, str | Path) for name in names) else ()


def is_encoded(rows: Any) -> bool:
    """Whether rows are pairs or groups of token ids already."""
    return bool({"chosen_input_ids", "responses_input_ids"} & set(getattr(rows, "column_names", None) or ()))


def choose_splits(train: Any, evaluation: Any) -> tuple[Any, Any]:
    """Of a `DatasetDict` its ``train`` split, and to evaluate ``validation`` or ``test``, if it has one of them.

    Raises:
        InputError: it is not clear which split is meant.
    """
    if isinstance(train, dict):
        if evaluation is None and len({"validation", "test"} & set(train)) == 1:
            evaluation = train
        train = _split("train_dataset", train, ("train",))
    if isinstance(evaluation, dict):
        evaluation = _split("eval_dataset", evaluation, ("validation", "test"))
    return train, evaluation


def _split(argument: str, splits: dict[str, Any], names: tuple[str, ...]) -> Any:
    found = [name for name in names if name in splits] or (list(splits) if len(splits) == 1 else [])
    if {"chosen", "responses", "response"} & set(splits):
        raise InputError(f"{argument}: a dict of columns; expected rows. datasets.Dataset.from_dict makes them.")
    if len(found) != 1:
        raise InputError(f"{argument}: has the splits {', '.join(splits)}; pass one of them, data[SPLIT].")
    logger.info("%s: split %r.", argument, found[0])
    return splits[found[0]]


def load_training_pairs(
    args: RewardTrainingArguments,
    sources: Sequence[Any],
    max_pairs: int | None,
    tokenizer: Any,
    argument: str,
    max_length: int | None,
) -> TrainingPairs:
    """Read, check and encode all sources, or take the result of an earlier call from the cache.

    The cache lies in ``inform_rm_pairs`` in the cache folder of `datasets` (``HF_DATASETS_CACHE``), one folder for
    each combination of data, tokenizer, chat template, settings and versions; ``datasets.disable_caching()`` turns it
    off. Folders in it may be deleted at any time.

    ``sources`` are files, folders, Hub ids or rows in memory, of each at most ``max_pairs``, drawn by ``args.seed``;
    ``argument`` is ``"data"`` or ``"eval_data"``; ``max_length`` is in tokens of prompt + response.
    """
    augment = args.augmentation == "rrm" and argument == "data"  # evaluation is on the pairs as they are
    # One process encodes, the others find the result in the cache.
    with PartialState().main_process_first():
        folder = _cache_folder(args, sources, max_pairs, tokenizer, augment, max_length)
        pairs = None if folder is None else _read(folder)
        if pairs is None:
            pairs = _encode(args, sources, max_pairs, tokenizer, augment, max_length, argument)
            if folder is not None and PartialState().is_main_process:
                _write(folder, pairs)
        else:
            check_layouts(args, argument, set(pairs.counts.get("layouts", ("pair",))))
            logger.info("%s: taken from the cache %s.", argument, folder)
            warn_of_text(pairs.counts["not_as_written"], pairs.counts["pairs"])
    counts = pairs.counts
    if argument == "data" and args.ranking_loss == "plackett_luce" and "layouts" in counts:
        _check_ties(pairs.dataset)
    if counts["bad_rows"] or counts["dropped"] or counts["truncated"]:
        logger.warning("%s: %s", argument, counts)
    return pairs


def _encode(
    args: RewardTrainingArguments,
    sources: Sequence[Any],
    max_pairs: int | None,
    tokenizer: Any,
    augment: bool,
    max_length: int | None,
    argument: str,
) -> TrainingPairs:
    parts: list[tuple[str, Dataset]] = []
    fingerprints: dict[str, str] = {}
    bad_rows: list[str] = []
    readings: dict[str, Any] = {}
    for source in sources:
        name = source if isinstance(source, str) else in_memory(argument)
        loaded = load_preferences(
            source, columns=args.columns, on_bad_row=args.on_bad_row, score_weights=args.score_weights
        )
        log_reading(name, loaded.reading)
        readings[name] = loaded.reading.to_dict()
        bad_rows += [str(row) for row in loaded.bad_rows]
        fingerprints[name] = loaded.fingerprint
        part = loaded.dataset
        if max_pairs is not None and len(part) > max_pairs:
            part = part.shuffle(seed=args.seed).select(range(max_pairs))
        parts.append((loaded.layout, part))
    layouts = {layout for layout, _ in parts}
    check_layouts(args, argument, layouts)
    rules: dict[str, Any] = {"max_length": max_length, "overlong": args.overlong, "on_bad_row": args.on_bad_row}
    if layouts == {"pair"}:
        pairs = concatenate_datasets([part for _, part in parts])
        if augment:
            pairs = add_non_contextual_pairs(pairs, args.seed)
        encoded = encode_pairs(pairs, tokenizer, keep_text=_keeps_text(args), **rules)
        counted: dict[str, Any] = {"pairs": len(encoded.dataset)}
    else:
        encoded = encode_mixed(parts, tokenizer, **rules)
        counted = _counts_of_groups(encoded.dataset, sorted(layouts))
    bad_rows += [str(row) for row in encoded.bad_rows]
    counts = {**encoded.counts, **counted, "bad_rows": bad_rows, "reading": readings}
    return TrainingPairs(encoded.dataset, counts, fingerprints)


def encode_mixed(parts: Sequence[tuple[str, Dataset]], tokenizer: Any, **rules: Any) -> EncodedPairs:
    """Encode data sets of several layouts (layout and rows of each), pairs as groups of two; counts are of all.

    ``rules`` are ``max_length``, ``overlong`` and ``on_bad_row`` of `encode_pairs`.
    """
    datasets: list[Dataset] = []
    counts: dict[str, Any] = {}
    bad_rows: list[BadRow] = []
    for layout, part in parts:
        encoded = encode_pairs(part, tokenizer, **rules)
        datasets.append(as_groups(encoded.dataset) if layout == "pair" else encoded.dataset)
        bad_rows += encoded.bad_rows
        lost = counts.pop("not_as_written", {"n": 0, "examples": []})
        add_not_as_written(lost, encoded.counts.pop("not_as_written"))
        counts = {name: counts.get(name, 0) + number for name, number in encoded.counts.items()}
        counts["not_as_written"] = lost
    return EncodedPairs(concatenate_datasets(datasets), counts, bad_rows)


def as_groups(pairs: Dataset) -> Dataset:
    """Encoded pairs as groups of two, the chosen response first, with their margin."""

    def groups(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        sides = zip(batch["chosen_input_ids"], batch["rejected_input_ids"], strict=True)
        characters = zip(batch["chosen_characters"], batch["rejected_characters"], strict=True)
        return {
            "responses_input_ids": list(map(list, sides)),
            "labels": [[1.0, 0.0] for _ in batch["id"]],
            "characters": list(map(list, characters)),
        }

    return pairs.map(
        groups, batched=True, remove_columns=[name for name in pairs.column_names if name not in ENCODED_GROUPS],
        features=Features(ENCODED_GROUPS), load_from_cache_file=False,
        new_fingerprint=f"{pairs._fingerprint}-groups", desc="Pairs as groups",
    )  # fmt: skip


def check_layouts(args: RewardTrainingArguments, argument: str, layouts: set[str]) -> None:
    """Refuse settings that do not go with what kinds of rows there are."""
    faults = args.against_groups(layouts) if argument == "data" and layouts != {"pair"} else []
    if argument == "data" and args.score_weights and "scored" not in layouts and not args.eval_data:
        faults.append("score_weights is for scored responses, of which there are none: leave it out")
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    if argument == "eval_data" and args.load_best_model_at_end:
        if layouts == {"scored"} and metric in ("accuracy", "kendall_tau"):
            faults.append(
                f"metric_for_best_model {metric!r} is about comparisons, of which the evaluation data, scored "
                "responses, have none: set eval_rmse and greater_is_better false"
            )
        if metric == "rmse" and args.greater_is_better:
            faults.append("metric_for_best_model 'eval_rmse' is an error: set greater_is_better false")
    if faults:
        raise InputError("Training settings: " + "; ".join(faults) + ".")


def _counts_of_groups(groups: Dataset, layouts: list[str]) -> dict[str, Any]:
    """``pairs`` (untied ones, of all rows), ``rows``, ``responses`` and ``layouts``."""
    labels = groups.with_format(None)["labels"]
    pairs = sum(len(untied_gaps(each, each)) for each in labels)
    return {"pairs": pairs, "rows": len(groups), "responses": sum(map(len, labels)), "layouts": layouts}


def _check_ties(groups: Dataset) -> None:
    """Refuse rankings with more ties than `plackett_luce_loss` takes."""
    for row, labels in zip(groups["id"], groups["labels"], strict=True):
        number = max([count for label, count in Counter(labels).items() if label > min(labels)], default=0)
        if number > MOST_TIED:
            raise InputError(
                f"ranking_loss: 'plackett_luce' sums over the orders of tied responses and takes at most {MOST_TIED} "
                f"above others; row {row} has {number}. Choose all_pairs."
            )


def _keeps_text(args: RewardTrainingArguments) -> bool:
    return args.objective == "prioritized"  # whose pairs are encoded again, with other prompts


def _cache_folder(
    args: RewardTrainingArguments,
    sources: Sequence[Any],
    max_pairs: int | None,
    tokenizer: Any,
    augment: bool,
    max_length: int | None,
) -> Path | None:
    """Where the pairs of these settings are cached; ``None`` where they must not be, or a source cannot be read."""
    # A tokenizer written in Python has no text that tells all it does.
    if not all(isinstance(source, str) for source in sources):
        return None
    if not datasets.is_caching_enabled() or getattr(tokenizer, "backend_tokenizer", None) is None:
        return None
    try:
        digests = [source_digest(source) for source in sources]
    except (InputError, OSError):
        return None  # reading it as data says what is wrong
    decides = {
        # Names too: they are part of the rows' ids and of messages about bad rows.
        "sources": list(zip(map(str, sources), digests, strict=True)),
        "tokenizer": fingerprint_tokenizer(tokenizer),
        "settings": [args.columns, args.score_weights, max_length, args.overlong, args.on_bad_row, _keeps_text(args)],
        "choice": None if max_pairs is None else [max_pairs, args.seed],
        "augmentation": [args.augmentation, args.seed] if augment else None,
        "versions": {name: package_version(name) for name in ("datasets", "transformers", "tokenizers", "jinja2")},
        "code": [file_digest(_PACKAGE / name) for name in _DECIDING_FILES],
    }
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
    return Path(datasets.config.HF_DATASETS_CACHE) / "inform_rm_pairs" / key[:32]


def _read(folder: Path) -> TrainingPairs | None:
    if not (folder / _RECORD).is_file():
        return None
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        return TrainingPairs(dataset=load_from_disk(str(folder / "pairs")), **record)
    except Exception as error:  # Arrow, datasets and JSON raise many types for a damaged file
        logger.warning("The cached pairs in %s are unreadable (%s); encoding anew.", folder, error)
        return None


def _write(folder: Path, pairs: TrainingPairs) -> None:
    try:
        with atomic_directory(folder) as temporary:
            pairs.dataset.save_to_disk(str(temporary / "pairs"))
            record = asdict(pairs)
            write_json(temporary / _RECORD, {name: record[name] for name in ("counts", "fingerprints")})
    except OSError as error:
        logger.warning("The encoded pairs could not be cached in %s (%s); the run goes on.", folder, error)
