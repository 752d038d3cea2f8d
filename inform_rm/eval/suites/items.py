"""Reading benchmark suites: the public layouts, from the Hub or from local files, as items of one form."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inform_rm.data import sources as places
from inform_rm.data.columns import Columns
from inform_rm.data.encoding import skippable
from inform_rm.data.messages import Fault, Message, check_unicode, prompt_messages
from inform_rm.data.pairs import BadRow, parse_pair
from inform_rm.data.records import Records, data_suffix, open_file
from inform_rm.data.sources import Sources, open_parts
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


def load_suite_items(
    suite: Suite, data: Sources | None = None, *, revision: str | None = None, on_bad_row: str = "error"
) -> tuple[list[SuiteItem], list[dict[str, Any]]]:
    """Read a suite's items; what they are read from is said for each source.

    Args:
        suite: which.
        data: ``None`` for the suite's data set on the Hub, or files and folders; also a Hub id that the suite's
            table names (``allenai/preference-test-sets`` adds RewardBench's prior sets). A folder is searched for
            files in any of the formats of `records`; in it, files named ``train...`` are left out. In every suite but
            those with lists of candidates, rows of ``prompt``, ``chosen``, ``rejected``, ``subset`` and ``id`` are
            read beside the public layout. Where rows name no subset, the names of file and folders do. Or rows in
            memory, see `inform_rm.data.sources.open_parts`, which name their subset.
        revision: branch, tag or commit on the Hub.
        on_bad_row: ``"error"`` (`BadRow`), or ``"skip"``, which counts and lists rows that cannot be used: in no
            known layout, of an unknown subset, or with unusable text.

    Returns:
        The items in reading order, under unique ids; and for each source ``source``, ``fingerprint`` (SHA-256 of its
        items' content in order), ``items`` read, ``bad_rows`` and, where there are any, the first
        ``bad_row_reasons``.
    """
    items: list[SuiteItem] = []
    sources: list[dict[str, Any]] = []
    seen: dict[str, list[SuiteItem]] = {}
    for name, parts in _sources(suite, data, revision):
        bad: list[BadRow] = []
        digest = hashlib.sha256()
        first = len(items)
        for part in parts:
            for found in _items_of(suite, part):
                if isinstance(found, BadRow):
                    if on_bad_row == "error":
                        raise skippable(found)
                    bad.append(found)
                    continue
                content = [found.id, found.subset, found.prompt, found.candidates, found.num_correct]
                digest.update((json.dumps(content, ensure_ascii=False, sort_keys=True) + "\n").encode())
                items.append(_with_own_id(suite, found, seen.setdefault(found.id, [])))
        record = {"source": name, "fingerprint": digest.hexdigest(), "items": len(items) - first, "bad_rows": len(bad)}
        if bad:
            record["bad_row_reasons"] = [str(row) for row in bad[:MOST_REASONS]]
        if len(items) == first:
            reasons = "".join(f" {row}" for row in bad[:3])
            raise InputError(f"{name}: no items of {suite.name}.{reasons}")
        sources.append(record)
    return items, sources


@dataclass(frozen=True)
class _Part:
    """Rows from one place; the last name in ``place`` that is a subset's is that of rows that name none."""

    name: str
    records: Records
    place: str = ""


def _sources(suite: Suite, data: Sources | None, revision: str | None) -> Iterator[tuple[str, list[_Part]]]:
    """Each source's name and parts."""
    if data is None:
        if not suite.hub:
            raise InputError(f"suite: {suite.name} is not on the Hub in a readable form. Name its files with data.")
        yield from (_from_hub(suite, known, revision) for known in suite.hub if known.by_default)
        return
    named = places.source_list(data)
    if not named:
        raise InputError(f"data: expected files of {suite.name}, or leave it out to read the Hub.")
    for each in named:
        if not isinstance(each, str | Path):
            yield places.source_label(each), [_Part(*part) for part in open_parts(each, revision=revision)]
            continue
        where = places.parse_source(each)
        path = Path(where.name)
        on_hub = [] if path.exists() else [known for known in suite.hub if known.hub_id == where.name]
        if on_hub:
            named_part = {name: value for name, value in (("split", where.split), ("config", where.config)) if value}
            wanted = [known for known in on_hub if named_part.items() <= vars(known).items()]
            if not wanted:
                splits = ", ".join(f"{known.hub_id}[{known.split}]" for known in suite.hub)
                raise InputError(f"data: {suite.name} has no part {each}; its parts are {splits}.")
            yield from (_from_hub(suite, known, revision) for known in wanted)
        elif path.is_dir() and where.split is None and not places.is_saved_dataset(path):
            if revision is not None:
                raise InputError(f"revision: {revision!r} was given, but {each} is a local folder. Leave it out.")
            # Names of folders above the one that was named say nothing.
            files = _files_in(path)
            yield str(each), [_Part(*open_file(file), str(file.relative_to(path.parent))) for file in files]
        else:
            place = f"{path.parent.name}/{path.name}" if path.is_file() else path.name
            yield str(each), [_Part(*part, place) for part in open_parts(each, revision=revision)]


def _from_hub(suite: Suite, source: HubSource, revision: str | None) -> tuple[str, list[_Part]]:
    name = "/".join(part for part in (source.hub_id, source.config, source.data_dir, source.split) if part)
    try:
        rows = places.load_hub(source.hub_id, source.split, revision, config=source.config, data_dir=source.data_dir)
    except InputError as error:
        raise InputError(
            f"suite: {suite.name} could not be read from the Hub ({shortened(str(error), 300)}). Check the "
            "network, or name local files or folders: --data FILES (Python: data=...)."
        ) from error
    return name, [_Part(name, enumerate(rows, start=1), source.subset or "")]


def _files_in(folder: Path) -> list[Path]:
    found = sorted(
        file for file in folder.rglob("*")
        if file.is_file() and data_suffix(file.name) and not file.name.startswith(("train", "result", "statistics"))
    )  # fmt: skip
    if not found:
        raise InputError(f"{folder}: a folder without data files. Name the folder or the files that hold the suite.")
    return found


def _items_of(suite: Suite, part: _Part) -> Iterator[SuiteItem | BadRow]:
    """The items of the rows, and in place of those of a bad row its fault."""
    for row, record in part.records:
        try:
            if isinstance(record, str):  # the reader's description of a row that it could not read
                raise BadRow(part.name, row, record, "unreadable")
            if not isinstance(record, dict):
                raise BadRow(part.name, row, f"expected an object with fields, got {type(record).__name__}.")
            layout = next((name for name in suite.layouts if _LAYOUTS[name][0] <= record.keys()), None)
            if layout is None:
                wanted = "; or ".join(", ".join(sorted(_LAYOUTS[name][0])) for name in suite.layouts)
                there = shortened(", ".join(map(str, record)), 200)
                reason = f"in no layout of {suite.name}: it has {there}; expected {wanted}."
                raise BadRow(part.name, row, reason, "layout")
            marked = _LAYOUTS[layout][1](record, part, row)
            items = [_item(suite, record, part, row, each) for each in marked]
        except BadRow as bad:
            yield bad
        except Fault as fault:
            yield BadRow(part.name, row, str(fault))
        else:
            yield from items


@dataclass(frozen=True)
class _Marked:
    """What a layout says of an item: its subset, if any, prompt and candidates, the correct ones apart."""

    subset: Any
    prompt: Any
    correct: list[Any]
    wrong: list[Any]


def _invalid(reason: str) -> Fault:
    return Fault("invalid", reason)


def _pair(record: dict[str, Any], part: _Part, row: int) -> list[_Marked]:
    # Anthropic's rows name no prompt; other fields called prompt, chosen, rejected are those of preferences.
    pair = parse_pair(record, part.name, row, columns=Columns(sides="reply"), allow_identical=True)
    return [_Marked(record.get("subset"), pair.prompt, [pair.chosen], [pair.rejected])]


def _judge_pair(record: dict[str, Any], part: _Part, row: int) -> list[_Marked]:
    (marked,) = _pair(record, part, row)
    if marked.subset is None:
        return [marked]
    category = str(marked.subset).removeprefix("judgebench-")
    category = "coding" if category == "code" else category
    return [replace(marked, subset=f"{_judge_half(record, part)}/{category}")]


def _lists(record: dict[str, Any], part: _Part, row: int) -> list[_Marked]:
    marked = _Marked(record.get("subset"), record["prompt"], _texts(record, "chosen"), _texts(record, "rejected"))
    stated, number = record.get("num_correct"), len(marked.correct)
    if stated is not None and stated != number:
        raise _invalid(f"'num_correct' is {stated}, but 'chosen' holds {number}.")
    return [marked]


def _styles(record: dict[str, Any], part: _Part, row: int) -> list[_Marked]:
    chosen, rejected = _texts(record, "chosen"), _texts(record, "rejected")
    if (len(chosen), len(rejected)) != (NUM_STYLES, NUM_STYLES):
        raise _invalid(f"{len(chosen)} chosen and {len(rejected)} rejected; expected concise, detailed and markdown.")
    # The authors' files of one domain name it in their own name alone; `subset` says there where a row came from.
    subset = None if "_filtered." in Path(part.place).name else record.get("subset")
    return [_Marked(record.get("domain", subset), record["prompt"], chosen, rejected)]


def _judge(record: dict[str, Any], part: _Part, row: int) -> list[_Marked]:
    sides = [record["response_A"], record["response_B"]]
    if record["label"] not in ("A>B", "B>A"):
        raise _invalid(f"'label' is {record['label']!r}; expected 'A>B' or 'B>A'.")
    better, worse = sides if record["label"] == "A>B" else sides[::-1]
    source = str(record.get("source"))
    category = next((name for start, name in _JUDGE_CATEGORIES.items() if source.startswith(start)), None)
    if category is None:
        raise _invalid(f"'source' is {source!r}; expected one that starts with {', '.join(_JUDGE_CATEGORIES)}.")
    return [_Marked(f"{_judge_half(record, part)}/{category}", record["question"], [better], [worse])]


def _judge_half(record: dict[str, Any], part: _Part) -> str:
    """Which model wrote the responses: ``gpt`` or ``claude``, from the row, its id or the place where it lies."""
    for text in (record.get("response_model"), record.get("id"), part.name):
        for half in ("gpt", "claude"):
            if half in str(text or "").lower():
                return half
    raise _invalid("neither 'response_model', nor 'id', nor the file's name says gpt or claude.")


def _llmbar(record: dict[str, Any], part: _Part, row: int) -> list[_Marked]:
    return [_Marked(record.get("subset"), record["input"], *_better_output_first(record, "label"))]


def _alpacaeval(record: dict[str, Any], part: _Part, row: int) -> list[_Marked]:
    prompt = "\n\n".join(text for text in (record["instruction"], record.get("input")) if text)
    return [_Marked("alpacaeval", prompt, *_better_output_first(record, "preference"))]


def _better_output_first(record: dict[str, Any], field: str) -> tuple[list[Any], list[Any]]:
    label = record[field]
    if label not in (1, 2, "1", "2") or isinstance(label, bool):
        raise _invalid(f"'{field}' is {label!r}; expected 1 or 2, the better output.")
    first, second = [record["output_1"]], [record["output_2"]]
    return (first, second) if int(label) == 1 else (second, first)


def _choices(record: dict[str, Any], part: _Part, row: int) -> list[_Marked]:
    marked = []
    for name in ("mc1", "mc2"):
        targets = record[f"{name}_targets"]
        try:
            if isinstance(targets, dict) and isinstance(targets.get("choices"), list):
                labelled = list(zip(targets["choices"], targets["labels"], strict=True))
            else:  # the authors' own file: {text: label}
                labelled = list(targets.items())
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise _invalid(f"'{name}_targets' holds no choices with labels ({error}).") from None
        if any(label not in (0, 1) for _, label in labelled):
            raise _invalid(f"a label of '{name}_targets' is neither 0 nor 1.")
        right, wrong = ([text for text, label in labelled if label == wanted] for wanted in (1, 0))
        if not right or not wrong or (name == "mc1" and len(right) > 1):
            raise _invalid(f"'{name}_targets' has {len(right)} right and {len(wrong)} wrong choices.")
        marked.append(_Marked(name, record["question"], right, wrong))
    return marked


# The fields that tell a layout, and what reads it.
_LAYOUTS = {
    "pair": ({"chosen", "rejected"}, _pair),
    "judge pair": ({"chosen", "rejected"}, _judge_pair),
    "lists": ({"prompt", "chosen", "rejected"}, _lists),
    "styles": ({"prompt", "chosen", "rejected"}, _styles),
    "judge": ({"question", "response_A", "response_B", "label"}, _judge),
    "llmbar": ({"input", "output_1", "output_2", "label"}, _llmbar),
    "alpacaeval": ({"instruction", "output_1", "output_2", "preference"}, _alpacaeval),
    "choices": ({"question", "mc1_targets", "mc2_targets"}, _choices),
}


def _item(suite: Suite, record: dict[str, Any], part: _Part, row: int, marked: _Marked) -> SuiteItem:
    candidates = [*marked.correct, *marked.wrong]
    for text in candidates:
        if not isinstance(text, str) or not text.strip():
            raise _invalid(f"a candidate is {shortened(repr(text), 60)}; expected text.")
        check_unicode("a text", text)
    subset = _subset_name(suite, marked.subset, part)
    messages = prompt_messages("'prompt'", marked.prompt)
    identifier = str(next((record[key] for key in ("id", "pair_id") if record.get(key) is not None), row))
    check_unicode("a text", identifier)
    identifier = identifier if identifier.startswith(subset + "/") else f"{subset}/{identifier}"
    right, wrong = len(marked.correct), len(marked.wrong)
    if suite.name == "prompt-swap" and twin_id(identifier) is None:
        raise _invalid(f"'id' is {record.get('id')!r}; twins have ids that end in /a and /b.")
    if subset == "Ties":
        place = ties_id(identifier)
        if place is None:
            raise _invalid(f"'id' is {record.get('id')!r}; items of Ties have ref:NUMBER or tied:NUMBER.")
        if place[0] == "tied" and right < 2:
            raise _invalid("a tied item of Ties has at least two correct answers in 'chosen'.")
    elif suite.name == "rewardbench2" and (right, wrong) != (1, 3):
        raise _invalid(f"{right} chosen and {wrong} rejected; {subset} has 1 and 3 (best of 4).")
    return SuiteItem(identifier, subset, messages, candidates, right, part.name, row)


def _subset_name(suite: Suite, subset: Any, part: _Part) -> str:
    if part.place in suite.subsets:  # a split on the Hub is one subset, whatever its rows call theirs
        return part.place
    if subset is not None:
        found = suite.subset_names.get(str(subset).strip().lower())
        if found is None:
            raise _invalid(f"subset {shortened(repr(subset))} is none of {suite.name}'s: {', '.join(suite.subsets)}.")
        return found
    for name in reversed(Path(part.place).parts):
        stem = name.removesuffix(data_suffix(name) or "").lower()
        if stem in suite.subset_names:
            return suite.subset_names[stem]
    raise _invalid(f"no 'subset', and neither file nor folder is named after one: {', '.join(suite.subsets)}.")


def _texts(record: dict[str, Any], field: str) -> list[Any]:
    value = record[field]
    if not isinstance(value, list) or not value:
        raise _invalid(f"'{field}' is {shortened(repr(value), 60)}; expected a list of responses.")
    return value


def _with_own_id(suite: Suite, item: SuiteItem, earlier: list[SuiteItem]) -> SuiteItem:
    """The item under an id that no other has, as a source may use one twice; ``earlier`` are those with its id.

    `BadRow` if the very same item came before, so that a file is read twice, or the id is what pairs items.
    """
    for other in earlier:
        if (item.prompt, item.candidates) == (other.prompt, other.candidates):
            where = f"{other.file}, row {other.row}"
            reason = f"the same item as {where}. Name each file once, and no file that holds others."
            raise BadRow(item.file, item.row, reason, "duplicate")
    if earlier and (item.subset == "Ties" or suite.name == "prompt-swap"):
        reason = f"the id {item.id!r} stands there twice, and ids pair items here."
        raise BadRow(item.file, item.row, reason, "duplicate")
    earlier.append(item)
    return item if len(earlier) == 1 else replace(item, id=f"{item.id}#{len(earlier)}")
