"""Settings of a call, declared once: the default of each, what it may be, and the help of its flag."""

from dataclasses import field, fields
from typing import Any

from inform_rm.errors import check_choice, check_whole_number


def setting(default: Any, help: str = "", least: int | None = None, choices: tuple[str, ...] = ()) -> Any:
    """A field of a dataclass of settings.

    With ``help`` the command has a flag of its name (`inform_rm.cli.flags.add_settings`); ``least`` is the smallest
    whole number that it takes, ``choices`` what it may be.
    """
    return field(default=default, metadata={"help": help, "least": least, "choices": choices})


def check_settings(settings: Any) -> None:
    """Raise `InputError` for a setting that is not what its field takes; a default of ``None`` may stay."""
    for spec in fields(settings):
        value, least = getattr(settings, spec.name), spec.metadata.get("least")
        if spec.metadata.get("choices"):
            check_choice(spec.name, value, spec.metadata["choices"])
        if least is not None and not (value is None and spec.default is None):
            check_whole_number(spec.name, value, least)
