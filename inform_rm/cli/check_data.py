"""``inform-rm check-data``."""

import argparse
from typing import Any

from inform_rm.cli import flags


def add_parser(commands: Any) -> None:
    command = flags.add_command(commands, "check-data", "what is in preference data, and what would go wrong", run)
    flags.add_data(command, required=True, nargs="+", help=f"{flags.SOURCES}; name splits apart")
    flags.add_columns(command, flags.PAIR_FIELDS + flags.GROUP_FIELDS)
    flags.add_score_weights(command)
    command.add_argument("--tokenizer", help="folder or Hub id: adds token lengths and the template audit")
    command.add_argument("--max-length", type=int, help="shows what this limit would do")
    command.add_argument("--chat-template", help="template file, or 'plain', for a tokenizer without one")
    command.add_argument("--output", help="folder for preflight.json")
    command.add_argument("--revision", help="revision of the tokenizer on the Hub")
    flags.add_switch(command, "--trust-remote-code", "run code from the tokenizer's repository")


def run(arguments: argparse.Namespace) -> int:
    """Run it; 1 if training would stop at a row."""
    from inform_rm.data.check_data import check_data, write_report
    from inform_rm.data.check_data_text import format_report

    given = flags.given(arguments)
    output = given.pop("output", None)
    report = check_data(given.pop("data"), **given)
    print(format_report(report))
    rows = sum(source["rows"] for source in report["sources"])
    done = f"checked {rows} rows, {report['unusable_rows']} that training would stop at"
    flags.print_once(done, see=write_report(report, output))
    return 1 if report["unusable_rows"] else 0
