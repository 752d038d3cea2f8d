"""``inform-rm score``."""

import argparse
from typing import Any

from inform_rm.cli.flags import ROW_FIELDS, add_columns, add_command, add_model, columns, print_once, scoring_options


def add_parser(commands: Any) -> None:
    """Add the command."""
    command = add_command(commands, "score", "rewards for rows of prompt and response", run)
    add_model(command)
    command.add_argument("--input", required=True, help="JSONL(.gz), CSV or Parquet with 'prompt' and 'response'")
    add_columns(command, ROW_FIELDS)
    command.add_argument("--output", required=True, help="JSONL file: the input's rows with their reward")
    command.add_argument("--on-bad-row", choices=("error", "skip"), default="error", help="refuse an input with a row "
                         "that cannot be scored, or write its fault instead of a reward (default: error)")  # fmt: skip
    command.add_argument("--uncertainty", type=int, metavar="N", help="InfoRM: also the reward's spread over N draws")


def run(arguments: argparse.Namespace) -> None:
    """Run it."""
    from inform_rm.scoring.score_files import score_file
    from inform_rm.scoring.scorer import RewardScorer

    scorer = RewardScorer(arguments.model, **scoring_options(arguments), split_over_processes=True)
    found = score_file(
        scorer,
        arguments.input,
        arguments.output,
        arguments.uncertainty,
        on_bad_row=arguments.on_bad_row,
        columns=columns(arguments),
    )
    earlier = f" ({found['resumed_rows']} by an earlier call)" if found["resumed_rows"] else ""
    scored = found["rows"] - found["bad_rows"]
    print_once(f"{scored} rows scored{earlier}, {found['bad_rows']} bad rows without a reward; {arguments.output}")
