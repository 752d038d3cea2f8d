"""Folders that `inform-rm evaluate`, `decompose` and `detect` left, read for model cards and reports."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from inform_rm.errors import InputError
from inform_rm.scoring.reward_models import fingerprint_model, load_reward_model

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
    """Read ``result.json`` of a folder and recognise what made it.

    Args:
        path: the folder.
        kinds: what is expected.

    Raises:
        InputError: there is no such folder, it is not finished, damaged, or of a kind that is not expected.
    """
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


def refuse_other_models(folders: Sequence[ResultFolder], model: str, revision: str | None = None) -> None:
    """Compare the fingerprint in each result with that of the model, in the float type in which it was scored.

    Args:
        folders: results.
        model: folder or Hub id.
        revision: of a model on the Hub.

    Raises:
        InputError: a result is about other weights.
    """
    known: dict[str, str] = {}
    for folder in folders:
        with naming_damage("results", folder.path / RESULT_FILE):
            found, name = folder.result["model_fingerprint"], folder.result["model"]
            stated = folder.result["settings"].get("dtype")
        # `detect` does not say: the type that a CPU takes, and the checkpoint's own.
        dtypes = ("float32", "auto") if stated is None else (str(stated),)
        for dtype in dtypes:
            if dtype not in known:
                known[dtype] = fingerprint_model(
                    load_reward_model(model, dtype=dtype, device="cpu", revision=revision)
                )
        if found not in [known[dtype] for dtype in dtypes]:
            raise InputError(
                f"results: {folder.path} is about another model, {name}: its weights have the fingerprint "
                f"{str(found)[:12]}, those of {model} {', '.join(known[dtype][:12] for dtype in dtypes)}. "
                f"Run it for {model}, or leave it out."
            )


def _command(kind: str) -> str:
    own = {"suite": "evaluate --suite", "scores": "evaluate on scored responses"}
    return f"inform-rm {own.get(kind, kind)}"
