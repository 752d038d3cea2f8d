"""``inform-rm select``: which of several trained models, by CSI."""

import argparse
from typing import Any

from inform_rm.cli import flags
from inform_rm.eval.detection.settings import DetectionSettings


def add_parser(commands: Any) -> None:
    text = "which of several trained models (other K, beta): by CSI's rank in the null"
    command = flags.add_command(commands, "select", text, run)
    command.add_argument("--model", required=True, nargs="+", type=flags.named, metavar="[NAME=]MODEL",
                         help="trained models: folders or Hub ids")  # fmt: skip
    command.add_argument(
        "--reference", required=True, help="responses before optimisation: rows of prompt and response"
    )
    command.add_argument("--candidate", required=True, nargs="+", type=flags.named, metavar="[NAME=]FILE",
                         help="responses optimised against each model, NAME=FILE; or one file for all")  # fmt: skip
    command.add_argument("--gold", metavar="COLUMN", help="column of the candidates with their gold reward, if known")
    command.add_argument("--output", required=True, help="folder for result.json, plot and page")
    flags.add_columns(command, flags.ROW_FIELDS)
    flags.add_settings(command, DetectionSettings)
    flags.add_scoring(command)


def run(arguments: argparse.Namespace) -> None:
    from inform_rm import select

    named = flags.by_name("model", arguments.model, "one=FOLDER other=FOLDER")
    candidates: Any = dict(arguments.candidate)
    if len(arguments.candidate) == 1 and not set(candidates) <= set(named):
        ((_, candidates),) = arguments.candidate
    given = {name: value for name, value in flags.given(arguments).items() if name not in ("model", "candidate")}
    result = select(named, candidates=candidates, **given)
    for place, entry in enumerate(result.models, start=1):
        gold = f", gold {entry['gold']:.3f} (place {entry['gold_place']})" if "gold" in entry else ""
        print(
            f"{place}. {entry['name']}: rank {entry['null_rank']:.2f}, CSI {entry['csi_over_null']:.2f} x null{gold}"
        )
    flags.print_once(f"chose {result.chosen} among {len(named)} models", see=f"{arguments.output}/result.html")
