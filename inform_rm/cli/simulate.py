"""``inform-rm simulate``."""

import argparse
from typing import Any

from inform_rm.cli import flags
from inform_rm.eval.settings import SimulationSettings


def add_parser(commands: Any) -> None:
    text = "best-of-n against reward models: what the gold reward says"
    command = flags.add_command(commands, "simulate", text, run)
    command.add_argument("--proxy", required=True, nargs="+", type=flags.named, metavar="[NAME=]MODEL",
                         help="reward models that choose: folders or Hub ids")  # fmt: skip
    command.add_argument("--output", required=True, help="folder for result.json, responses.parquet, plot and page")
    command.add_argument("--gold", help="reward model taken for the truth (default: the world's exact reward)")
    command.add_argument("--policy", help="causal LM that writes the responses, or a file of responses that are "
                         "written (default: the world's sampler)")  # fmt: skip
    flags.add_data(command, nargs="+", help=f"pairs whose prompts are used: {flags.SOURCES} (default: prompts of "
                         "the world)")  # fmt: skip
    flags.add_columns(command, flags.PAIR_FIELDS)
    flags.add_settings(command, SimulationSettings)
    flags.add_scoring(command)


def run(arguments: argparse.Namespace) -> None:
    from inform_rm.world.policy import attack

    given = flags.given(arguments)
    given["proxy"] = flags.by_name("proxy", arguments.proxy, "--proxy one=FOLDER other=FOLDER")
    result = attack(**given)
    for name, part in result.proxies.items():
        peak = part["peak"]
        low, high = peak["fall_interval"]
        print(
            f"{name}: gold peaks at n = {peak['n']} (KL {peak['kl_nats']:.2f} nats) and falls by {peak['fall']:.3f} "
            f"[{low:.3f}, {high:.3f}] to n = {result.ns[-1]}"
        )
    done = f"drew {result.num_responses} responses to each of {result.num_prompts} prompts"
    flags.print_once(done, see=f"{arguments.output}/result.html")
