"""``inform-rm decompose``."""

import argparse
from typing import Any

from inform_rm.cli import flags
from inform_rm.eval.settings import DecompositionSettings
from inform_rm.util.papers import GAP_DERIVED


def add_parser(commands: Any) -> None:
    command = flags.add_command(commands, "decompose", "how much of a preference the response alone decides", run)
    command.epilog = GAP_DERIVED
    flags.add_model(command)
    flags.add_data(command, required=True, nargs="+", help=f"pairs: {flags.SOURCES}")
    command.add_argument("--output", required=True, help="folder for result.json, pairs.parquet, plots and page")
    command.add_argument("--behavior-model", help="causal LM that weighs prompts by how likely it finds the responses")
    flags.add_columns(command, flags.PAIR_FIELDS)
    flags.add_settings(command, DecompositionSettings)


def run(arguments: argparse.Namespace) -> None:
    from inform_rm import decompose

    weights = "behavior" if arguments.behavior_model else "uniform"
    result = decompose(**flags.given(arguments), weights=weights, split_over_processes=True)
    flags.print_once(
        f"response decides {result.response_decides:.3f}, sign flips {result.sign_flips:.3f}, "
        f"accuracy {result.accuracy:.3f}",
        f"decomposed {result.num_pairs} pairs under {arguments.num_prompts} prompts each",
        see=f"{arguments.output}/result.html",
    )
