"""How flags may be spelled, what a wrong one is answered with, and which messages of other libraries are silenced."""

import argparse
import logging
import re
import warnings

import pytest

from inform_rm.cli import plan, train
from inform_rm.cli.dispatch import COMMANDS, parse
from inform_rm.cli.parsing import CommandParser
from inform_rm.cli.quiet import is_alarming, silence_normal_messages

REQUIRED = {
    "demo": "", "evaluate": "--model m --output o", "decompose": "--model m --data d --output o",
    "detect": "--model m --reference r --candidate c --output o",
    "select": "--model m --reference r --candidate c --output o", "simulate": "--proxy p --output o",
    "compare": "--results r --output o", "score": "--model m --input i --output o", "serve": "--model m",
    "generate": "--model m --prompts d --output o", "judge": "--model m --endpoint e --responses r --output o",
    "check-data": "--data d", "export": "--model m --output o", "report": "--run r --output o",
}  # fmt: skip


def a_value(action):
    """Arguments that the flag takes, none of them a default or in `REQUIRED`."""
    if action.nargs == "?":
        return []
    if action.choices:
        return [list(action.choices)[-1]]
    try:
        (action.type or str)("a=3")
    except ValueError:
        return ["3"]
    return ["a=3"]


# The flags of train and plan are settings, which tests/training spells.
@pytest.mark.parametrize("module", [each for each in COMMANDS if each not in (train, plan)], ids=REQUIRED)
def test_every_flag_means_the_same_in_both_spellings(module):
    commands = argparse.ArgumentParser().add_subparsers(parser_class=CommandParser)
    module.add_parser(commands)
    ((name, parser),) = commands.choices.items()
    actions = [each for each in parser._actions if each.option_strings and each.dest != "help"]
    assert actions
    for action in actions:
        flag, value = action.option_strings[-1], a_value(action)
        if action.help == argparse.SUPPRESS:  # TRL's split, which needs data
            continue
        given = REQUIRED[name].replace("--results r", "" if flag == "--model" else "--results r").split()
        dashes, underscores = ("--" + flag[2:].replace(*pair) for pair in ("_-", "-_"))
        found = vars(parser.parse_args([*given, dashes, *value]))
        assert found == vars(parser.parse_args([*given, underscores, *value])), flag
        assert found == vars(parser.parse_args([*given, "=".join([underscores, *value])])), flag
        assert found[action.dest] not in (action.default, "m", "o", "d"), flag


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("evaluate --model_name_or_path m --dataset_name d --dataset_test_split s --output_dir o",
         "evaluate --model m --data d[s] --output o"),
        ("decompose --model_name_or_path=m --dataset-name=d --dataset-train-split=s --output-dir=o",
         "decompose --model m --data d[s] --output o"),
        ("score --model_name_or_path m --dataset_name d --dataset_train_split s --output_dir o",
         "score --model m --input d[s] --output o"),
        ("compare --model_name_or_path x=m --output_dir o", "compare --model x=m --output o"),
        ("serve --model_name_or_path m --trust_remote_code True", "serve --model m --trust-remote-code"),
        ("serve --model m --trust_remote_code false", "serve --model m"),
    ],
)  # fmt: skip
def test_names_of_trl(theirs, ours):
    assert vars(parse(theirs.split())) == vars(parse(ours.split()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian", r"inform-rm: error: unknown command 'trian' \(did you mean train\?\); commands: demo, train, "),
        ("", "inform-rm: error: the following arguments are required: COMMAND"),
        ("evaluate --modle m", r"usage: inform-rm evaluate .*unknown flag --modle \(did you mean --model\?\)"),
        ("evaluate --max_lenth 8", r"unknown flag --max_lenth \(did you mean --max-length\?\)"),
        ("evaluate --max 8", "unknown flag --max"),  # no abbreviations
        ("serve --model m stray", "usage: inform-rm serve .*unexpected argument 'stray'"),
        ("serve --model m -port 1", r"unexpected argument '-port' \(did you mean --port\?\)"),
        ("serve --model m --trust_remote_code maybe", "'maybe': expected true or false, or the bare flag"),
        ("check-data --data a b --dataset_train_split s", r"needs one name after --data, got 2; write NAME\[SPLIT\]"),
        ("evaluate --model m --output o --dataset_test_split s", "needs one name after --data, got 0"),
        ("check-data --data a[b] --dataset_train_split s", r"a\[b\] names its split already"),
        ("check-data --data a --dataset_train_split s --dataset_test_split t", "reads one split; give one of them"),
    ],
)  # fmt: skip
def test_wrong_use_shows_the_usage_of_the_command_and_the_nearest_name(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(arguments.split())
    assert stopped.value.code == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_help_names_the_spellings_in_one_place(capsys):
    with pytest.raises(SystemExit):
        parse(["evaluate", "--help"])
    text = capsys.readouterr().out
    assert text.count("--dataset_test_split") == text.count("--model_name_or_path") == 1


REPORT = """\x1b[1mModel LOAD REPORT\x1b[0m from: m
Key            | Status  |
---------------+---------+-
{}
Notes:
- \x1b[31mMISSING\x1b[0m: those params were newly initialized"""
LOADING = "transformers.modeling_utils"


@pytest.mark.parametrize(
    ("logger", "message", "alarming"),
    [
        (LOADING, REPORT.format("score.encoder.bias | \x1b[31mMISSING\x1b[0m |"), False),
        (LOADING, REPORT.format("score.weight | MISSING |\nlm_head.weight | UNEXPECTED | |"), False),
        (LOADING, REPORT.format("score.weight | MISSING |\nmodel.norm.weight | MISSING |"), True),
        (LOADING, REPORT.format("score.weight | MISSING |\nmodel.extra | UNEXPECTED | |"), True),
        (LOADING, REPORT.format("score.weight | MISMATCH | Reinit |"), True),
        (LOADING, REPORT.format("lm_head.weight | UNEXPECTED | |"), True),
        (LOADING, "Anything else", True),
        ("transformers.tokenization_utils_base", "Token indices sequence length is longer than the specified", False),
        ("transformers.tokenization_utils_base", "Anything else", True),
        ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: x", False),
    ],
)
def test_only_normal_messages_are_silenced(logger, message, alarming):
    assert is_alarming(logging.LogRecord(logger, logging.WARNING, "", 0, message, (), None)) == alarming


def test_of_warnings_only_those_of_one_name_of_all_versions_are_silenced():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        silence_normal_messages()
        warnings.warn(
            "`is_gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning, stacklevel=1
        )
        warnings.warn("`something_else` is deprecated and will be removed in v6.", FutureWarning, stacklevel=1)
    assert ["something_else" in str(warning.message) for warning in heard] == [True]
