"""What callers can tell apart: their own mistakes, and a run asked to end; and how a message shows a value."""

import difflib
import reprlib
import signal
from collections.abc import Iterable, Mapping
from typing import Any

# A few anchors in YAML make a list that no memory could print.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxset, _SHORT.maxdict = 2, 4, 4, 4, 4
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 80


class InputError(ValueError):
    """Wrong use or bad input: the message names the argument or file, the value, the rule and the way out.

    The command line prints the message without a traceback and exits with code 2. Every other exception is a failure
    while running (exit code 1).
    """


class Interrupted(RuntimeError):
    """A signal ended the run after its state was saved; the command line exits with 128 + the signal's number."""

    def __init__(self, number: int, saved: str):
        super().__init__(f"{signal.Signals(number).name}: {saved}; the same command goes on from there")
        self.number = number


def check_whole_number(name: str, value: Any, least: int = 1) -> None:
    """Raise `InputError` unless the value of an argument is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}: {value!r}; expected a whole number of at least {least}.")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise `InputError` unless the value of an argument is one of its choices."""
    if value not in tuple(choices):
        raise InputError(f"{name}: got {value!r}; expected one of {', '.join(choices)}.")


def shown(value: Any, length: int = 80) -> str:
    """A value of whatever type, size and depth, in at most `length` characters."""
    try:
        return shortened(_SHORT.repr(value), length)
    except (ValueError, RecursionError):  # a whole number of more digits than Python prints
        return "..."


def did_you_mean(name: str, known: Mapping[str, str]) -> str:
    """`` (did you mean ...?)`` with the nearest known name, or nothing; ``known``: name -> how it is written."""
    found = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {known[found[0]]}?)" if found else ""


def shortened(text: str, length: int = 80) -> str:
    """The text, or its beginning with ``...``."""
    return text if len(text) <= length else text[: length - 3] + "..."
