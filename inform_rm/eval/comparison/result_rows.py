"""What a result folder of `inform-rm evaluate` says of every row, in one form for pairs and suites."""

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
from inform_rm.eval.results import EvaluationResult
from inform_rm.eval.suites.report import SuiteResult
from inform_rm.util.result_folders import naming_damage, read_result_folder

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
        length_differences: ``(N,)`` characters of the chosen minus the rejected response; NaN where a row is no pair.
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

    def reordered(self, keys: Sequence[Key]) -> "ResultRows":
        """The same rows in another order."""
        place_of = {key: place for place, key in enumerate(self.keys)}
        order = [place_of[key] for key in keys]
        columns = {name: getattr(self, name)[order] for name in ("credits", "margins", "length_differences")}
        columns |= {name: [getattr(self, name)[place] for place in order] for name in ("sections", "candidates")}
        return ResultRows(self.name, self.folder, self.result, self.suite, list(keys), **columns)


def read_result_rows(name: str, source: str | Path | EvaluationResult | SuiteResult) -> ResultRows:
    """The rows of a result on pairs or a suite, or of the folder that `inform_rm.evaluate` wrote for it.

    `InputError` if it holds no finished evaluation, a line of it is broken, or rows cannot be told apart.
    """
    if isinstance(source, EvaluationResult | SuiteResult):
        where, result, lines = f"{name} in memory", source.to_dict(), source.rows
        file = Path(where)
    else:
        where, result = str(source), read_result_folder(source, ("evaluate", "suite")).result
        file = Path(source) / ("pairs.jsonl" if result.get("suite") is None else "items.jsonl")
        lines = _read_lines(file)
    suite = result.get("suite")
    with naming_damage("results", file):
        rows = _pair_rows(lines, result) if suite is None else _suite_rows(lines, suite)
    found = ResultRows(name, where, result, suite, *rows)
    repeated = [key for key, count in Counter(found.keys).items() if count > 1]
    if repeated:
        raise InputError(
            f"{where}: {_rows(len(repeated))} occur more than once ({_shown(repeated)}), so that they cannot be "
            "matched with those of another model. Give each row of a subset its own 'id', name no source twice, and "
            "evaluate again."
        )
    return found


def matched(folders: Sequence[ResultRows]) -> list[ResultRows]:
    """All folders with their rows in the order of the first; `InputError` unless all hold the same rows."""
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
                if one != two:
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


def _pair_rows(lines: list[dict[str, Any]], result: dict[str, Any]) -> tuple[Any, ...]:
    if len(lines) != result["num_pairs"]:
        raise ValueError(f"{len(lines)} lines for the {result['num_pairs']} pairs of result.json")
    fingerprints = {item["source"]: item["fingerprint"] for item in result["data"]}
    keys = [(fingerprints[line["source"]], line["subset"], line["id"]) for line in lines]
    margins = np.array([float(line["chosen_reward"]) - float(line["rejected_reward"]) for line in lines])
    if not np.isfinite(margins).all():
        raise ValueError("a reward that is no finite number")
    candidates = [(line["chosen_characters"], line["rejected_characters"]) for line in lines]
    differences = np.array([float(chosen - rejected) for chosen, rejected in candidates])
    return keys, [None] * len(keys), 0.5 + 0.5 * np.sign(margins), margins, differences, candidates


def _suite_rows(lines: list[dict[str, Any]], suite: str) -> tuple[Any, ...]:
    credits = np.array([float(line["credit"]) for line in lines])
    if not ((credits >= 0) & (credits <= 1)).all():
        raise ValueError("a credit that is not in [0, 1]")
    keys = [(suite, line["subset"], line["id"]) for line in lines]
    margins, differences, candidates = [], [], []
    for line in lines:
        rewards, num_correct, characters = line["rewards"], line["num_correct"], line["characters"]
        right, others = rewards[:num_correct], rewards[num_correct:]
        margins.append(min(right) - max(others) if right and others else math.nan)
        is_pair = len(rewards) == len(characters) == 2 and num_correct == 1
        differences.append(characters[0] - characters[1] if is_pair else math.nan)
        candidates.append((num_correct, *characters))
    sections = [line["section"] for line in lines]
    return keys, sections, credits, np.array(margins), np.array(differences), candidates


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"{path.parent}: no {path.name}; expected a folder of `inform-rm evaluate --output`.")
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
