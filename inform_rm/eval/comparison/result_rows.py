"""What a result folder of `inform-rm evaluate` says of every row, in one form for pairs and suites."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inform_rm.data.records import open_file
from inform_rm.errors import InputError
from inform_rm.eval.evaluate import EvaluationResult
from inform_rm.eval.suites.evaluate_suite import SuiteResult

_SHOWN_ROWS = 3
Key = tuple[str, str, str]  # source (fingerprint of the data, or name of the suite), subset, id


@dataclass(frozen=True)
class ResultRows:
    """One model's credit for each of N rows.

    Attributes:
        name: of the model, in tables.
        folder: where the rows were read, or that they are in memory.
        result: its ``result.json``.
        suite: its name; of pairs of ``--data`` there is none, nor are there ``sections``.
        keys: what tells rows apart.
        credits: ``(N,)`` from 0 (wrong) to 1 (right); of a pair of ``--data`` 0.5 for a tie.
        margins: ``(N,)`` lowest reward of the right candidates minus the highest of the others; NaN without both.
        length_differences: ``(N,)`` characters of the chosen minus the rejected response; NaN where the row is no
            pair, or the folder holds no lengths.
        candidates: what is known of a row's candidates apart from rewards; differs only if the data differs.
    """

    name: str
    folder: str
    result: dict[str, Any]
    suite: str | None
    keys: list[Key]
    sections: list[str | None]
    credits: NDArray[np.float64]
    margins: NDArray[np.float64]
    length_differences: NDArray[np.float64]
    candidates: list[tuple[int, ...]]

    def source_names(self) -> dict[str, str]:
        """The source a key's first part stands for, as its evaluation was told it."""
        return {item["fingerprint"]: item["source"] for item in self.result.get("data", []) if self.suite is None}

    def reordered(self, keys: Sequence[Key]) -> "ResultRows":
        """The same rows in another order."""
        place_of = {key: place for place, key in enumerate(self.keys)}
        order = [place_of[key] for key in keys]
        columns = {name: getattr(self, name)[order] for name in ("credits", "margins", "length_differences")}
        columns |= {name: [getattr(self, name)[place] for place in order] for name in ("sections", "candidates")}
        return ResultRows(self.name, self.folder, self.result, self.suite, list(keys), **columns)


def read_result_rows(name: str, source: str | Path | EvaluationResult | SuiteResult) -> ResultRows:
    """The rows of a result on pairs or a suite, or of the folder that `inform_rm.evaluate` wrote for it.

    Raises:
        InputError: if it holds no finished evaluation, a line of it is broken, or rows cannot be told apart.
    """
    if isinstance(source, EvaluationResult | SuiteResult):
        folder, result, lines = f"{name} in memory", source.to_dict(), source.rows
    else:
        folder, result = str(source), _read_json(Path(source) / "result.json", Path(source))
        file = "pairs.jsonl" if result.get("suite") is None else "items.jsonl"
        lines = _read_lines(Path(source) / file, Path(source))
    suite = result.get("suite")
    rows = _pair_rows(lines, result, folder) if suite is None else _suite_rows(lines, str(suite), folder)
    found = ResultRows(name, folder, result, None if suite is None else str(suite), *rows)
    repeated = [key for key, count in Counter(found.keys).items() if count > 1]
    if repeated:
        raise InputError(
            f"{folder}: {_rows(len(repeated))} occur more than once ({_shown(repeated)}), so that they cannot be "
            "matched with those of another model. Give each row of a subset its own 'id', name no source twice, and "
            "evaluate again."
        )
    return found


def matched(folders: Sequence[ResultRows]) -> list[ResultRows]:
    """All folders with their rows in the order of the first.

    Raises:
        InputError: if they are of different suites or data, or do not hold the same rows: nothing is left out.
    """
    first, *others = folders
    together = [first]
    for other in others:
        who = f"{first.name} ({first.folder}) and {other.name} ({other.folder})"
        if first.suite != other.suite:
            kinds = [part.suite or "pairs of --data" for part in (first, other)]
            raise InputError(f"{who} hold different things: {kinds[0]}, and {kinds[1]}. Compare like with like.")
        data = [Counter(item["fingerprint"] for item in part.result.get("data", [])) for part in (first, other)]
        fault = f"fingerprints {_fingerprints(data[0])}, and {_fingerprints(data[1])}" if data[0] != data[1] else ""
        if not fault:
            _check_same_keys(who, first, other)
            together.append(other.reordered(first.keys))
            for key, one, two in zip(first.keys, first.candidates, together[-1].candidates, strict=True):
                if one and two and one != two:
                    fault = f"row {_shown([key])} has other responses"
                    break
        if fault:
            raise InputError(f"{who} were evaluated on different data: {fault}. Evaluate both on the same files.")
    return together


