"""``inform-rm export``."""

import argparse
from typing import Any

from inform_rm.cli import flags


def add_parser(commands: Any) -> None:
    command = flags.add_command(commands, "export", "complete Hub folder of an InfoRM model: weights, code, card", run)
    command.add_argument("--model", required=True, help="InfoRM model: folder, checkpoint or Hub id")
    command.add_argument("--output", required=True, help="new folder")
    flags.add_switch(command, "--folded", "as a plain classifier of transformers, for engines that run no remote code "
               "(needs decoder: linear)")  # fmt: skip
    command.add_argument("--push-to", metavar="ID", help="also upload to this Hub repository (private if new)")
    command.add_argument("--revision", help="revision of the model on the Hub")
    command.add_argument("--results", nargs="+", default=(), metavar="DIR",
                         help="folders of evaluate on this model, for the card's metadata and table")  # fmt: skip
    command.add_argument("--license", help="the Hub's name of the licence, for the card, such as apache-2.0")


def run(arguments: argparse.Namespace) -> None:
    from inform_rm import export_model

    files = export_model(**flags.given(arguments))
    for name, size in files.items():
        print(f"{size:>12,} {name}")
    if arguments.folded:
        from inform_rm.hub.engine_inputs import engine_advice

        print("\n".join(engine_advice(arguments.output)))
    uploaded = f", uploaded to {arguments.push_to}" if arguments.push_to else ""
    flags.print_once(f"exported {len(files)} files, {sum(files.values()):,} bytes{uploaded}", see=arguments.output)
