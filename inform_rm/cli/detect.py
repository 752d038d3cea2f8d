"""``inform-rm detect``."""

import argparse
import dataclasses
from typing import Any

from inform_rm.cli import flags
from inform_rm.eval.detection.settings import DetectionSettings
from inform_rm.util.papers import MOP_DIFFERS


def _eps(text: str) -> float | str:
    return text if text == "auto" else float(text)


_SETTINGS = [setting for setting in dataclasses.fields(DetectionSettings) if setting.metadata["help"]]
_TYPES: dict[Any, Any] = {float | str: _eps, int | None: int, int: int, float: float, str: str}


def add_parser(commands: Any) -> None:
    """Add the command."""
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
    add_settings(command)


def add_settings(command: argparse.ArgumentParser) -> None:
    """The flags of `DetectionSettings`; `chosen_settings` reads them."""
    for setting in _SETTINGS:
        default = "" if setting.default is None else " (default: %(default)s)"
        command.add_argument(
            f"--{setting.name.replace('_', '-')}",
            type=_TYPES[setting.type],
            choices=setting.metadata["choices"] or None,
            default=setting.default,
            help=setting.metadata["help"] + default,
        )


def chosen_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """As arguments of the functions."""
    return {setting.name: getattr(arguments, setting.name) for setting in _SETTINGS}


def run(arguments: argparse.Namespace) -> None:
    """Run it."""
    from inform_rm import detect
    from inform_rm.eval.detection.statistic import STATISTICS

    result = detect(
        arguments.model,
        arguments.reference,
        arguments.candidate,
        arguments.output,
        labels=arguments.labels,
        columns=flags.columns(arguments),
        **chosen_settings(arguments),
        **flags.scoring_options(arguments),
    )
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
