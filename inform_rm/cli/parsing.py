"""Spelling of the command line: dashes or underscores, TRL's names beside ours, the nearest name for a wrong one."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from inform_rm.errors import did_you_mean

SPELLINGS = (
    "Flags are written with dashes or underscores. TRL's --model_name_or_path, --dataset_name, --dataset_train_split, "
    "--dataset_test_split and --output_dir are understood too."
)
_TRL_NAMES = {
    "--model_name_or_path": ("--model",), "--dataset_name": ("--data", "--input"), "--output_dir": ("--output",)
}  # fmt: skip
SPLITS = ("--dataset_train_split", "--dataset_test_split")


class CommandParser(argparse.ArgumentParser):
    """The parser of one command.

    It takes every flag in both spellings and under TRL's name, and refuses what it does not know with its own usage
    and the nearest flag. Nothing is abbreviated: with ``--max`` for ``--max-length`` a new flag would change a script.
    """

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, epilog=SPELLINGS, **settings)

    def parse_known_args(  # type: ignore[override]  # a base class of many overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Like the base class; argparse calls it for a command too. Nothing is left over."""
        found, rest = super().parse_known_args(self.canonical(sys.argv[1:] if args is None else args), namespace)
        if rest:
            self.error(f"unexpected argument {rest[0]!r}{self._nearest(rest[0])}")
        self._read_splits(found)
        found.defaults = {action.dest: action.default for action in self._actions}
        return found, rest

    def canonical(self, args: Iterable[str]) -> list[str]:
        """`args` with each flag as this parser names it; an unknown one ends the program (exit code 2)."""
        if "-" not in self.prefix_chars:  # the command reads its flags itself
            return list(args)
        flags = self._flags()
        args, spelled = list(args), []
        end = args.index("--") if "--" in args else len(args)
        for text in args[:end]:
            name, equals, value = text.partition("=")
            if text.startswith("--") and " " not in name:
                if _folded(name) not in flags:
                    self.error(f"unknown flag {name}{self._nearest(name)}")
                name = flags[_folded(name)]
            spelled.append(name + equals + value)
        return spelled + args[end:]

    def _flags(self) -> dict[str, str]:
        """Folded name of every flag, TRL's among them -> the name that this parser has for it."""
        flags = {_folded(option): option for action in self._actions for option in action.option_strings}
        for name, ours in _TRL_NAMES.items():
            own = next((flags[option] for option in ours if option in flags), None)
            if own is not None:
                flags.setdefault(_folded(name), own)
        return flags

    def _nearest(self, name: str) -> str:
        return did_you_mean(_folded("--" + name.lstrip("-")), self._flags())

    def _read_splits(self, found: argparse.Namespace) -> None:
        """Put TRL's flag for a split of the data, which `add_data` adds, into our ``NAME[SPLIT]``."""
        given = [(flag, split) for flag in SPLITS if (split := vars(found).pop(flag[2:], None)) is not None]
        if not given:
            return
        source = "input" if hasattr(found, "input") else "data"
        data = getattr(found, source)
        names = [data] if isinstance(data, str) else data or []
        flag, split = given[0]
        if len(given) == 2:
            self.error(f"{' and '.join(SPLITS)}: this command reads one split; give one of them")
        if len(names) != 1:
            self.error(f"{flag} needs one name after --{source}, got {len(names)}; write NAME[SPLIT] there")
        if names[0].endswith("]"):
            self.error(f"{flag}: {names[0]} names its split already; leave the flag out")
        setattr(found, source, f"{data}[{split}]" if isinstance(data, str) else [f"{names[0]}[{split}]"])


def _folded(name: str) -> str:
    return "--" + name[2:].replace("-", "_") if name.startswith("--") else name
