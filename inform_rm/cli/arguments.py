"""Arguments of the command line: every command, flag and sentence of help. Imports nothing heavy."""

import argparse
import dataclasses
from typing import Any

from inform_rm import __version__
from inform_rm.eval.suites.tables import SUITES
from inform_rm.training.config import TrainingConfig, field_types

_SOURCES = "files, folders or Hub ids, NAME[SPLIT] for one split"
_PAIR_FIELDS = "prompt, chosen, rejected, system, history, margin, subset, id"
_ROW_FIELDS = "prompt, response, system, history"


def make_parser() -> argparse.ArgumentParser:
    """The parser; what it returns names its command as ``command``."""
    parser = argparse.ArgumentParser(
        prog="inform-rm", description="Train, evaluate and audit reward models that resist reward hacking."
    )
    parser.add_argument("--version", action="version", version=f"inform-rm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = _command(commands, "demo", "train, evaluate and report on a generated world; needs no download")
    demo.add_argument("--output", default="demo-output", help="folder for models and report (default: %(default)s)")
    demo.add_argument("--backbone", help="pretrained model (folder or Hub id) in place of the small one from scratch")
    demo.add_argument("--seed", type=int, default=0, help="seed of world and training (default: %(default)s)")

    train = _command(commands, "train", "train a reward model; writes a Hub-ready folder")
    train.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="settings, one 'name: value' a line")
    for spec, hint in zip(dataclasses.fields(TrainingConfig), field_types().values(), strict=True):
        default = "required" if spec.default is dataclasses.MISSING else f"default: {_shown(spec.default)}"
        train.add_argument(
            f"--{spec.name}",
            default=argparse.SUPPRESS,
            nargs="+" if "tuple" in str(hint) or "dict" in str(hint) else None,
            metavar="VALUE",
            help=f"{spec.metadata['help']} ({default})".replace("%", "%%"),
        )

    evaluate = _command(commands, "evaluate", "accuracy of a reward model on pairs or a benchmark suite")
    _add_model(evaluate)
    evaluate.add_argument("--suite", choices=tuple(SUITES), help="benchmark, with its published aggregation")
    evaluate.add_argument("--data", nargs="+", help=f"pairs: {_SOURCES}; with --suite its files "
                          "or folders (default: from the Hub)")  # fmt: skip
    evaluate.add_argument("--data-revision", help="revision of the data on the Hub")
    evaluate.add_argument("--ties", choices=("wrong", "half"), help="--suite rewardbench: what equal rewards give "
                          "(default: wrong, as published)")  # fmt: skip
    evaluate.add_argument("--output", required=True, help="folder for result.json, result.md and plots")
    _add_pairs_policy(evaluate)

    decompose = _command(commands, "decompose", "how much of a preference the response alone decides")
    _add_model(decompose)
    decompose.add_argument("--data", required=True, nargs="+", help=f"pairs: {_SOURCES}")
    decompose.add_argument("--output", required=True, help="folder for result.json, pairs.parquet, plots and page")
    decompose.add_argument("--num-prompts", type=int, default=16, help="prompts for each pair, its own among them "
                           "(default: %(default)s)")  # fmt: skip
    decompose.add_argument("--stratify", action="store_true", help="only prompts of the pair's own subset")
    decompose.add_argument(
        "--behavior-model", help="causal LM that weighs prompts by how likely it finds the responses"
    )
    decompose.add_argument("--length-normalized", action="store_true", help="weigh by mean token log-likelihoods")
    decompose.add_argument("--ess-target", type=float, default=0.25, help="effective sample size that the weights "
                           "keep, as a share of the prompts (default: %(default)s)")  # fmt: skip
    decompose.add_argument("--color", choices=("length", "subset"), default="length",
                           help="what colours the plane of D1 and D2 (default: %(default)s)")  # fmt: skip
    _add_pairs_policy(decompose)

    detect = _command(commands, "detect", "does a policy exploit its reward model? latents of its responses")
    _add_model(detect)
    detect.add_argument("--reference", required=True, help="responses before training: rows of prompt and response")
    detect.add_argument("--candidate", required=True, nargs="+", help="responses to check; several files: in order")
    _add_columns(detect, _ROW_FIELDS)
    detect.add_argument("--output", required=True, help="folder for result.json, responses.parquet, plots and page")
    detect.add_argument("--eps", type=_eps, default="auto", help="radius of DBSCAN, or 'auto' (default: %(default)s)")
    detect.add_argument("--min-samples", type=int, default=5, help="of DBSCAN (default: %(default)s)")
    detect.add_argument("--noise", choices=("cluster", "singletons", "drop"), default="cluster",
                        help="what DBSCAN's noise counts as (default: %(default)s)")  # fmt: skip
    detect.add_argument("--alpha", type=float, default=0.01, help="tail probability below which a response is an "
                        "outlier (default: %(default)s)")  # fmt: skip
    detect.add_argument("--tail", choices=("reference", "chi2"), default="reference",
                        help="distribution of distances: the reference's own, or the paper's chi-square "
                        "(default: %(default)s)")  # fmt: skip
    detect.add_argument("--max-change-ratio", type=float, default=10.0, help="of the stopping rule, for several files "
                        "(default: %(default)s)")  # fmt: skip
    detect.add_argument("--max-responses", type=int, help="use a seeded random subset of each file")
    detect.add_argument("--on-bad-row", choices=("error", "skip"), default="error", help="stop at a row that cannot "
                        "be scored, or leave it out, count and list it (default: %(default)s)")  # fmt: skip
    detect.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: %(default)s)")

    simulate = _command(commands, "simulate", "best-of-n against reward models: what the gold reward says")
    simulate.add_argument("--proxy", required=True, nargs="+", type=_named, metavar="[NAME=]MODEL",
                          help="reward models that choose: folders or Hub ids")  # fmt: skip
    simulate.add_argument("--output", required=True, help="folder for result.json, responses.parquet, plot and page")
    simulate.add_argument("--gold", help="reward model taken for the truth (default: the world's exact reward)")
    simulate.add_argument("--policy", help="causal LM that writes the responses (default: the world's sampler)")
    simulate.add_argument("--data", nargs="+", help=f"pairs whose prompts are used: {_SOURCES} (default: prompts of "
                          "the world)")  # fmt: skip
    _add_columns(simulate, _PAIR_FIELDS)
    simulate.add_argument("--num-prompts", type=int, help="use so many prompts, drawn at random")
    simulate.add_argument("--num-responses", type=int, default=1024, help="for each prompt (default: %(default)s)")
    simulate.add_argument("--temperature", type=float, default=1.0, help="of the policy (default: %(default)s)")
    simulate.add_argument("--max-new-tokens", type=int, default=128, help="of the policy (default: %(default)s)")
    simulate.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: %(default)s)")
    _add_scoring(simulate)

    compare = _command(commands, "compare", "several models on the same rows: differences, tests, flipped rows")
    what = compare.add_mutually_exclusive_group(required=True)
    what.add_argument("--results", nargs="+", type=_named, metavar="[NAME=]FOLDER",
                      help="what 'inform-rm evaluate' wrote; the first is the baseline")  # fmt: skip
    what.add_argument("--model", nargs="+", type=_named, metavar="[NAME=]MODEL",
                      help="evaluate these on --data first, each into its own folder of the output")  # fmt: skip
    compare.add_argument("--data", nargs="+", help=f"with --model: pairs, {_SOURCES}")
    compare.add_argument("--output", required=True, help="folder for result.json, flips.jsonl, plot and page")
    compare.add_argument("--fail-below", nargs="+", action="extend", type=_limit, metavar="NAME=LIMIT",
                         help="exit with 1 if less; NAME: suite, suite.section, accuracy or a subset")  # fmt: skip
    _add_pairs_policy(compare)
    _add_scoring(compare)

    score = _command(commands, "score", "rewards for rows of prompt and response")
    _add_model(score)
    score.add_argument("--input", required=True, help="JSONL(.gz), CSV or Parquet with 'prompt' and 'response'")
    _add_columns(score, _ROW_FIELDS)
    score.add_argument("--output", required=True, help="JSONL file: the input's rows with their reward")
    score.add_argument("--on-bad-row", choices=("error", "skip"), default="error", help="refuse an input with a row "
                       "that cannot be scored, or write its fault instead of a reward (default: error)")  # fmt: skip
    score.add_argument("--uncertainty", type=int, metavar="N", help="InfoRM: also the reward's spread over N draws")

    serve = _command(commands, "serve", "a reward model over HTTP: /score, /get_reward, /classify")
    _add_model(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, which only "
                       "this machine reaches)")  # fmt: skip
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    serve.add_argument("--token-file", metavar="FILE", help="its first line is the token that clients must send "
                       "(default: the environment variable INFORM_RM_TOKEN, else no token)")  # fmt: skip
    serve.add_argument("--max-body-bytes", type=int, help="of one request (default: 16 MiB)")
    serve.add_argument("--max-rows", type=int, help="of one request (default: 8192)")
    serve.add_argument("--max-queued-rows", type=int, help="of all requests together (default: 32768)")

    check = _command(commands, "check-data", "what is in preference data, and what would go wrong")
    check.add_argument("--data", required=True, nargs="+", help=f"{_SOURCES}; name splits apart")
    _add_columns(check, _PAIR_FIELDS)
    check.add_argument("--tokenizer", help="folder or Hub id: adds token lengths and the template audit")
    check.add_argument("--max-length", type=int, help="shows what this limit would do")
    check.add_argument("--chat-template", help="template file, or 'plain', for a tokenizer without one")
    check.add_argument("--output", help="folder for preflight.json")
    check.add_argument("--revision", help="revision of the tokenizer on the Hub")
    check.add_argument("--trust-remote-code", action="store_true", help="run code from the tokenizer's repository")

    export = _command(commands, "export", "complete Hub folder of an InfoRM model: weights, code, card")
    export.add_argument("--model", required=True, help="InfoRM model: folder, checkpoint or Hub id")
    export.add_argument("--output", required=True, help="new folder")
    export.add_argument("--folded", action="store_true",
                        help="as a plain classifier of transformers, for engines that run no remote code "
                        "(needs decoder: linear)")  # fmt: skip
    export.add_argument("--push-to", metavar="ID", help="also upload to this Hub repository (private if new)")
    export.add_argument("--revision", help="revision of the model on the Hub")
    export.add_argument("--results", nargs="+", default=(), metavar="DIR",
                        help="folders of evaluate on this model, for the card's metadata and table")  # fmt: skip
    export.add_argument("--license", help="the Hub's name of the licence, for the card, such as apache-2.0")

    report = _command(commands, "report", "one page about a training run and results of its model")
    report.add_argument("--run", required=True, dest="run_folder", metavar="DIR", help="folder that train wrote")
    report.add_argument("--results", nargs="+", default=(), metavar="DIR",
                        help="folders of evaluate, decompose and detect on the run's model")  # fmt: skip
    report.add_argument("--output", required=True, metavar="FILE.html", help="page to write")
    return parser


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(command=name)
    return command


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, help="any sequence-classification reward model: folder or Hub id")
    _add_scoring(command)


