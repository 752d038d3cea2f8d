"""``inform-rm check-data``."""

import argparse
from typing import Any

from inform_rm.cli.flags import PAIR_FIELDS, SOURCES, add_columns, add_command, columns


def add_parser(commands: Any) -> None:
    """Add the command."""
    command = add_command(commands, "check-data", "what is in preference data, and what would go wrong", run)
    command.add_argument("--data", required=True, nargs="+", help=f"{SOURCES}; name splits apart")
    add_columns(command, PAIR_FIELDS)
    command.add_argument("--tokenizer", help="folder or Hub id: adds token lengths and the template audit")
    command.add_argument("--max-length", type=int, help="shows what this limit would do")
    command.add_argument("--chat-template", help="template file, or 'plain', for a tokenizer without one")
    command.add_argument("--output", help="folder for preflight.json")
    command.add_argument("--revision", help="revision of the tokenizer on the Hub")
    command.add_argument("--trust-remote-code", action="store_true", help="run code from the tokenizer's repository")


def run(arguments: argparse.Namespace) -> int:
    """Run it; 1 if training would stop at a row."""
    from inform_rm.data.check_data import check_data, format_report, write_report

    report = check_data(
        arguments.data,
        arguments.tokenizer,
        arguments.max_length,
        columns=columns(arguments),
        chat_template=arguments.chat_template,
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
    )
    print(format_report(report))
    write_report(report, arguments.output)
    return 1 if report["unusable_rows"] else 0
