"""``inform-rm detect``."""

import argparse
from typing import Any

from inform_rm.cli import flags
from inform_rm.eval.detection.settings import DetectionSettings
from inform_rm.util.papers import MOP_DIFFERS


def add_parser(commands: Any) -> None:
    text = "does a policy exploit its reward model? latents of its responses"
    command = flags.add_command(commands, "detect", text, run)
    command.epilog = MOP_DIFFERS
    flags.add_model(command)
    command.add_argument("--reference", required=True, help="responses before training: rows of prompt and response")
    command.add_argument("--candidate", required=True, nargs="+", help="responses to check; several files: in order")
    command.add_argument("--labels", nargs="+", help="rows with 'hacked' (true or false), such as judge writes: one "
                         "file a candidate, in order; adds precision and recall of the outliers")  # fmt: skip
    flags.add_columns(command, flags.ROW_FIELDS)
    command.add_argument("--output", required=True, help="folder for result.json, responses.parquet, plots and page")
    flags.add_settings(command, DetectionSettings)


def run(arguments: argparse.Namespace) -> None:
    from inform_rm import detect
    from inform_rm.eval.detection.statistic import STATISTICS

    given = flags.given(arguments)
    result = detect(candidates=given.pop("candidate"), **given)
    for part in result.candidates:
        found = [
            f"{each.title} {part[each.name]:.3f} (chance {part[f'{each.name}_null_rank']:.2f})" for each in STATISTICS
        ]
        print(
            f"{part['name']}: {', '.join(found)}{', stopping rule fires' * part['stop']}"
            f"{', the reward fell' * part['reward_fell']}"
        )
        if "labels" in part:
            agreed = part["labels"]["statistics"]
            shown = [f"{name} {counts['both']} of {counts['outliers']}" for name, counts in agreed.items()]
            print(f"{part['name']}: {part['labels']['hacked']} labelled as exploiting a reward; among the outliers of "
                  f"{', '.join(shown)}")  # fmt: skip
    number = sum(part["num_responses"] for part in result.candidates)
    done = f"compared the latents of {number} responses with those of {result.reference['num_responses']}"
    flags.print_once(done, see=f"{arguments.output}/result.html")
