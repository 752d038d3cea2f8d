"""``inform-rm generate``."""

import argparse
import os
from typing import Any

from inform_rm.cli import flags
from inform_rm.eval.generation.settings import EndpointSettings, GenerationSettings


def add_parser(commands: Any) -> None:
    text = "responses of a policy to a set of prompts, for detect, judge and score"
    command = flags.add_command(commands, "generate", text, run)
    command.add_argument("--model", required=True, help="causal language model: folder or Hub id; with --endpoint the "
                         "name under which it is served")  # fmt: skip
    command.add_argument("--endpoint", metavar="URL", help=flags.ENDPOINT)
    flags.add_settings(command, EndpointSettings)
    command.add_argument("--prompts", required=True, nargs="+", help=f"rows with a prompt: {flags.SOURCES}")
    flags.add_columns(command, "prompt, system, history, id")
    command.add_argument("--output", required=True, help="JSONL file: a response a line; OUTPUT.about says how made")
    flags.add_settings(command, GenerationSettings)
    flags.add_loading(command)


def run(arguments: argparse.Namespace) -> None:
    from inform_rm import generate

    if os.path.exists(arguments.output):
        flags.print_once(f"{arguments.output} exists and is replaced at the end; another --output keeps it")
    result = generate(**flags.given(arguments))
    cut, left_out = result.finish_reasons.get("length", 0), result.prompts["bad_rows"] + result.prompts["unanswered"]
    earlier = f" ({result.reused} by an earlier call)" if result.reused else ""
    flags.print_once(
        f"wrote {result.num_responses} responses{earlier} to {result.num_prompts} prompts, {cut} cut at "
        f"{arguments.max_new_tokens} tokens, {result.empty} empty, {left_out} left out",
        see=arguments.output,
    )
