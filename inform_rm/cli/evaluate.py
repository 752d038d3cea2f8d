"""``inform-rm evaluate``: pairs or a benchmark suite."""

import argparse
from typing import Any

from inform_rm.cli import flags
from inform_rm.errors import InputError
from inform_rm.eval.suites.tables import SUITES


def add_parser(commands: Any) -> None:
    """Add the command."""
    command = flags.add_command(commands, "evaluate", "accuracy of a reward model on pairs or a benchmark suite", run)
    flags.add_model(command)
    command.add_argument("--suite", choices=tuple(SUITES), help="benchmark, with its published aggregation")
    flags.add_data(command, nargs="+", help=f"pairs: {flags.SOURCES}; with --suite its files or folders (default: "
                         "from the Hub)")  # fmt: skip
    command.add_argument("--data-revision", help="revision of the data on the Hub")
    command.add_argument("--ties", choices=("wrong", "half"), help="--suite rewardbench: what equal rewards give "
                         "(default: wrong, as published)")  # fmt: skip
    command.add_argument("--output", required=True, help="folder for result.json, result.md and plots")
    flags.add_pairs(command)


def run(arguments: argparse.Namespace) -> None:
    """Run it."""
    policy = {**flags.pairs_options(arguments), "data_revision": arguments.data_revision}
    options = {**flags.scoring_options(arguments), "split_over_processes": True}
    if arguments.suite is None:
        if not arguments.data:
            raise InputError("data: name the pairs with --data FILES, or a benchmark with --suite NAME.")
        if arguments.ties is not None:
            raise InputError("ties: an option of --suite rewardbench. Leave it out; the result has both conventions.")
        from inform_rm import evaluate

        found = evaluate(arguments.model, arguments.data, arguments.output, **policy, **options)
        done = f"evaluated {found.num_pairs} pairs"
        flags.print_once(flags.accuracy_line(found.to_dict()), done, see=f"{arguments.output}/result.html")
        return
    if policy.pop("max_pairs") is not None:
        raise InputError("max_pairs: a suite is evaluated whole. Leave it out, or evaluate the pairs without --suite.")
    if policy.pop("columns") is not None:
        raise InputError("columns: the rows of a suite have their published columns. Leave it out.")
    from inform_rm import evaluate_suite

    ties = arguments.ties or "wrong"
    result = evaluate_suite(
        arguments.model, arguments.suite, arguments.data, arguments.output, ties=ties, **policy, **options
    )
    flags.print_once(result.headline, f"evaluated suite {arguments.suite}", see=f"{arguments.output}/result.html")
