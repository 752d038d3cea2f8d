"""Command line: parses, calls the Python function of the same name, turns its errors into exit codes.

Exit codes: 0 done, 1 failed while running, 2 wrong use or bad input, 130 and 143 interrupted (Ctrl-C, SIGTERM).
Nothing heavy is imported before parsing, so that ``--help`` answers at once.
"""

import argparse
import functools
import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from inform_rm import __version__
from inform_rm.cli import (
    check_data,
    compare,
    decompose,
    demo,
    detect,
    evaluate,
    export,
    generate,
    judge,
    plan,
    report,
    score,
    select,
    serve,
    simulate,
    train,
)
from inform_rm.cli.parsing import SPELLINGS, CommandParser
from inform_rm.cli.quiet import silence_normal_messages
from inform_rm.errors import InputError, Interrupted, did_you_mean

COMMANDS = (
    demo, train, evaluate, decompose, detect, select, generate, judge, simulate, compare, score, serve, check_data,
    plan, export, report,
)  # fmt: skip
_COMMANDS_OF_SEVERAL_PROCESSES = ("train", "evaluate", "decompose", "score")


@functools.cache
def make_parser() -> argparse.ArgumentParser:
    """The parser, made once; what it returns names its command as ``command`` and its function as ``run``."""
    parser = argparse.ArgumentParser(
        prog="inform-rm",
        description="Train, evaluate and audit reward models that resist reward hacking.",
        epilog=SPELLINGS,
    )
    parser.add_argument("--version", action="version", version=f"inform-rm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=CommandParser)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """What the arguments say; wrong use ends the program (exit code 2)."""
    parser = make_parser()
    names = [command.__name__.rpartition(".")[2].replace("_", "-") for command in COMMANDS]
    wanted = next((text for text in argv if not text.startswith("-")), None)
    if wanted is not None and wanted not in names:
        nearest = did_you_mean(wanted, dict(zip(names, names, strict=True)))
        parser.error(f"unknown command {wanted!r}{nearest}; commands: {', '.join(names)}")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; ``None`` takes the process's arguments."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    silence_normal_messages()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a terminal that is not UTF-8 ends no run
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        _refuse_several_processes(arguments.command)
        return arguments.run(arguments) or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(error, file=sys.stderr)
        return 128 + error.number
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what it has saved, or begins again", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except OSError as error:
        where = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
        print(f"error: {where}", file=sys.stderr)
        return 1
    except Exception as error:
        traceback.print_exc()
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _refuse_several_processes(command: str) -> None:
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1" and command not in _COMMANDS_OF_SEVERAL_PROCESSES:
        raise InputError(
            f"{command}: started {processes} times by a launcher, and each process would write the same files. "
            f"It runs in one: start it without accelerate launch. ({', '.join(_COMMANDS_OF_SEVERAL_PROCESSES)} use "
            "several.)"
        )
