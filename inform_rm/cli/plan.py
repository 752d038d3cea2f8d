"""``inform-rm plan``: what a training run will need of a GPU, before anything is downloaded."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from inform_rm.cli.flags import add_command_of_settings
from inform_rm.cli.train import read_flags, shown_setting
from inform_rm.errors import InputError, check_whole_number

_USAGE = """usage: inform-rm plan [RECIPE.yaml] [--gpus N] [--memory GIB] [--SETTING VALUE ...]

memory and time of a training run, by arithmetic; nothing is downloaded but the model's config

RECIPE.yaml and --SETTING VALUE are those of `inform-rm train`. What is assumed is printed, and explained in
docs/how-to/plan.md. Exit code 1: it does not fit.
"""
# Flag -> its type, default and help.
_FLAGS: dict[str, tuple[type, Any, str]] = {
    "gpus": (int, 1, "GPUs of all machines together, a process each"),
    "memory": (float, 80.0, "GiB of one GPU"),
    "launch": (str, "fsdp2", "how several GPUs are used: fsdp2 or ddp, the files of accelerate_configs"),
    "config": (
        str,
        None,
        "config.json or folder that gives the model's shape (default: the model itself, or the Hub)",
    ),
    "prompt_tokens": (int, 160, "mean tokens of a prompt"),
    "response_tokens": (int, 82, "mean tokens of a response"),
    "pairs": (int, None, "training pairs, for the time of the run where max_steps is not set"),
    "tflops": (float, 989.0, "peak of a GPU in 10^12 operations a second"),
    "utilisation": (float, 0.35, "share of it that training reaches"),
    "reserve": (float, 2.0, "GiB for CUDA, libraries and what the allocator cannot use"),
}


def add_parser(commands: Any) -> None:
    """Add the command, which takes the flags of `inform-rm train`, too."""
    add_command_of_settings(commands, "plan", "memory and time of a training run, before it is started", run)


def run(arguments: argparse.Namespace) -> int:
    """Run it; 1 where the run does not fit."""
    if {"-h", "--help"} & set(arguments.settings):
        print(_help())
        return 0
    recipe, own, flags = _read(arguments.settings)
    from inform_rm.training.plan import Lengths, Machine, advise, plan, read_config
    from inform_rm.training.reward_arguments import read_arguments

    if recipe is None:
        flags = {"data": "none", "output_dir": "none", **flags}
    args = read_arguments(recipe, {**flags, "use_cpu": True}).divided_over(own["gpus"])
    machine = Machine(**{name: own[name] for name in ("gpus", "memory", "launch", "tflops", "utilisation", "reserve")})
    config = read_config(own["config"] or str(args.model), args)
    lengths = Lengths(own["prompt_tokens"], own["response_tokens"])
    found = plan(args, config, machine, lengths, own["pairs"])
    alone, together = ([], None) if found.fits else advise(args, config, machine, lengths)
    if own["json"]:
        settings = {**flags, "recipe": recipe, "model": args.model}
        advice = [
            {"settings": each.settings, **_as_dict(each.plan)} for each in (*alone, *([together] if together else []))
        ]
        print(json.dumps(_as_dict(found) | {"settings": settings, "assumed": own, "advice": advice}, indent=2))
    else:
        print("\n".join(_text(found, args, own, alone, together)))
    return int(not found.fits)


def _read(words: Sequence[str]) -> tuple[str | None, dict[str, Any], dict[str, Any]]:
    """The recipe, our flags with their defaults, and the settings of the run."""
    recipe, flags = read_flags(words)
    as_json = flags.pop("json", False)
    if not isinstance(as_json, bool) and as_json not in ("true", "false"):
        raise InputError(f"--json: {as_json!r}; expected the bare flag, or true or false.")
    own: dict[str, Any] = {"json": as_json in (True, "true")}
    for name, (kind, default, _) in _FLAGS.items():
        given = flags.pop(name, default)
        try:
            if given is True:  # the bare flag, which as a number would be 1
                raise ValueError
            own[name] = given if given is None else kind(given)
        except (TypeError, ValueError):
            raise InputError(f"--{name}: {given!r}; expected a {'value' if kind is str else 'number'}.") from None
        if kind is int and own[name] is not None:
            check_whole_number(f"--{name}", own[name])
    return recipe, own, flags


def _help() -> str:
    lines = [_USAGE.rstrip(), "", "of its own:"]
    for name, (_, default, text) in _FLAGS.items():
        lines.append(f"  --{name}\n      {text}" + ("" if default is None else f" (default: {default})"))
    return "\n".join(
        [*lines, "  --json\n      print JSON", "", "`inform-rm train --help` lists the settings of a run."]
    )


def _text(found: Any, args: Any, own: dict[str, Any], alone: Sequence[Any], together: Any) -> list[str]:
    how = "" if found.gpus == 1 else f" of {found.gpus} ({own['launch']})"
    trained = found.trained_parameters
    lines = [
        f"{args.model}: {found.parameters / 1e9:.2f} B parameters, {trained / 1e6:,.1f} M of them trained, "
        f"{found.head_parameters / 1e6:.1f} M in the reward head",
        "",
        f"memory of one GPU{how}, GiB",
        *(f"  {name:<32}{size:>8.2f}" for name, size in found.parts.items()),
        f"  {'peak':<32}{found.total:>8.2f}",
        *([f"  {'at the end, with the whole base':<32}{found.finish:>8.2f}"] if found.finish else []),
        f"  {'available':<32}{found.available:>8.2f}   {own['memory']:g} - {own['reserve']:g} in reserve",
    ]
    missing = found.need - found.available
    if found.fits:
        passes = f"a pass has {found.pass_tokens:,} tokens, about {found.most_tokens:,} would fit"
        lines.append(f"fits: {-missing:.1f} GiB are left; {passes}")
    else:
        lines.append(f"does not fit: {missing:.1f} GiB are missing")
    if alone:
        lines += ["", "what helps (peak in GiB, seconds a step)"]
        lines += [_advice(each) for each in alone]
        lines += [_advice(together)] if together and together.settings not in [each.settings for each in alone] else []
        lines += [] if together else ["  all of these together do not make it fit"]
    lines += ["", f"time: {found.seconds_per_step:.2f} s a step of {found.pairs_per_step} pairs, "
              f"{found.pairs_per_second:.1f} pairs/s"]  # fmt: skip
    if found.hours is not None:
        lines[-1] += f"; {found.steps} steps take {found.hours:.1f} hours"
    assumed = (
        f"prompts of {own['prompt_tokens']} and responses of {own['response_tokens']} tokens; of {own['tflops']:g} "
        f"TFLOP/s a GPU reaches {own['utilisation']:.2f} (one H200: 0.30 on 1B, 0.45 on 8B with checkpointing)"
    )
    return [*lines, f"assumed: {assumed}", *(f"not counted: {note}" for note in found.notes)]


def _advice(advice: Any) -> str:
    settings = ", ".join(f"{name}: {shown_setting(value)}" for name, value in advice.settings.items())
    plan = advice.plan
    return f"  {settings}: {plan.need:.1f}, {'fits' if plan.fits else 'does not fit'}, {plan.seconds_per_step:.2f}"


def _as_dict(found: Any) -> dict[str, Any]:
    more = ("total", "need", "fits", "pairs_per_second", "hours")
    return dataclasses.asdict(found) | {name: getattr(found, name) for name in more}