def _check_same_keys(who: str, first: ResultRows, other: ResultRows) -> None:
    left, right = set(first.keys), set(other.keys)
    if left == right:
        return
    faults = [
        f"{_rows(len(missing))} of {has.name} are not in {lacks.name} ({_shown(missing)})"
        for has, lacks, missing in (
            (first, other, [key for key in first.keys if key not in right]),
            (other, first, [key for key in other.keys if key not in left]),
        )
        if missing
    ]
    raise InputError(
        f"{who} do not hold the same rows: {'; '.join(faults)}. Evaluate both with the same max_pairs, seed and "
        "on_bad_row, and a max_length and overlong that leave out none or the same."
    )


def _pair_rows(lines: list[dict[str, Any]], result: dict[str, Any], folder: str) -> tuple[Any, ...]:
    if len(lines) != result.get("num_pairs"):
        raise InputError(
            f"{folder}: pairs.jsonl has {len(lines)} lines for the {result.get('num_pairs')} pairs of result.json. "
            "They are not of one evaluation: evaluate again."
        )
    fingerprints = {item["source"]: item["fingerprint"] for item in result["data"]}
    names = ("source", "subset", "id", "chosen_reward", "rejected_reward")
    path = f"{folder}/pairs.jsonl"
    columns = _columns(lines, names, path)
    chosen, rejected = (_numbers(columns[name]) for name in names[-2:])
    margins = chosen - rejected
    if not np.isfinite(margins).all():
        line = int(np.flatnonzero(~np.isfinite(margins))[0]) + 1
        raise InputError(f"{path}, line {line}: the rewards are no finite numbers. Evaluate again.")
    unknown = set(columns["source"]) - set(fingerprints)
    if unknown:
        raise InputError(f"{folder}: pairs.jsonl has the source {unknown.pop()!r}, which result.json does not name.")
    sources = [fingerprints[source] for source in columns["source"]]
    keys = list(zip(sources, map(str, columns["subset"]), map(str, columns["id"]), strict=True))
    lengths = [(line.get("chosen_characters"), line.get("rejected_characters")) for line in lines]
    candidates = [(one, two) if isinstance(one, int) and isinstance(two, int) else () for one, two in lengths]
    differences = np.array([pair[0] - pair[1] if pair else math.nan for pair in candidates])
    return keys, [None] * len(keys), 0.5 + 0.5 * np.sign(margins), margins, differences, candidates


def _suite_rows(lines: list[dict[str, Any]], suite: str, folder: str) -> tuple[Any, ...]:
    path = f"{folder}/items.jsonl"
    columns = _columns(lines, ("id", "subset", "section", "rewards", "num_correct", "credit"), path)
    credits = _numbers(columns["credit"])
    wrong = np.flatnonzero(~((credits >= 0) & (credits <= 1)))
    if len(wrong):
        line = int(wrong[0])
        raise InputError(f"{path}, line {line + 1}: credit {columns['credit'][line]!r}; expected a number in [0, 1].")
    keys = [(suite, str(subset), str(key)) for subset, key in zip(columns["subset"], columns["id"], strict=True)]
    margins, differences, candidates = [], [], []
    for item, rewards, num_correct in zip(lines, columns["rewards"], columns["num_correct"], strict=True):
        right, others = rewards[:num_correct], rewards[num_correct:]
        margins.append(min(right) - max(others) if right and others else math.nan)
        characters = item.get("characters") or []
        is_pair = len(rewards) == len(characters) == 2 and num_correct == 1
        differences.append(characters[0] - characters[1] if is_pair else math.nan)
        candidates.append((num_correct, *characters))
    return keys, columns["section"], credits, np.array(margins), np.array(differences), candidates


def _columns(lines: list[dict[str, Any]], names: Sequence[str], path: str) -> dict[str, list[Any]]:
    for number, line in enumerate(lines, start=1):
        missing = [name for name in names if name not in line]
        if missing:
            raise InputError(f"{path}, line {number}: no field {missing[0]!r}. Evaluate again with this version.")
    return {name: [line[name] for line in lines] for name in names}


def _numbers(values: Sequence[Any]) -> NDArray[np.float64]:
    return np.array([value if isinstance(value, int | float) else math.nan for value in values], dtype=np.float64)


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{folder}: no {path.name}, so it holds no finished result of `inform-rm evaluate`. Name the folder that "
            "was its --output, or run the same evaluation again to finish it."
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not JSON ({error}). Evaluate again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}; expected a result of `inform-rm evaluate`.")
    return value


def _read_lines(path: Path, folder: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"{folder}: no {path.name}; expected a folder that `inform-rm evaluate --output` wrote.")
    lines = []
    for number, line in open_file(path)[1]:
        if not isinstance(line, dict):
            raise InputError(
                f"{path}, line {number}: {line if isinstance(line, str) else 'no object.'} Evaluate again."
            )
        lines.append(line)
    return lines


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number} rows"


def _shown(keys: Sequence[Key]) -> str:
    names = ", ".join(f"{subset}: {key}" for _, subset, key in keys[:_SHOWN_ROWS])
    return names + (", ..." if len(keys) > _SHOWN_ROWS else "")


def _fingerprints(data: Counter[str]) -> str:
    return ", ".join(sorted(fingerprint[:12] for fingerprint in data.elements())) or "none"
