"""``inform-rm report``."""

import argparse
from typing import Any

from inform_rm.cli import flags


def add_parser(commands: Any) -> None:
    command = flags.add_command(commands, "report", "one page about a training run and results of its model", run)
    command.add_argument("--run", required=True, dest="run_folder", metavar="DIR", help="folder that train wrote")
    command.add_argument("--results", nargs="+", default=(), metavar="DIR",
                         help="folders of evaluate, decompose and detect on the run's model")  # fmt: skip
    command.add_argument("--output", required=True, metavar="FILE.html", help="page to write")


def run(arguments: argparse.Namespace) -> None:
    from inform_rm import write_report

    write_report(arguments.run_folder, arguments.output, arguments.results)
    done = f"wrote a page about {arguments.run_folder} and {len(arguments.results)} results"
    flags.print_once(done, see=arguments.output)
