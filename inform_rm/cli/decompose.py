"""``inform-rm decompose``."""

import argparse
from typing import Any

from inform_rm.cli import flags
from inform_rm.util.papers import GAP_DERIVED


def add_parser(commands: Any) -> None:
    """Add the command."""
    command = flags.add_command(commands, "decompose", "how much of a preference the response alone decides", run)
    command.epilog = GAP_DERIVED
    flags.add_model(command)
    flags.add_data(command, required=True, nargs="+", help=f"pairs: {flags.SOURCES}")
    command.add_argument("--output", required=True, help="folder for result.json, pairs.parquet, plots and page")
    command.add_argument("--num-prompts", type=int, default=16, help="prompts for each pair, its own among them "
                         "(default: %(default)s)")  # fmt: skip
    flags.add_switch(command, "--stratify", "only prompts of the pair's own subset")
    command.add_argument("--behavior-model", help="causal LM that weighs prompts by how likely it finds the responses")
    flags.add_switch(command, "--length-normalized", "weigh by mean token log-likelihoods")
    command.add_argument("--ess-target", type=float, default=0.25, help="effective sample size that the weights "
                         "keep, as a share of the prompts (default: %(default)s)")  # fmt: skip
    command.add_argument("--color", choices=("length", "subset"), default="length",
                         help="what colours the plane of D1 and D2 (default: %(default)s)")  # fmt: skip
    flags.add_pairs(command)


def run(arguments: argparse.Namespace) -> None:
    """Run it."""
    from inform_rm import decompose

    names = ("num_prompts", "stratify", "behavior_model", "length_normalized", "ess_target", "color")
    result = decompose(
        arguments.model,
        arguments.data,
        arguments.output,
        weights="behavior" if arguments.behavior_model else "uniform",
        **{name: getattr(arguments, name) for name in names},
        **flags.pairs_options(arguments),
        **flags.scoring_options(arguments),
        split_over_processes=True,
    )
    flags.print_once(
        f"response decides {result.response_decides:.3f}, sign flips {result.sign_flips:.3f}, "
        f"accuracy {result.accuracy:.3f}",
        f"decomposed {result.num_pairs} pairs under {arguments.num_prompts} prompts each",
        see=f"{arguments.output}/result.html",
    )
