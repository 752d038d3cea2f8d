"""``inform-rm train``: settings from a YAML file, from flags or from both; every setting is a flag."""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from inform_rm.cli.flags import accuracy_line, add_command_of_settings, print_once
from inform_rm.errors import InputError
from inform_rm.training.arguments import GROUPS, OFTEN_USED, OUR_SETTINGS

_USAGE = """usage: inform-rm train [CONFIG.yaml] [--SETTING VALUE ...]

train a reward model; writes a Hub-ready folder

CONFIG.yaml holds 'setting: value' lines; flags win over it. Flags may have dashes for underscores; a flag alone means
true. Required: model, data, output_dir. TRL's names are read, too: model_name_or_path, dataset_name,
dataset_train_split, dataset_test_split, ...
"""


def add_parser(commands: Any) -> None:
    add_command_of_settings(commands, "train", "train a reward model; writes a Hub-ready folder", run)


def run(arguments: argparse.Namespace) -> None:
    if {"-h", "--help", "--help-all"} & set(arguments.settings):
        print(_help("--help-all" in arguments.settings))
        return
    config, flags = read_flags(arguments.settings)
    from inform_rm.training.reward_arguments import read_arguments

    try:
        args = read_arguments(config, flags)
    except InputError as error:
        if "unknown setting" in str(error):
            print(_USAGE.splitlines()[0], file=sys.stderr)
        raise
    from inform_rm import train
    from inform_rm.training.budget import budget_lines, budget_of_run
    from inform_rm.training.reward_arguments import settings_of

    settings = settings_of(args)
    if args.kl_reduction == "sum" and (budget := budget_of_run(settings, 1.0, None)):
        print_once(*budget_lines(settings, budget))
    result = train(args)
    found, counts = result["evaluation"] or {}, result["train_pairs"]
    measured = [accuracy_line(found)] if "accuracy" in found else []
    measured += [f"RMSE {found['rmse']:.4f} on {found['num_scored']} scored responses"] if "rmse" in found else []
    rows = f"{counts['pairs']} pairs"
    if "rows" in counts:
        rows = f"{counts['rows']} rows ({', '.join(counts['layouts'])})"
    if "flip_rate_at_most" in (result.get("budget") or {}):
        measured += budget_lines(settings, result["budget"], found.get("kl_nats"))[1:]
    done = f"trained a reward model in {result['steps']} steps on {rows}"
    print_once(*measured, done, see=args.output_dir)


def read_flags(words: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """The file of settings, and the flags: one value is text, several are a list, none is ``True``."""
    config, rest = (words[0], words[1:]) if words and not words[0].startswith("--") else (None, words)
    found: dict[str, list[str]] = {}
    name = None
    for word in rest:
        if word.startswith("--"):
            flag, has_value, value = word[2:].partition("=")
            name = flag.replace("-", "_")
            if name in found:
                raise InputError(f"--{flag} is given twice: keep one.")
            found[name] = [value] if has_value else []
        elif name is None:
            raise InputError(f"{word!r}: expected one file of settings, then flags: --SETTING VALUE.")
        else:
            found[name].append(word)
    return config, {name: values[0] if len(values) == 1 else values or True for name, values in found.items()}


def _help(everything: bool) -> str:
    starts = {first: heading for heading, first in GROUPS.items()}
    lines = [_USAGE.rstrip()]
    for name, spec in OUR_SETTINGS.items():
        if name in starts:
            lines += ["", f"{starts[name]}:"]
        lines += [f"  --{name}", *_wrapped(f"{spec.metadata['help']} (default: {shown_setting(spec.default)})")]
    often = ", ".join(OFTEN_USED)
    lines += ["", "of transformers' TrainingArguments, all of which are settings, with its defaults:"]
    lines += textwrap.wrap(often, 110, initial_indent="  ", subsequent_indent="  ")
    lines += ["  --help-all: shows all of them"]
    if everything:
        import dataclasses

        from transformers import TrainingArguments

        lines += ["", "transformers' TrainingArguments:"]
        for other in dataclasses.fields(TrainingArguments):
            if other.init and other.name not in OUR_SETTINGS:
                text = other.metadata.get("help", "see the documentation of transformers")
                default = None if other.default is dataclasses.MISSING else other.default
                lines += [f"  --{other.name}", *_wrapped(f"{text} (default: {shown_setting(default)})")]
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), 110, initial_indent=" " * 6, subsequent_indent=" " * 6)


def shown_setting(default: Any) -> str:
    """A value as it is written in YAML; nothing is ``none``."""
    if default is None or default == () or default == "":
        return "none"
    return str(default).lower() if isinstance(default, bool) else str(getattr(default, "value", default))
