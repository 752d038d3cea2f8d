"""``inform-rm compare``: finished results, or models that are evaluated first."""

import argparse
import sys
from typing import Any

from inform_rm.cli import flags
from inform_rm.errors import InputError
from inform_rm.eval.settings import PairSettings


def add_parser(commands: Any) -> None:
    text = "several models on the same rows: differences, tests, flipped rows"
    command = flags.add_command(commands, "compare", text, run)
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--results", nargs="+", type=flags.named, metavar="[NAME=]FOLDER",
                      help="what 'inform-rm evaluate' wrote; the first is the baseline")  # fmt: skip
    what.add_argument("--model", nargs="+", type=flags.named, metavar="[NAME=]MODEL",
                      help="evaluate these on --data first, each into its own folder of the output")  # fmt: skip
    flags.add_data(command, nargs="+", help=f"with --model: pairs, {flags.SOURCES}")
    command.add_argument("--output", required=True, help="folder for result.json, flips.jsonl, plot and page")
    command.add_argument("--fail-below", nargs="+", action="extend", type=_limit, metavar="NAME=LIMIT",
                         help="exit with 1 if less; NAME: suite, suite.section, accuracy or a subset")  # fmt: skip
    flags.add_columns(command, flags.PAIR_FIELDS)
    flags.add_settings(command, PairSettings)
    flags.add_scoring(command)


def run(arguments: argparse.Namespace) -> int:
    """Run it; 1 if a model is below a limit."""
    from inform_rm import compare

    models = flags.by_name("compare", arguments.results or arguments.model, "one=FOLDER other=FOLDER")
    limits = arguments.fail_below or []
    if len(dict(limits)) < len(limits):
        raise InputError("fail_below: two limits on the same name. Keep one of them.")
    given = {name: value for name, value in flags.given(arguments).items() if name not in ("model", "results")}
    given |= {"models" if arguments.model else "results": models, "fail_below": dict(limits)}
    result = compare(**given)
    for name, entry in result.groups[0]["models"].items():
        line = f"{name}: accuracy {entry['accuracy']:.3f}"
        if "difference" in entry:
            low, high = entry["difference_interval"]
            line += f", {entry['difference']:+.3f} [{low:+.3f}, {high:+.3f}] against {result.baseline}"
        if "mcnemar" in entry:
            line += f", McNemar p {entry['mcnemar']['p_value']:.2g}"
        print(line)
    done = f"compared {len(models)} models on {result.groups[0]['num_rows']} rows"
    flags.print_once(done, see=f"{arguments.output}/result.html")
    for part in result.below:
        print(f"{part['model']}: {part['name']} is {part['value']:.4f}, below {part['limit']:g}", file=sys.stderr)
    return 1 if result.below else 0


def _limit(text: str) -> tuple[str, float]:
    """``NAME=0.8``; the name may hold "=" itself."""
    name, separator, value = text.rpartition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=LIMIT, such as accuracy=0.8")
    try:
        return name, float(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {value!r} is no number") from error
