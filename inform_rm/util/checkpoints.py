"""Checkpoints that are whole or not there."""

import json
import os
from pathlib import Path

from inform_rm.util.files import write_json

# Written last into a checkpoint: the sizes of its files.
COMPLETE_FILE = "complete.json"


def mark_complete(checkpoint: Path) -> None:
    """Flush all files of a checkpoint to disk and write down their sizes; only then does the checkpoint count."""
    sizes = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            sizes[path.relative_to(checkpoint).as_posix()] = path.stat().st_size
    write_json(checkpoint / COMPLETE_FILE, sizes)


def is_complete(checkpoint: Path) -> bool:
    """Whether everything that `mark_complete` found is still there."""
    try:
        sizes = json.loads((checkpoint / COMPLETE_FILE).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):  # AttributeError: JSON, but no object
        return False


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """The complete ones, oldest first: by step, because file times follow the clock, and clocks jump."""
    found = [path for path in checkpoints.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted((path for path in found if is_complete(path)), key=checkpoint_step)


def last_complete(checkpoints: Path) -> Path | None:
    """The one to go on from, or ``None``."""
    return next(reversed(complete_checkpoints(checkpoints)), None)


def checkpoint_step(checkpoint: Path) -> int:
    """Optimizer steps that led to a checkpoint, from its name."""
    return int(checkpoint.name.rpartition("-")[2])
