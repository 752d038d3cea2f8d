"""Command line: parses, calls the Python function of the same name, turns its errors into exit codes.

Exit codes: 0 done, 1 failed while running, 2 wrong use or bad input, 130 and 143 interrupted (Ctrl-C, SIGTERM).
Nothing heavy is imported before parsing, so that ``--help`` answers at once.
"""

import argparse
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from inform_rm.cli.arguments import make_parser
from inform_rm.errors import InputError, Interrupted
from inform_rm.training.config import field_types, read_columns, read_config

_COMMANDS_OF_SEVERAL_PROCESSES = ("train", "evaluate", "decompose", "score")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: arguments without the program's name; ``None`` takes those of the process.
    """
    arguments = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        _refuse_several_processes(arguments.command)
        return _RUN[arguments.command](arguments) or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(error, file=sys.stderr)
        return 128 + error.number
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last complete state", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except OSError as error:
        where = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
        print(f"error: {where}", file=sys.stderr)
        return 1
    except Exception as error:
        traceback.print_exc()
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _pairs_policy(arguments: argparse.Namespace) -> dict[str, Any]:
    named = {name: getattr(arguments, name) for name in ("on_bad_row", "overlong", "max_pairs", "seed")}
    return {**named, "columns": _columns(arguments)}


def _columns(arguments: argparse.Namespace) -> dict[str, str] | None:
    try:
        return None if arguments.columns is None else read_columns(arguments.columns)
    except ValueError as error:
        raise InputError(f"columns: {error}.") from None


def _demo(arguments: argparse.Namespace) -> None:
    from inform_rm.world.demo import demo

    demo(arguments.output, backbone=arguments.backbone, seed=arguments.seed)


def _train(arguments: argparse.Namespace) -> None:
    flags = {name: value for name, value in vars(arguments).items() if name in field_types()}
    config = read_config(arguments.config, flags)
    from inform_rm import train

    result = train(config)
    measured = [] if result["evaluation"] is None else [_accuracy(result["evaluation"])]
    _print_once(*measured, f"model: {config.output}")


def _print_once(*lines: str) -> None:
    """Lines for the user from the main process of a launch."""
    from inform_rm.util.processes import is_main_process

    if is_main_process():
        print(*lines, sep="\n")


def _accuracy(result: dict[str, Any]) -> str:
    low, high = result["accuracy_interval"]
    return f"accuracy {result['accuracy']:.4f} on {result['num_pairs']} pairs (95 % interval {low:.4f} to {high:.4f})"


def _refuse_several_processes(command: str) -> None:
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1" and command not in _COMMANDS_OF_SEVERAL_PROCESSES:
        raise InputError(
            f"{command}: started {processes} times by a launcher, and each process would write the same files. "
            f"It runs in one: start it without accelerate launch. ({', '.join(_COMMANDS_OF_SEVERAL_PROCESSES)} use "
            "several.)"
        )


def _scorer_options(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("max_length", "tokens_per_batch", "device", "dtype", "chat_template", "revision", "trust_remote_code")
    return {name: getattr(arguments, name) for name in names}


def _evaluate(arguments: argparse.Namespace) -> None:
    policy = {**_pairs_policy(arguments), "data_revision": arguments.data_revision}
    options = {**_scorer_options(arguments), "split_over_processes": True}
    if arguments.suite is None:
        if not arguments.data:
            raise InputError("data: name the pairs with --data FILES, or a benchmark with --suite NAME.")
        if arguments.ties is not None:
            raise InputError("ties: an option of --suite rewardbench. Leave it out; the result has both conventions.")
        from inform_rm import evaluate

        found = evaluate(arguments.model, arguments.data, arguments.output, **policy, **options)
        _print_once(_accuracy(found), f"{arguments.output}/result.html")
        return
    if policy.pop("max_pairs") is not None:
        raise InputError("max_pairs: a suite is evaluated whole. Leave it out, or evaluate the pairs without --suite.")
    if policy.pop("columns") is not None:
        raise InputError("columns: the rows of a suite have their published columns. Leave it out.")
    from inform_rm import evaluate_suite

    ties = arguments.ties or "wrong"
    result = evaluate_suite(
        arguments.model, arguments.suite, arguments.data, arguments.output, ties=ties, **policy, **options
    )
    from inform_rm.eval.suites.report import headline

    _print_once(headline(result), f"{arguments.output}/result.html")


def _decompose(arguments: argparse.Namespace) -> None:
    from inform_rm import decompose

    result = decompose(
        arguments.model,
        arguments.data,
        arguments.output,
        num_prompts=arguments.num_prompts,
        stratify=arguments.stratify,
        weights="behavior" if arguments.behavior_model else "uniform",
        behavior_model=arguments.behavior_model,
        length_normalized=arguments.length_normalized,
        ess_target=arguments.ess_target,
        color=arguments.color,
        **_pairs_policy(arguments),
        **_scorer_options(arguments),
        split_over_processes=True,
    )
    _print_once(
        f"response decides {result['response_decides']:.3f}, sign flips {result['sign_flips']:.3f}, "
        f"accuracy {result['accuracy']:.3f} on {result['num_pairs']} pairs; {arguments.output}/result.html"
    )


def _detect(arguments: argparse.Namespace) -> None:
    from inform_rm import detect

    names = (
        "eps", "min_samples", "noise", "alpha", "tail", "max_change_ratio", "max_responses", "on_bad_row", "seed"
    )  # fmt: skip
    result = detect(
        arguments.model,
        arguments.reference,
        arguments.candidate,
        arguments.output,
        columns=_columns(arguments),
        **{name: getattr(arguments, name) for name in names},
        **_scorer_options(arguments),
    )
    for part in result["candidates"]:
        print(
            f"{part['name']}: CSI per response {part['csi_normalized']:.3f} "
            f"(chance {part['csi_normalized_null_rank']:.2f}), "
            f"MOP {part['mop']:.3f} (chance {part['mop_null_rank']:.2f})"
            f"{', stopping rule fires' * part['stop']}"
        )
    print(f"{arguments.output}/result.html")


def _simulate(arguments: argparse.Namespace) -> None:
    from inform_rm.world.policy import attack

    if len(dict(arguments.proxy)) < len(arguments.proxy):
        raise InputError("proxy: two models have the same name. Name them apart: --proxy one=FOLDER other=FOLDER.")
    names = ("gold", "policy", "data", "num_prompts", "num_responses", "temperature", "max_new_tokens", "seed")
    result = attack(
        dict(arguments.proxy),
        arguments.output,
        columns=_columns(arguments),
        **{name: getattr(arguments, name) for name in names},
        **_scorer_options(arguments),
    )
    for name, part in result["proxies"].items():
        peak = part["peak"]
        low, high = peak["fall_interval"]
        print(
            f"{name}: gold peaks at n = {peak['n']} (KL {peak['kl_nats']:.2f} nats) and falls by {peak['fall']:.3f} "
            f"[{low:.3f}, {high:.3f}] to n = {result['ns'][-1]}"
        )
    print(f"{arguments.output}/result.html")


def _compare(arguments: argparse.Namespace) -> int:
    from inform_rm import compare

    named = arguments.results or arguments.model
    if len(dict(named)) < len(named):
        raise InputError("compare: two of them have the same name. Name them apart: one=FOLDER other=FOLDER.")
    limits = arguments.fail_below or []
    if len(dict(limits)) < len(limits):
        raise InputError("fail_below: two limits on the same name. Keep one of them.")
    options = {**_pairs_policy(arguments), **_scorer_options(arguments), "data": arguments.data}
    # What is left at its default is not passed on: with --results it would be of no use, and that is refused.
    options = {name: value for name, value in options.items() if value not in (None, "error") and value is not False}
    result = compare(
        **{"models" if arguments.model else "results": dict(named)},
        output=arguments.output,
        fail_below=dict(limits),
        **options,
    )
    for name, entry in result["groups"][0]["models"].items():
        line = f"{name}: accuracy {entry['accuracy']:.3f}"
        if "difference" in entry:
            low, high = entry["difference_interval"]
            line += f", {entry['difference']:+.3f} [{low:+.3f}, {high:+.3f}] against {result['baseline']}"
        if "mcnemar" in entry:
            line += f", McNemar p {entry['mcnemar']['p_value']:.2g}"
        print(line)
    print(f"{arguments.output}/result.html")
    for part in result["below"]:
        print(f"{part['model']}: {part['name']} is {part['value']:.4f}, below {part['limit']:g}", file=sys.stderr)
    return 1 if result["below"] else 0


def _score(arguments: argparse.Namespace) -> None:
    from inform_rm.scoring.score_files import score_file
    from inform_rm.scoring.scorer import RewardScorer

    scorer = RewardScorer(arguments.model, **_scorer_options(arguments), split_over_processes=True)
    found = score_file(
        scorer,
        arguments.input,
        arguments.output,
        arguments.uncertainty,
        on_bad_row=arguments.on_bad_row,
        columns=_columns(arguments),
    )
    earlier = f" ({found['resumed_rows']} by an earlier call)" if found["resumed_rows"] else ""
    scored = found["rows"] - found["bad_rows"]
    _print_once(f"{scored} rows scored{earlier}, {found['bad_rows']} bad rows without a reward; {arguments.output}")


def _serve(arguments: argparse.Namespace) -> None:
    from inform_rm.serving.server import read_token, serve

    serve(
        arguments.model,
        host=arguments.host,
        port=arguments.port,
        token=read_token(arguments.token_file),
        max_body_bytes=arguments.max_body_bytes,
        max_rows=arguments.max_rows,
        max_queued_rows=arguments.max_queued_rows,
        **_scorer_options(arguments),
    )


def _check_data(arguments: argparse.Namespace) -> int:
    from inform_rm.data.check_data import check_data, format_report, write_report

    report = check_data(
        arguments.data,
        arguments.tokenizer,
        arguments.max_length,
        columns=_columns(arguments),
        chat_template=arguments.chat_template,
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
    )
    print(format_report(report))
    write_report(report, arguments.output)
    return 1 if report["unusable_rows"] else 0


def _export(arguments: argparse.Namespace) -> None:
    from inform_rm import export_model

    files = export_model(
        arguments.model,
        arguments.output,
        folded=arguments.folded,
        push_to=arguments.push_to,
        revision=arguments.revision,
        results=arguments.results,
        license=arguments.license,
    )
    for name, size in files.items():
        print(f"{size:>12,} {name}")
    if arguments.folded:
        with open(os.path.join(arguments.output, "config.json"), encoding="utf-8") as file:
            written = json.load(file)
        offset = written["reward_offset"]
        constant = f" {'-' if offset < 0 else '+'} {abs(offset)!r}" if offset else ""
        print(f"{written['architectures'][0]}: reward of the model = folded reward{constant}")


def _report(arguments: argparse.Namespace) -> None:
    from inform_rm import write_report

    write_report(arguments.run_folder, arguments.output, arguments.results)
    print(arguments.output)


_RUN: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "demo": _demo,
    "train": _train,
    "evaluate": _evaluate,
    "compare": _compare,
    "decompose": _decompose,
    "detect": _detect,
    "simulate": _simulate,
    "score": _score,
    "serve": _serve,
    "check-data": _check_data,
    "export": _export,
    "report": _report,
}


if __name__ == "__main__":
    sys.exit(main())
