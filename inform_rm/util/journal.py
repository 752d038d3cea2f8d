"""A file of what is computed already, rewards or texts, so that a killed run goes on where it stopped."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from inform_rm.errors import InputError
from inform_rm.util.files import atomic_write_text
from inform_rm.util.processes import from_main, is_main_process

_MOST_HEADER_CHARACTERS = 1 << 20  # fingerprints and settings
Entry = TypeVar("Entry")


class Journal:
    """Entries of one run, appended as they are made; what they are, the subclasses say.

    The first line says which run the entries belong to. A line cut short by a kill is dropped. `InputError` if the
    file belongs to another run or is no journal.

    Args:
        path: the journal's file; made if absent.
        identity: everything that decides an entry (model, input, settings); a journal with another one is refused.
        shared: all processes of the launch keep this one journal: the main one writes it, all read the same from it.
    """

    def __init__(self, path: str | Path, identity: dict[str, Any], shared: bool = False):
        self.path, self._shared = Path(path), shared
        self._writes = not shared or is_main_process()
        self._header = json.dumps(identity, sort_keys=True) + "\n"
        self._way_out = f"Delete {self.path} to start again, or choose another output."
        if shared:
            from_main(lambda: self._open(identity))
        else:
            self._open(identity)

    def close(self) -> None:
        """Close the file and leave it for the next run."""
        if self._writes:
            self._file.close()

    def delete(self) -> None:
        """Close and remove the file: the run is complete."""
        self.close()
        if self._writes:
            self.path.unlink(missing_ok=True)

    def _open(self, identity: dict[str, Any]) -> None:
        if self.path.exists():
            self._check_identity(identity)
            drop_torn_line(self.path)
        if not self.path.exists() or not self.path.stat().st_size:  # a kill can cut even the first line
            atomic_write_text(self.path, self._header)
        self._file = self.path.open("a", encoding="utf-8")

    def _append(self, entries: Iterable[Any]) -> None:
        """Write one line an entry, all at once, and hand them to the operating system."""
        if self._writes:
            self._file.write("".join(json.dumps(entry) + "\n" for entry in entries))
            self._file.flush()

    def _lines(self, parse: Callable[[str], Entry]) -> Iterator[Entry]:
        """The entries so far; what ``parse`` refuses with a `ValueError` is a damaged line."""
        with self.path.open(encoding="utf-8") as file:
            next(file)
            for number, line in enumerate(file, start=2):
                try:
                    yield parse(line)
                except (ValueError, TypeError, RecursionError) as error:
                    raise InputError(f"{self.path}: line {number} is damaged ({error}). {self._way_out}") from error

    def _check_identity(self, identity: dict[str, Any]) -> None:
        try:
            if not self.path.is_file():
                raise ValueError
            with self.path.open(encoding="utf-8") as file:
                found = dict(json.loads(file.readline(_MOST_HEADER_CHARACTERS)))
        except (ValueError, TypeError, RecursionError):
            raise InputError(f"{self.path} is not the record of an unfinished run. {self._way_out}") from None
        wanted = json.loads(self._header)
        changed = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        if changed:
            shown = "; ".join(f"{key} was {found.get(key)!r}, is {wanted.get(key)!r}" for key in changed)[:2000]
            raise InputError(f"{self.path} belongs to an unfinished run with other settings: {shown}. {self._way_out}")


class RewardJournal(Journal):
    """Rewards by row, appended batch by batch in whatever order they are computed.

    A row is its number in the input, or a number made of its content where the input may change. Each line is
    ``[row, reward]`` or ``[row, reward, reward_std]``.
    """

    def finished(self) -> Iterator[tuple[int, float, float]]:
        """``(row, reward, reward_std)`` of every row computed so far; the latter is NaN if not asked for."""
        entries = from_main(lambda: list(self._lines(_numbers))) if self._shared else self._lines(_numbers)
        for row, reward, *std in entries:
            yield row, reward, std[0] if std else float("nan")

    def add(self, rows: Iterable[int], rewards: Iterable[float], stds: Iterable[float] | None = None) -> None:
        """Append one batch and hand it to the operating system."""
        columns = [rows, map(shortest_float, rewards), *([] if stds is None else [map(shortest_float, stds)])]
        self._append(zip(*columns, strict=True))


class RecordJournal(Journal):
    """Records (what a JSON object can hold) by a text that names them; of two under one name the first counts."""

    def finished(self) -> dict[str, dict[str, Any]]:
        """The records so far."""
        found: dict[str, dict[str, Any]] = {}
        for name, record in self._lines(_record):
            found.setdefault(name, record)
        return found

    def add(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Append records and hand them to the operating system."""
        self._append(records.items())


def _numbers(line: str) -> list[Any]:
    """``[row, reward]`` or ``[row, reward, reward_std]`` of a line; anything else is a `ValueError`."""
    row, *rewards = json.loads(line)
    if type(row) is not int or row < 0 or len(rewards) not in (1, 2):
        raise ValueError("expected a row number, a reward and perhaps its deviation")
    if not all(isinstance(value, float) and math.isfinite(value) for value in rewards):
        raise ValueError("expected finite rewards")
    return [row, *rewards]


def _record(line: str) -> tuple[str, dict[str, Any]]:
    entry = json.loads(line)
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], dict)):
        raise ValueError("expected a name and a record")
    return entry[0], entry[1]


def shortest_float(value: float) -> float:
    """The shortest decimal that names the same float32: 0.1 instead of 0.10000000149011612.

    Example:
        >>> shortest_float(np.float32(0.1).item())
        0.1
    """
    return float(str(np.float32(value)))


def drop_torn_line(path: Path) -> None:
    """Cut off what follows the last line break: a line that a kill left unfinished."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            position = file.read(end - start).rfind(b"\n")
            if position >= 0:
                file.truncate(start + position + 1)
                return
            end = start
        file.truncate(0)
