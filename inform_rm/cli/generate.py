"""``inform-rm generate``."""

import argparse
import os
from typing import Any

from inform_rm.cli import flags


def add_parser(commands: Any) -> None:
    """Add the command."""
    text = "responses of a policy to a set of prompts, for detect, judge and score"
    command = flags.add_command(commands, "generate", text, run)
    command.add_argument("--model", required=True, help="causal language model: folder or Hub id; with --endpoint the "
                         "name under which it is served")  # fmt: skip
    flags.add_endpoint(command)
    command.add_argument("--prompts", required=True, nargs="+", help=f"rows with a prompt: {flags.SOURCES}")
    flags.add_columns(command, "prompt, system, history, id")
    command.add_argument("--output", required=True, help="JSONL file: a response a line; OUTPUT.about says how made")
    command.add_argument("--num-prompts", type=int, help="use so many prompts, drawn at random")
    command.add_argument("--num-samples", type=int, default=1, help="for each prompt (default: %(default)s)")
    command.add_argument(
        "--temperature", type=float, default=1.0, help="0: the likeliest token (default: %(default)s)"
    )
    command.add_argument("--top-p", type=float, default=1.0, help="share of the probability that is kept (default: "
                         "%(default)s)")  # fmt: skip
    command.add_argument("--max-new-tokens", type=int, default=512, help="cut there, and counted (default: "
                         "%(default)s)")  # fmt: skip
    command.add_argument("--on-bad-row", choices=("error", "skip"), default="error", help="stop at a prompt that "
                         "cannot be answered, or leave it out, count and list it (default: error)")  # fmt: skip
    command.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: %(default)s)")
    command.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: GPU if there is one)")
    command.add_argument("--chat-template", help="template file, or 'plain', for a tokenizer without one")
    command.add_argument("--revision", help="revision of the model on the Hub")
    flags.add_switch(command, "--trust-remote-code", "run code from the model's repository")


def run(arguments: argparse.Namespace) -> None:
    """Run it."""
    from inform_rm import generate

    if os.path.exists(arguments.output):
        flags.print_once(f"{arguments.output} exists and is replaced at the end; another --output keeps it")
    names = ("num_prompts", "num_samples", "temperature", "top_p", "max_new_tokens", "on_bad_row", "seed")
    local = ("device", "chat_template", "revision", "trust_remote_code")
    given = {name: getattr(arguments, name) for name in local if getattr(arguments, name) not in (None, False)}
    result = generate(
        arguments.model,
        arguments.prompts,
        arguments.output,
        columns=flags.columns(arguments),
        **{name: getattr(arguments, name) for name in names},
        **flags.endpoint_options(arguments),
        **given,
    )
    cut, left_out = result.finish_reasons.get("length", 0), result.prompts["bad_rows"] + result.prompts["unanswered"]
    earlier = f" ({result.reused} by an earlier call)" if result.reused else ""
    flags.print_once(
        f"wrote {result.num_responses} responses{earlier} to {result.num_prompts} prompts, {cut} cut at "
        f"{arguments.max_new_tokens} tokens, {result.empty} empty, {left_out} left out",
        see=arguments.output,
    )
