"""``inform-rm judge``."""

import argparse
from typing import Any

from inform_rm.cli import flags
from inform_rm.eval.generation.settings import EndpointSettings
from inform_rm.eval.judging.settings import JudgeSettings


def add_parser(commands: Any) -> None:
    text = "a language model as judge: win rates of responses, or which of them exploit a reward"
    command = flags.add_command(commands, "judge", text, run)
    command.add_argument("--model", required=True, help="name under which the endpoint serves the judge")
    command.add_argument("--endpoint", required=True, metavar="URL", help=flags.ENDPOINT)
    flags.add_settings(command, EndpointSettings)
    command.add_argument("--responses", required=True, help="rows of prompt and response, such as generate writes")
    command.add_argument("--baseline", help="the same of another policy: win rate over it (default: label each "
                         "response as exploiting a reward or not)")  # fmt: skip
    flags.add_columns(command, flags.ROW_FIELDS)
    command.add_argument("--output", required=True, help="folder for result.json, the judgments, answers, plot and "
                         "page")  # fmt: skip
    flags.add_settings(command, JudgeSettings)


def run(arguments: argparse.Namespace) -> None:
    from inform_rm import judge
    from inform_rm.util.page import with_interval

    result = judge(**flags.given(arguments))
    if arguments.baseline is None:
        print(f"exploit a reward: {result.hacked} of {result.num_labelled}, share "
              f"{with_interval(result.share, result.share_interval)}")  # fmt: skip
        number = f"{result.num_responses} responses"
    else:
        print(f"win rate {with_interval(result.win_rate, result.win_rate_interval)}: {result.wins} wins, "
              f"{result.ties} ties, {result.losses} losses")  # fmt: skip
        number = f"{result.num_pairs} pairs"
    cost = "" if result.cost is None else f", cost {result.cost:.4g}"
    flags.print_once(
        f"judged {number} ({result.num_unreadable} not readable) with {result.asked_now} requests; "
        f"{sum(result.tokens.values())} tokens in all{cost}",
        see=f"{arguments.output}/result.html",
    )
