"""Flags that several commands share, and what they give to the functions. Imports nothing heavy."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from inform_rm.cli.parsing import SPLITS
from inform_rm.errors import InputError
from inform_rm.training.arguments import read_columns, read_weights

ENDPOINT = "OpenAI-compatible server, such as http://localhost:8000/v1"
SOURCES = "files, folders or Hub ids, NAME[SPLIT] for one split"
PAIR_FIELDS = "prompt, chosen, rejected, system, history, margin, subset, id"
GROUP_FIELDS = "; of rankings responses, ranks, scores; of scored responses response, score"
ROW_FIELDS = "prompt, response, system, history"


def add_command(
    commands: Any, name: str, text: str, run: Callable[[argparse.Namespace], int | None]
) -> argparse.ArgumentParser:
    """A command's parser; what it parses names the command as ``command`` and its function as ``run``."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(command=name, run=run)
    return command


def add_command_of_settings(
    commands: Any, name: str, text: str, run: Callable[[argparse.Namespace], int | None]
) -> None:
    """A command that reads its flags itself: what they are is known once transformers has been imported."""
    command = commands.add_parser(name, help=text, add_help=False, prefix_chars="\0")
    command.add_argument("settings", nargs="*")
    command.set_defaults(command=name, run=run)


def add_model(command: argparse.ArgumentParser) -> None:
    """``--model`` and how it scores."""
    command.add_argument("--model", required=True, help="any sequence-classification reward model: folder or Hub id")
    add_scoring(command)


def add_loading(command: argparse.ArgumentParser) -> None:
    """How a model and its tokenizer are loaded."""
    command.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: GPU if there is one)")
    command.add_argument("--chat-template", help="template file, or 'plain', for a tokenizer without one")
    command.add_argument("--revision", help="revision of the model on the Hub")
    add_switch(command, "--trust-remote-code", "run code from the model's repository")


def add_scoring(command: argparse.ArgumentParser) -> None:
    """How a reward model scores."""
    command.add_argument("--max-length", type=int, help="longest allowed input in tokens (default: the model's)")
    command.add_argument(
        "--tokens-per-batch", type=int, help="tokens computed at once (default: 2048 on a CPU, else 8192)"
    )
    command.add_argument("--dtype", choices=("float32", "bfloat16", "auto"),
                         help="default: float32 on a CPU, else the checkpoint's own")  # fmt: skip
    add_loading(command)


def add_data(command: argparse.ArgumentParser, flag: str = "--data", **settings: Any) -> None:
    """The flag that names the data, and TRL's flags for its split."""
    command.add_argument(flag, **settings)
    for split in SPLITS:
        command.add_argument(split, help=argparse.SUPPRESS)


def add_settings(command: argparse.ArgumentParser, kind: Any) -> None:
    """The flags of a dataclass of settings, whose fields say them (`inform_rm.util.settings`)."""
    for spec in fields(kind):
        if text := spec.metadata.get("help"):
            flag = f"--{spec.name.replace('_', '-')}"
            if spec.type is bool:
                add_switch(command, flag, text)
                continue
            command.add_argument(
                flag,
                type=_TYPES[spec.type],
                choices=spec.metadata["choices"] or None,
                default=spec.default,
                help=text + ("" if spec.default is None else " (default: %(default)s)"),
            )


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is not as by default, under the names that the command's function has for it, too."""
    values = {name: getattr(arguments, name, default) for name, default in arguments.defaults.items()}
    found: dict[str, Any] = {name: value for name, value in values.items() if value != arguments.defaults[name]}
    for name, read in (("columns", read_columns), ("score_weights", read_weights)):
        if name in found:
            try:
                found[name] = read(found[name])
            except ValueError as error:
                raise InputError(f"{name}: {error}.") from None
    return found


def add_switch(command: argparse.ArgumentParser, flag: str, text: str) -> None:
    """A flag that is bare, or followed by true or false."""
    command.add_argument(flag, nargs="?", type=_boolean, const=True, default=False, metavar="true|false", help=text)


def add_columns(command: argparse.ArgumentParser, names: str) -> None:
    """``--columns``, which `given` reads."""
    command.add_argument("--columns", nargs="+", metavar="FIELD=COLUMN", help=f"which columns are {names}; "
                         "ignore=COLUMN leaves one out knowingly (default: columns of these names)")  # fmt: skip


def add_score_weights(command: argparse.ArgumentParser) -> None:
    """``--score-weights``, which `given` reads."""
    command.add_argument("--score-weights", nargs="+", metavar="COLUMN=WEIGHT", help="scored responses: columns whose "
                         "weighted sum is the score (default: the column score)")  # fmt: skip


def named(text: str) -> tuple[str, str]:
    """``NAME=MODEL``, or a model named by the last part of its path or id."""
    name, separator, model = text.partition("=")
    return (name, model) if separator else (text.rstrip("/").rpartition("/")[2], text)


def by_name(argument: str, pairs: Sequence[tuple[str, str]], way_out: str) -> dict[str, str]:
    """Models or folders by name, `InputError` where one comes twice."""
    if len(dict(pairs)) < len(pairs):
        raise InputError(f"{argument}: two of them have the same name. Name them apart: {way_out}.")
    return dict(pairs)


def accuracy_line(result: dict[str, Any]) -> str:
    """One line about an evaluation on pairs."""
    low, high = result["accuracy_interval"]
    return f"accuracy {result['accuracy']:.4f} on {result['num_pairs']} pairs (95 % interval {low:.4f} to {high:.4f})"


def print_once(*lines: str, see: object = None) -> None:
    """What a command ends with, from the main process of a launch: findings, then what was done, and where to look."""
    from inform_rm.util.processes import is_main_process

    if is_main_process():
        print("\n".join(lines) + ("" if see is None else f"; see {see}"), flush=True)


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


# How a flag is read, by the type of its setting.
_TYPES: dict[Any, Any] = {
    str: str, int: int, float: float, str | None: str, int | None: int, float | None: float,
    float | str: _number_or_text,
}  # fmt: skip


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected true or false, or the bare flag")
    return text.lower() == "true"
