"""Reading benchmark suites: the public layouts, from the Hub or from local files, as items of one form."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inform_rm.data.columns import Columns
from inform_rm.data.messages import Message, to_messages
from inform_rm.data.pairs import BadRow, parse_pair
from inform_rm.data.records import Records, data_suffix, open_file
from inform_rm.data.sources import (
    Sources,
    is_saved_dataset,
    load_hub,
    open_parts,
    parse_source,
    source_label,
    source_list,
)
from inform_rm.errors import InputError, shortened
from inform_rm.eval.suites.scores import NUM_STYLES, ties_id, twin_id
from inform_rm.eval.suites.tables import HubSource, Suite

MOST_REASONS = 20
_JUDGE_CATEGORIES = {
    "mmlu-pro": "knowledge", "livebench-reasoning": "reasoning", "livebench-math": "math", "livecodebench": "coding",
}  # fmt: skip


@dataclass(frozen=True)
class SuiteItem:
    """A prompt and its candidate responses, the ``num_correct`` correct ones first, and where they were read."""

    id: str
    subset: str
    prompt: list[Message]
    candidates: list[str]
    num_correct: int
    file: str
    row: int


@dataclass(frozen=True)
class SuiteData:
    """The items of a suite.

    Attributes:
        items: in reading order; ids are unique.
        sources: for each source ``source``, ``fingerprint`` (SHA-256 of its items' content in order), ``items`` read,
            ``bad_rows`` and, where there are any, the first ``bad_row_reasons``.
    """

    items: list[SuiteItem]
    sources: list[dict[str, Any]]


def load_suite_items(
    suite: Suite,
    data: Sources | None = None,
    *,
    revision: str | None = None,
    on_bad_row: str = "error",
) -> SuiteData:
    """Read a suite's items.

    Args:
        suite: which.
        data: ``None`` for the suite's data set on the Hub, or files and folders; also a Hub id that the suite's
            table names (``allenai/preference-test-sets`` adds RewardBench's prior sets). A folder is searched for
            files in any of the formats of `records`; in it, files named ``train...`` are left out. In every suite but
            those with lists of candidates, rows of ``prompt``, ``chosen``, ``rejected``, ``subset`` and ``id`` are
            read beside the public layout. Where rows name no subset, the names of file and folders do. Or rows in
            memory, see `inform_rm.data.sources.open_parts`, which name their subset.
        revision: branch, tag or commit on the Hub.
        on_bad_row: ``"error"``, or ``"skip"``, which counts and lists rows that cannot be used.

    Raises:
        BadRow: under ``"error"``: a row in no known layout, of an unknown subset, or with unusable text.
        InputError: no data, an unreadable source, or the same item twice.
    """
    if on_bad_row not in ("error", "skip"):
        raise InputError(f"on_bad_row: got {on_bad_row!r}; expected 'error' or 'skip'.")
    items: list[SuiteItem] = []
    sources: list[dict[str, Any]] = []
    seen: dict[str, list[SuiteItem]] = {}
    for name, parts in _sources(suite, data, revision):
        bad: list[BadRow] = []
        digest = hashlib.sha256()
        first = len(items)
        for part in parts:
            for item in _items_of(suite, part, bad, on_bad_row):
                content = [item.id, item.subset, item.prompt, item.candidates, item.num_correct]
                digest.update((json.dumps(content, ensure_ascii=False, sort_keys=True) + "\n").encode())
                items.append(_with_own_id(suite, item, seen.setdefault(item.id, [])))
        record: dict[str, Any] = {"source": name, "fingerprint": digest.hexdigest(), "items": len(items) - first}
        record["bad_rows"] = len(bad)
        if bad:
            record["bad_row_reasons"] = [str(row) for row in bad[:MOST_REASONS]]
        if len(items) == first:
            reasons = "".join(f" {row}" for row in bad[:3])
            raise InputError(f"{name}: no items of {suite.name}.{reasons}")
        sources.append(record)
    return SuiteData(items, sources)


@dataclass(frozen=True)
class _Part:
    """Rows from one place; ``subset`` is what the place itself says about theirs."""

    name: str
    records: Records
    subset: str | None = None


def _sources(suite: Suite, data: Sources | None, revision: str | None) -> Iterator[tuple[str, list[_Part]]]:
    if data is None:
        if not suite.hub:
            raise InputError(f"suite: {suite.name} is not on the Hub in a readable form. Name its files with data.")
        for source in suite.hub:
            if source.by_default:
                yield _hub_name(source), [_hub_part(suite, source, revision)]
        return
    named = source_list(data)
    if not named:
        raise InputError(f"data: expected files of {suite.name}, or leave it out to read the Hub.")
    for each in named:
        if not isinstance(each, str | Path):
            yield source_label(each), [_Part(*part) for part in open_parts(each, revision=revision)]
            continue
        where = parse_source(each)
        path = Path(where.name)
        if path.is_dir() and where.split is None and not is_saved_dataset(path):
            _refuse_revision(each, revision)
            yield str(each), [_file_part(file, path) for file in _files_in(path)]
        elif path.exists() or not any(known.hub_id == where.name for known in suite.hub):
            root = path.parent if path.is_file() else path
            yield (
                str(each),
                [
                    _Part(name, records, _place(Path(name), root))
                    for name, records in open_parts(each, revision=revision)
                ],
            )
        else:
            on_hub = [
                known
                for known in suite.hub
                if (known.hub_id, known.split) == (where.name, where.split or known.split)
                and where.config in (None, known.config)
            ]
            if not on_hub:
                splits = ", ".join(f"{known.hub_id}[{known.split}]" for known in suite.hub)
                raise InputError(f"data: {suite.name} has no part {each}; its parts are {splits}.")
            for known in on_hub:
                yield _hub_name(known), [_hub_part(suite, known, revision)]


def _hub_name(source: HubSource) -> str:
    return "/".join(part for part in (source.hub_id, source.config, source.data_dir, source.split) if part)


def _hub_part(suite: Suite, source: HubSource, revision: str | None) -> _Part:
    try:
        rows = load_hub(source.hub_id, source.split, revision, config=source.config, data_dir=source.data_dir)
    except InputError as error:
        raise InputError(
            f"suite: {suite.name} could not be read from the Hub ({shortened(str(error), 300)}). Check the "
            "network, or name local files or folders: --data FILES (Python: data=...)."
        ) from error
    return _Part(_hub_name(source), enumerate(rows, start=1), source.subset)


def _file_part(path: Path, root: Path) -> _Part:
    """Rows of a file, with its place below ``root``."""
    name, records = open_file(path)
    return _Part(name, records, _place(path, root))


def _place(path: Path, root: Path) -> str:
    inside = path.relative_to(root) if root in path.parents else Path(path.name)
    return f"{root.name}/{inside}"


def _refuse_revision(name: str | Path, revision: str | None) -> None:
    if revision is not None:
        raise InputError(f"revision: {revision!r} was given, but {name} is a local folder. Leave revision out.")


def _files_in(folder: Path) -> list[Path]:
    found = sorted(
        file for file in folder.rglob("*")
        if file.is_file() and data_suffix(file.name) and not file.name.startswith(("train", "result", "statistics"))
    )  # fmt: skip
    if not found:
        raise InputError(f"{folder}: a folder without data files. Name the folder or the files that hold the suite.")
    return found


def _items_of(suite: Suite, part: _Part, bad: list[BadRow], on_bad_row: str) -> Iterator[SuiteItem]:
    for row, record in part.records:
        try:
            if isinstance(record, str):  # the reader's description of a row that it could not read
                raise BadRow(part.name, row, record, "unreadable")
            yield from _parsed(suite, record, part, row)
        except BadRow as fault:
            if on_bad_row == "error":
                reason = f"{fault.reason} (on_bad_row='skip' leaves bad rows out and lists them.)"
                raise BadRow(fault.file, fault.row, reason, fault.kind) from None
            bad.append(fault)


def _parsed(suite: Suite, record: Any, part: _Part, row: int) -> list[SuiteItem]:
    if not isinstance(record, dict):
        raise BadRow(part.name, row, f"expected an object with fields, got {type(record).__name__}.")
    layout = next((name for name in suite.layouts if _FIELDS[name] <= record.keys()), None)
    if layout is None:
        wanted = "; or ".join(", ".join(sorted(_FIELDS[name])) for name in suite.layouts)
        there = shortened(", ".join(map(str, record)), 200)
        raise BadRow(part.name, row, f"in no layout of {suite.name}: it has {there}; expected {wanted}.", "layout")
    try:
        return _LAYOUTS[layout](suite, record, part, row)
    except _Fault as fault:
        raise BadRow(part.name, row, str(fault)) from None


class _Fault(Exception):
    """What is wrong with a row, before its place is known."""


def _pair(suite: Suite, record: dict[str, Any], part: _Part, row: int) -> list[SuiteItem]:
    # Anthropic's rows name no prompt; other fields called prompt, chosen, rejected are those of preferences.
    pair = parse_pair(record, part.name, row, columns=Columns(sides="reply"), allow_identical=True)
    subset = record.get("subset")
    if suite.name == "judgebench" and subset is not None:
        category = str(subset).removeprefix("judgebench-")
        subset = f"{_judge_half(record, part)}/{'coding' if category == 'code' else category}"
    return [_item(suite, record, part, row, subset, pair.prompt, [pair.chosen, pair.rejected], 1)]


def _lists(suite: Suite, record: dict[str, Any], part: _Part, row: int) -> list[SuiteItem]:
    chosen, rejected = _texts(record, "chosen"), _texts(record, "rejected")
    item = _item(suite, record, part, row, record.get("subset"), record["prompt"], chosen + rejected, len(chosen))
    stated = record.get("num_correct")
    if stated is not None and stated != len(chosen):
        raise _Fault(f"'num_correct' is {stated}, but 'chosen' holds {len(chosen)}.")
    if item.subset != "Ties" and (len(chosen), len(rejected)) != (1, 3):
        raise _Fault(f"{len(chosen)} chosen and {len(rejected)} rejected; {item.subset} has 1 and 3 (best of 4).")
    if item.subset == "Ties":
        place = ties_id(item.id)
        if place is None:
            raise _Fault(f"'id' is {record.get('id')!r}; items of Ties have ref:NUMBER or tied:NUMBER.")
        if place[0] == "tied" and len(chosen) < 2:
            raise _Fault("a tied item of Ties has at least two correct answers in 'chosen'.")
    return [item]


def _styles(suite: Suite, record: dict[str, Any], part: _Part, row: int) -> list[SuiteItem]:
    chosen, rejected = _texts(record, "chosen"), _texts(record, "rejected")
    if (len(chosen), len(rejected)) != (NUM_STYLES, NUM_STYLES):
        raise _Fault(f"{len(chosen)} chosen and {len(rejected)} rejected; expected concise, detailed and markdown.")
    # The authors' files of one domain name it in their own name alone; `subset` says there where a row came from.
    of_domain = _domain_file(part.subset) is not None
    domain = record.get("domain", None if of_domain else record.get("subset"))
    return [_item(suite, record, part, row, domain, record["prompt"], chosen + rejected, NUM_STYLES)]


def _judge(suite: Suite, record: dict[str, Any], part: _Part, row: int) -> list[SuiteItem]:
    sides = [record["response_A"], record["response_B"]]
    if record["label"] not in ("A>B", "B>A"):
        raise _Fault(f"'label' is {record['label']!r}; expected 'A>B' or 'B>A'.")
    if record["label"] == "B>A":
        sides.reverse()
    source = str(record.get("source"))
    category = next((name for start, name in _JUDGE_CATEGORIES.items() if source.startswith(start)), None)
    if category is None:
        raise _Fault(f"'source' is {source!r}; expected one that starts with {', '.join(_JUDGE_CATEGORIES)}.")
    subset = f"{_judge_half(record, part)}/{category}"
    return [_item(suite, record, part, row, subset, record["question"], sides, 1)]


def _judge_half(record: dict[str, Any], part: _Part) -> str:
    """Which model wrote the responses: ``gpt`` or ``claude``, from the row, its id or the place where it lies."""
    for text in (record.get("response_model"), record.get("id"), part.name):
        for half in ("gpt", "claude"):
            if half in str(text or "").lower():
                return half
    raise _Fault("neither 'response_model', nor 'id', nor the file's name says gpt or claude.")


def _llmbar(suite: Suite, record: dict[str, Any], part: _Part, row: int) -> list[SuiteItem]:
    sides = _preferred_first(record, "label")
    return [_item(suite, record, part, row, record.get("subset"), record["input"], sides, 1)]


def _alpacaeval(suite: Suite, record: dict[str, Any], part: _Part, row: int) -> list[SuiteItem]:
    prompt = "\n\n".join(text for text in (record["instruction"], record.get("input")) if text)
    sides = _preferred_first(record, "preference")
    return [_item(suite, record, part, row, "alpacaeval", prompt, sides, 1)]


def _preferred_first(record: dict[str, Any], field: str) -> list[Any]:
    label = record[field]
    if label not in (1, 2, "1", "2") or isinstance(label, bool):
        raise _Fault(f"'{field}' is {label!r}; expected 1 or 2, the better output.")
    sides = [record["output_1"], record["output_2"]]
    return sides if int(label) == 1 else sides[::-1]


def _choices(suite: Suite, record: dict[str, Any], part: _Part, row: int) -> list[SuiteItem]:
    items = []
    for name in ("mc1", "mc2"):
        targets = record[f"{name}_targets"]
        try:
            if isinstance(targets, dict) and isinstance(targets.get("choices"), list):
                labelled = list(zip(targets["choices"], targets["labels"], strict=True))
            else:  # the authors' own file: {text: label}
                labelled = list(targets.items())
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise _Fault(f"'{name}_targets' holds no choices with labels ({error}).") from None
        if any(label not in (0, 1) for _, label in labelled):
            raise _Fault(f"a label of '{name}_targets' is neither 0 nor 1.")
        right, wrong = ([text for text, label in labelled if label == wanted] for wanted in (1, 0))
        if not right or not wrong or (name == "mc1" and len(right) > 1):
            raise _Fault(f"'{name}_targets' has {len(right)} right and {len(wrong)} wrong choices.")
        items.append(_item(suite, record, part, row, name, record["question"], right + wrong, len(right)))
    return items


_FIELDS = {
    "pair": {"chosen", "rejected"},
    "lists": {"prompt", "chosen", "rejected"},
    "styles": {"prompt", "chosen", "rejected"},
    "judge": {"question", "response_A", "response_B", "label"},
    "llmbar": {"input", "output_1", "output_2", "label"},
    "alpacaeval": {"instruction", "output_1", "output_2", "preference"},
    "choices": {"question", "mc1_targets", "mc2_targets"},
}
_LAYOUTS = {
    "pair": _pair, "lists": _lists, "styles": _styles, "judge": _judge, "llmbar": _llmbar, "alpacaeval": _alpacaeval,
    "choices": _choices,
}  # fmt: skip


def _item(
    suite: Suite,
    record: dict[str, Any],
    part: _Part,
    row: int,
    subset: Any,
    prompt: Any,
    texts: Iterable[Any],
    right: int,
) -> SuiteItem:
    candidates = list(texts)
    for text in candidates:
        if not isinstance(text, str) or not text.strip():
            raise _Fault(f"a candidate is {shortened(repr(text), 60)}; expected text.")
        _check_encodable(text)
    name = _subset_name(suite, subset, part)
    try:
        messages = to_messages(prompt)
    except InputError as error:
        raise _Fault(str(error)) from None
    identifier = next((record[key] for key in ("id", "pair_id") if record.get(key) is not None), row)
    identifier = str(identifier)
    _check_encodable(identifier)
    if not identifier.startswith(name + "/"):
        identifier = f"{name}/{identifier}"
    if suite.name == "prompt-swap" and twin_id(identifier) is None:
        raise _Fault(f"'id' is {record.get('id')!r}; twins have ids that end in /a and /b.")
    return SuiteItem(identifier, name, messages, candidates, right, part.name, row)


def _domain_file(place: str | None) -> str | None:
    """The domain in the name of one of the files of RM-Bench's authors: ``chat_filtered.json``."""
    name = Path(place or "").name
    stem = name.removesuffix(data_suffix(name) or "")
    return stem.removesuffix("_filtered") if stem.endswith("_filtered") else None


def _subset_name(suite: Suite, subset: Any, part: _Part) -> str:
    known = {name.lower(): name for name in suite.subsets} | {alias.lower(): name for alias, name in suite.aliases}
    if part.subset in suite.subsets:  # a split on the Hub is one subset, whatever its rows call theirs
        return part.subset
    if subset is not None:
        if str(subset).strip().lower() in known:
            return known[str(subset).strip().lower()]
        raise _Fault(f"subset {shortened(repr(subset))} is none of {suite.name}'s: {', '.join(suite.subsets)}.")
    for place in reversed(Path(part.subset or "").parts):
        stem = _domain_file(place) or place.removesuffix(data_suffix(place) or "")
        if stem.lower() in known:
            return known[stem.lower()]
    raise _Fault(f"no 'subset', and neither file nor folder is named after one: {', '.join(suite.subsets)}.")


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _Fault(f"a text has an unpaired surrogate at character {error.start + 1}. Repair it.") from None


def _texts(record: dict[str, Any], field: str) -> list[Any]:
    value = record[field]
    if not isinstance(value, list) or not value:
        raise _Fault(f"'{field}' is {shortened(repr(value), 60)}; expected a list of responses.")
    return value


def _with_own_id(suite: Suite, item: SuiteItem, earlier: list[SuiteItem]) -> SuiteItem:
    """The item under an id that no other has, as a source may use one twice; ``earlier`` are those with its id.

    Raises:
        BadRow: the very same item came before, so that a file is read twice; or the id is what pairs items.
    """
    for other in earlier:
        if (item.prompt, item.candidates) == (other.prompt, other.candidates):
            reason = (
                f"the same item as {other.file}, row {other.row}. Name each file once, and no file that holds others."
            )
            raise BadRow(item.file, item.row, reason, "duplicate")
    if earlier and (item.subset == "Ties" or suite.name == "prompt-swap"):
        raise BadRow(
            item.file, item.row, f"the id {item.id!r} stands there twice, and ids pair items here.", "duplicate"
        )
    earlier.append(item)
    return item if len(earlier) == 1 else replace(item, id=f"{item.id}#{len(earlier)}")
