"""``inform-rm judge``."""

import argparse
from typing import Any

from inform_rm.cli import flags


def add_parser(commands: Any) -> None:
    """Add the command."""
    text = "a language model as judge: win rates of responses, or which of them exploit a reward"
    command = flags.add_command(commands, "judge", text, run)
    command.add_argument("--model", required=True, help="name under which the endpoint serves the judge")
    flags.add_endpoint(command, required=True)
    command.add_argument("--responses", required=True, help="rows of prompt and response, such as generate writes")
    command.add_argument("--baseline", help="the same of another policy: win rate over it (default: label each "
                         "response as exploiting a reward or not)")  # fmt: skip
    flags.add_columns(command, flags.ROW_FIELDS)
    command.add_argument("--output", required=True, help="folder for result.json, the judgments, answers, plot and "
                         "page")  # fmt: skip
    command.add_argument("--prompt-file", metavar="FILE", help="Jinja template in place of the built-in prompt")
    command.add_argument("--temperature", type=float, default=0.0, help="of the judge (default: %(default)s)")
    command.add_argument("--max-answer-tokens", type=int, default=1024, help="of the judge (default: %(default)s)")
    command.add_argument("--price-input", type=float, help="of a million prompt tokens: adds the cost")
    command.add_argument("--price-output", type=float, help="of a million answered tokens")
    command.add_argument("--on-bad-row", choices=("error", "skip"), default="error", help="stop at a row that cannot "
                         "be read, or leave it out, count and list it (default: error)")  # fmt: skip
    command.add_argument("--seed", type=int, default=0, help="sent with each request (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Run it."""
    from inform_rm import judge
    from inform_rm.util.page import with_interval

    names = ("prompt_file", "temperature", "max_answer_tokens", "price_input", "price_output", "on_bad_row", "seed")
    result = judge(
        arguments.responses,
        arguments.output,
        baseline=arguments.baseline,
        model=arguments.model,
        columns=flags.columns(arguments),
        **{name: getattr(arguments, name) for name in names},
        **flags.endpoint_options(arguments),
    )
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
