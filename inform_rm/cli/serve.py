"""``inform-rm serve``."""

import argparse
from typing import Any

from inform_rm.cli import flags


def add_parser(commands: Any) -> None:
    command = flags.add_command(commands, "serve", "a reward model over HTTP: /score, /get_reward, /classify", run)
    flags.add_model(command)
    command.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, which only "
                         "this machine reaches)")  # fmt: skip
    command.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    command.add_argument("--token-file", metavar="FILE", help="its first line is the token that clients must send "
                         "(default: the environment variable INFORM_RM_TOKEN, else no token)")  # fmt: skip
    command.add_argument("--max-body-bytes", type=int, help="of one request (default: 16 MiB)")
    command.add_argument("--max-rows", type=int, help="of one request (default: 8192)")
    command.add_argument("--max-queued-rows", type=int, help="of all requests together (default: 32768)")


def run(arguments: argparse.Namespace) -> None:
    from inform_rm.serving.server import read_token, serve

    given = flags.given(arguments)
    serve(token=read_token(given.pop("token_file", None)), **given)
    print(f"stopped serving {arguments.model}")
