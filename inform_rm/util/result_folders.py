"""Folders that `inform-rm evaluate`, `decompose` and `detect` left, read to be compared or shown."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from inform_rm.errors import InputError

RESULT_FILE = "result.json"
# What the result.json of each kind holds and that of no other does.
_KEYS = {
    "suite": ("suite", "complete", "sections", "subsets"),
    "evaluate": ("accuracy", "accuracy_interval", "calibration", "data"),
    "scores": ("num_scored", "rmse", "data"),
    "decompose": ("response_decides", "quadrants"),
    "detect": ("reference", "candidates", "null"),
}


class ResultFolder(NamedTuple):
    """A finished folder of results: its path, what made it (a key of `_KEYS`), and its ``result.json``."""

    path: Path
    kind: str
    result: dict[str, Any]


def read_result_folder(path: str | Path, kinds: Sequence[str] = tuple(_KEYS)) -> ResultFolder:
    """Read ``result.json`` of a folder and recognise what made it; `InputError` unless it is one of ``kinds``."""
    path = Path(path)
    file = path / RESULT_FILE
    expected = f"Pass a folder of {', '.join(_command(kind) for kind in kinds)}."
    if not path.is_dir():
        raise InputError(f"results: {path} is not a folder. {expected}")
    if not file.is_file():
        raise InputError(f"results: {path} has no {RESULT_FILE}: no folder of results, or unfinished. {expected}")
    with naming_damage("results", file):
        result = json.loads(file.read_text(encoding="utf-8"))
    keys = result if isinstance(result, dict) else {}
    kind = next((kind for kind, names in _KEYS.items() if all(name in keys for name in names)), None)
    if kind is None or kind not in kinds:
        found = "of another command" if kind is None else f"of {_command(kind)}"
        raise InputError(f"results: {file} is {found}, which has no place here. {expected}")
    return ResultFolder(path, kind, result)


@contextlib.contextmanager
def naming_damage(argument: str, file: Path) -> Iterator[None]:
    """Turn what a wrong or missing value in a file leads to into an `InputError` that names the file."""
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, OSError) as error:
        raise InputError(
            f"{argument}: {file} is damaged, or of another version of inform-rm ({type(error).__name__}: "
            f"{str(error)[:200]}). Make it anew."
        ) from error


def _command(kind: str) -> str:
    own = {"suite": "evaluate --suite", "scores": "evaluate on scored responses"}
    return f"inform-rm {own.get(kind, kind)}"
