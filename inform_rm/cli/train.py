"""``inform-rm train``: every setting is a flag."""

import argparse
import dataclasses
from typing import Any

from inform_rm.cli import flags
from inform_rm.training.config import TrainingConfig, field_types, read_config


def add_parser(commands: Any) -> None:
    """Add the command."""
    command = flags.add_command(commands, "train", "train a reward model; writes a Hub-ready folder", run)
    command.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="settings, one 'name: value' a line")
    for spec, hint in zip(dataclasses.fields(TrainingConfig), field_types().values(), strict=True):
        default = "required" if spec.default is dataclasses.MISSING else f"default: {_shown(spec.default)}"
        command.add_argument(
            f"--{spec.name}",
            default=argparse.SUPPRESS,
            nargs="+" if "tuple" in str(hint) or "dict" in str(hint) else None,
            metavar="VALUE",
            help=f"{spec.metadata['help']} ({default})".replace("%", "%%"),
        )


def run(arguments: argparse.Namespace) -> None:
    """Run it."""
    settings = {name: value for name, value in vars(arguments).items() if name in field_types()}
    config = read_config(arguments.config, settings)
    from inform_rm import train

    result = train(config)
    measured = [] if result["evaluation"] is None else [flags.accuracy_line(result["evaluation"])]
    flags.print_once(*measured, "trained a reward model", see=config.output)


def _shown(default: Any) -> str:
    if default is None or default == ():
        return "none"
    return str(default).lower() if isinstance(default, bool) else str(default)
