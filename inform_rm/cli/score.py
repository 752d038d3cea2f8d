"""``inform-rm score``."""

import argparse
import os
from typing import Any

from inform_rm.cli import flags


def add_parser(commands: Any) -> None:
    command = flags.add_command(commands, "score", "rewards for rows of prompt and response", run)
    flags.add_model(command)
    flags.add_data(command, "--input", required=True, help="JSONL(.gz), CSV or Parquet with 'prompt' and 'response'")
    flags.add_columns(command, flags.ROW_FIELDS)
    command.add_argument("--output", required=True, help="JSONL file: the input's rows with their reward")
    command.add_argument("--on-bad-row", choices=("error", "skip"), default="error", help="refuse an input with a row "
                         "that cannot be scored, or write its fault instead of a reward (default: error)")  # fmt: skip
    command.add_argument("--uncertainty", type=int, metavar="N", help="InfoRM: also the reward's spread over N draws")


def run(arguments: argparse.Namespace) -> None:
    from inform_rm.scoring.score_files import score_file
    from inform_rm.scoring.scorer import RewardScorer

    if os.path.exists(arguments.output):
        flags.print_once(f"{arguments.output} exists and is replaced at the end; another --output keeps it")
    given = flags.given(arguments)
    names = ("input", "output", "uncertainty", "on_bad_row", "columns")
    of_file = {name: given.pop(name) for name in names if name in given}
    found = score_file(RewardScorer(**given, split_over_processes=True), **of_file)
    earlier = f" ({found['resumed_rows']} by an earlier call)" if found["resumed_rows"] else ""
    done = f"scored {found['rows'] - found['bad_rows']} rows{earlier}, {found['bad_rows']} bad rows without a reward"
    flags.print_once(done, see=arguments.output)