def _add_scoring(command: argparse.ArgumentParser) -> None:
    command.add_argument("--max-length", type=int, help="longest allowed input in tokens (default: the model's)")
    command.add_argument(
        "--tokens-per-batch", type=int, help="tokens computed at once (default: 2048 on a CPU, else 8192)"
    )
    command.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: GPU if there is one)")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "auto"),
                         help="default: float32 on a CPU, else the checkpoint's own")  # fmt: skip
    command.add_argument("--chat-template", help="template file, or 'plain', for a tokenizer without one")
    command.add_argument("--revision", help="revision of the model on the Hub")
    command.add_argument("--trust-remote-code", action="store_true", help="run code from the model's repository")


def _add_columns(command: argparse.ArgumentParser, fields: str) -> None:
    command.add_argument("--columns", nargs="+", metavar="FIELD=COLUMN", help=f"which columns are {fields}; "
                         "ignore=COLUMN leaves one out knowingly (default: columns of these names)")  # fmt: skip


def _add_pairs_policy(command: argparse.ArgumentParser) -> None:
    _add_columns(command, _PAIR_FIELDS)
    command.add_argument("--on-bad-row", choices=("error", "skip"), default="error", help="default: %(default)s")
    command.add_argument("--overlong", choices=("error", "drop", "truncate_prompt"), default="error",
                         help="pairs over --max-length (default: %(default)s)")  # fmt: skip
    command.add_argument("--max-pairs", type=int, help="use a seeded random subset of each item of data")
    command.add_argument("--seed", type=int, default=0, help="seed of all random choices (default: %(default)s)")


def _shown(default: Any) -> str:
    if default is None or default == ():
        return "none"
    return str(default).lower() if isinstance(default, bool) else str(default)


def _eps(text: str) -> float | str:
    return text if text == "auto" else float(text)


def _named(text: str) -> tuple[str, str]:
    """``NAME=MODEL``, or a model named by the last part of its path or id."""
    name, separator, model = text.partition("=")
    return (name, model) if separator else (text.rstrip("/").rpartition("/")[2], text)


def _limit(text: str) -> tuple[str, float]:
    """``NAME=0.8``; the name may hold "=" itself."""
    name, separator, value = text.rpartition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=LIMIT, such as accuracy=0.8")
    try:
        return name, float(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {value!r} is no number") from error
