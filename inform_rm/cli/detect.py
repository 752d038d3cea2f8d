"""``inform-rm detect``."""

import argparse
from typing import Any

from inform_rm.cli.flags import ROW_FIELDS, add_columns, add_command, add_model, columns, scoring_options


def add_parser(commands: Any) -> None:
    """Add the command."""
    text = "does a policy exploit its reward model? latents of its responses"
    command = add_command(commands, "detect", text, run)
    add_model(command)
    command.add_argument("--reference", required=True, help="responses before training: rows of prompt and response")
    command.add_argument("--candidate", required=True, nargs="+", help="responses to check; several files: in order")
    add_columns(command, ROW_FIELDS)
    command.add_argument("--output", required=True, help="folder for result.json, responses.parquet, plots and page")
    command.add_argument("--eps", type=_eps, default="auto", help="radius of DBSCAN, or 'auto' (default: %(default)s)")
    command.add_argument("--min-samples", type=int, default=5, help="of DBSCAN (default: %(default)s)")
    command.add_argument("--noise", choices=("cluster", "singletons", "drop"), default="cluster",
                         help="what DBSCAN's noise counts as (default: %(default)s)")  # fmt: skip
    command.add_argument("--alpha", type=float, default=0.01, help="tail probability below which a response is an "
                         "outlier (default: %(default)s)")  # fmt: skip
    command.add_argument("--tail", choices=("reference", "chi2"), default="reference",
                         help="distribution of distances: the reference's own, or the paper's chi-square "
                         "(default: %(default)s)")  # fmt: skip
    command.add_argument("--max-change-ratio", type=float, default=10.0, help="of the stopping rule, for several "
                         "files (default: %(default)s)")  # fmt: skip
    command.add_argument("--max-responses", type=int, help="use a seeded random subset of each file")
    command.add_argument("--on-bad-row", choices=("error", "skip"), default="error", help="stop at a row that cannot "
                         "be scored, or leave it out, count and list it (default: %(default)s)")  # fmt: skip
    command.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Run it."""
    from inform_rm import detect

    names = (
        "eps", "min_samples", "noise", "alpha", "tail", "max_change_ratio", "max_responses", "on_bad_row", "seed"
    )  # fmt: skip
    result = detect(
        arguments.model,
        arguments.reference,
        arguments.candidate,
        arguments.output,
        columns=columns(arguments),
        **{name: getattr(arguments, name) for name in names},
        **scoring_options(arguments),
    )
    for part in result["candidates"]:
        print(
            f"{part['name']}: CSI per response {part['csi_normalized']:.3f} "
            f"(chance {part['csi_normalized_null_rank']:.2f}), "
            f"MOP {part['mop']:.3f} (chance {part['mop_null_rank']:.2f})"
            f"{', stopping rule fires' * part['stop']}"
        )
    print(f"{arguments.output}/result.html")


def _eps(text: str) -> float | str:
    return text if text == "auto" else float(text)
