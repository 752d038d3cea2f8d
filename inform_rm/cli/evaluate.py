"""``inform-rm evaluate``: pairs or a benchmark suite."""

import argparse
from typing import Any

from inform_rm.cli import flags
from inform_rm.errors import InputError
from inform_rm.eval.settings import PairSettings
from inform_rm.eval.suites.tables import SUITES


def add_parser(commands: Any) -> None:
    command = flags.add_command(
        commands, "evaluate", "accuracy of a reward model on pairs, rankings, scores or a suite", run
    )
    flags.add_model(command)
    command.add_argument("--suite", choices=tuple(SUITES), help="benchmark, with its published aggregation")
    flags.add_data(command, nargs="+", help=f"pairs, rankings or scored responses: {flags.SOURCES}; with --suite its "
                         "files or folders (default: from the Hub)")  # fmt: skip
    command.add_argument("--ties", choices=("wrong", "half"), help="--suite rewardbench: what equal rewards give "
                         "(default: wrong, as published)")  # fmt: skip
    command.add_argument("--output", required=True, help="folder for result.json, result.md and plots")
    flags.add_columns(command, flags.PAIR_FIELDS + flags.GROUP_FIELDS)
    flags.add_settings(command, PairSettings)
    flags.add_score_weights(command)


def run(arguments: argparse.Namespace) -> None:
    given = {**flags.given(arguments), "split_over_processes": True}
    if "suite" not in given:
        if "data" not in given:
            raise InputError("data: name the pairs with --data FILES, or a benchmark with --suite NAME.")
        if "ties" in given:
            raise InputError("ties: an option of --suite rewardbench. Leave it out; the result has both conventions.")
        from inform_rm import evaluate

        lines, done = _found(evaluate(**given).to_dict())
        flags.print_once(*lines, done, see=f"{arguments.output}/result.html")
        return
    if "max_pairs" in given:
        raise InputError("max_pairs: a suite is evaluated whole. Leave it out, or evaluate the pairs without --suite.")
    if "columns" in given:
        raise InputError("columns: the rows of a suite have their published columns. Leave it out.")
    if "score_weights" in given:
        raise InputError("score_weights: for scored responses; a suite has none. Leave it out.")
    from inform_rm import evaluate_suite

    result = evaluate_suite(**given)
    flags.print_once(result.headline, f"evaluated suite {arguments.suite}", see=f"{arguments.output}/result.html")


def _found(result: dict[str, Any]) -> tuple[list[str], str]:
    """What was found on pairs, rankings or scored responses, and what was done."""
    if "num_scored" in result:
        correlation = f", Pearson {result['pearson']:.4f}" if "pearson" in result else ""
        return [f"RMSE {result['rmse']:.4f}{correlation}"], f"evaluated {result['num_scored']} scored responses"
    lines, done = [flags.accuracy_line(result)], f"evaluated {result['num_pairs']} pairs"
    if "kendall_tau" in result:
        low, high = result["kendall_tau_interval"]
        tau = f"Kendall's tau-b {result['kendall_tau']:.4f} (95 % interval {low:.4f} to {high:.4f})"
        lines.append(f"{tau}, top-1 accuracy {result['top_1_accuracy']:.4f}")
        done = f"evaluated {result['num_prompts']} rankings"
    return lines, done
