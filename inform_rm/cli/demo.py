"""``inform-rm demo``."""

import argparse
from typing import Any

from inform_rm.cli import flags


def add_parser(commands: Any) -> None:
    text = "train, evaluate and report on a generated world; needs no download"
    command = flags.add_command(commands, "demo", text, run)
    command.add_argument("--output", default="demo-output", help="folder for models and report (default: %(default)s)")
    command.add_argument(
        "--backbone", help="pretrained model (folder or Hub id) in place of the small one from scratch"
    )
    command.add_argument("--seed", type=int, default=0, help="seed of world and training (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    from inform_rm.world.demo import demo

    demo(arguments.output, backbone=arguments.backbone, seed=arguments.seed)
