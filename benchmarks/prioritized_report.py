"""Tables and the plot of `benchmarks/prioritized.py`.

    python benchmarks/prioritized_report.py --runs runs/prioritized/runs.jsonl

Writes ``table.md`` and, from the last seed, ``planes.png`` beside the runs; ``docs/results/prioritized.md`` shows and
discusses them.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from over_seeds import mean_and_interval
from prioritized import BUDGET, COSTS, METHODS, TEST_PAIRS, UPDATES, policy_responses

Runs = dict[str, list[dict[str, Any]]]  # method -> runs, in the order of their seeds
BEST_OF = (1, 4, 16, 64)
WIN_BEST_OF = 16
GAPS = ("prompt_free_gap", "prompt_related_gap")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/prioritized/runs.jsonl"))
    parser.add_argument("--label-noise", type=float, default=0.0)
    arguments = parser.parse_args()
    all_runs = [json.loads(line) for line in arguments.runs.read_text().splitlines()]
    chosen = sorted((run for run in all_runs if run["label_noise"] == arguments.label_noise), key=lambda r: r["seed"])
    runs: Runs = {method: own for method in METHODS if (own := [run for run in chosen if run["method"] == method])}
    gold = {run["seed"]: policy_responses(run["seed"])[2] for run in chosen}
    parts = [accuracies(runs), differences(runs), policies(runs, gold), audits(runs)]
    text = "\n\n".join(parts) + "\n"
    (arguments.runs.parent / "table.md").write_text(text)
    print(text)
    write_planes(runs, arguments.runs.parent / "planes.png")


def marks_of(method: str) -> dict[str, int]:
    """What is compared -> updates of a method after which it is looked at."""
    half, whole = (round(BUDGET * share / COSTS[method]) for share in (0.5, 1.0))
    return {"half of the time": half, "the whole time": whole, "equal updates": UPDATES}


def accuracies(runs: Runs) -> str:
    """Means over seeds after each of `marks_of`; ``time`` in units of all updates of Bradley-Terry, in CPU time."""
    lines = _head("at", "method", "seeds", "updates", "time", *TEST_PAIRS)
    for at in marks_of("bt"):
        for method, own in runs.items():
            updates = marks_of(method)[at]
            marks = [_mark(run, updates) for run in own]
            whole = {run["seed"]: _mark(run, BUDGET)["cpu_seconds"] for run in runs["bt"]}
            time = np.mean([mark["cpu_seconds"] / whole[run["seed"]] for mark, run in zip(marks, own, strict=True)])
            cells = [_interval([mark[split] for mark in marks]) for split in TEST_PAIRS]
            lines.append(_row(at, method, len(own), updates, f"{time:.2f}", *cells))
    return "\n".join(lines)


def differences(runs: Runs) -> str:
    """Accuracy minus that of Bradley-Terry with the same seed."""
    lines = _head("at", "method, minus bt", *TEST_PAIRS)
    for at, updates in marks_of("bt").items():
        base = {run["seed"]: _mark(run, updates) for run in runs["bt"]}
        for method, own in runs.items():
            if method == "bt":
                continue
            marks = [_mark(run, marks_of(method)[at]) for run in own]
            cells = [
                _interval([mark[split] - base[run["seed"]][split] for mark, run in zip(marks, own, strict=True)], "+")
                for split in TEST_PAIRS
            ]
            lines.append(_row(at, method, *cells))
    return "\n".join(lines)


def policies(runs: Runs, gold: dict[int, np.ndarray]) -> str:
    """Mean gold reward of best of n by the finished models, and how often their choice beats that of Bradley-Terry."""
    from inform_rm.eval.best_of_n.simulate import best_of_n_expectation

    lines = _head("method", *(f"best of {n}" for n in BEST_OF), f"win rate against bt, best of {WIN_BEST_OF}")
    base = {run["seed"]: np.array(run["policy"]) for run in runs["bt"]}
    for method, own in runs.items():
        curves = [best_of_n_expectation(run["policy"], gold[run["seed"]], BEST_OF).mean(axis=0) for run in own]
        cells = [_interval([curve[place] for curve in curves]) for place in range(len(BEST_OF))]
        wins = [win_rate(np.array(run["policy"]), base[run["seed"]], gold[run["seed"]], WIN_BEST_OF) for run in own]
        lines.append(_row(method, *cells, "" if method == "bt" else _interval(wins)))
    best = _interval([float(table.max(axis=1).mean()) for table in gold.values()])
    return "\n".join(
        [*lines, "", f"The best response there is to each prompt has a gold reward of {best} on average."]
    )


def win_rate(own: np.ndarray, other: np.ndarray, gold: np.ndarray, n: int) -> float:
    """Probability that the best of n by one reward has more gold than the best of n others by another; a tie is half.

    The two choose among different responses, as two policies do: one among the first half, the other among the second,
    and the other way round; the mean over all subsets of n of each half.

    Args:
        own: ``(prompts, responses)`` rewards of one model.
        other: the same of the other.
        gold: the same by what judges.
        n: at most half of the responses.
    """
    from inform_rm.eval.best_of_n.simulate import best_of_n_weights

    half = gold.shape[1] // 2
    weights = best_of_n_weights(half, [n])[0]
    total = 0.0
    for one, two in ((slice(0, half), slice(half, 2 * half)), (slice(half, 2 * half), slice(0, half))):
        for prompt in range(len(gold)):
            mine = gold[prompt, one][own[prompt, one].argsort(kind="stable")]
            theirs = gold[prompt, two][other[prompt, two].argsort(kind="stable")]
            beats = (mine[:, None] > theirs) + 0.5 * (mine[:, None] == theirs)
            total += weights @ beats @ weights
    return float(total / 2 / len(gold))


def audits(runs: Runs) -> str:
    """The finished models on pairs whose length says nothing about what is right."""
    names = ("accuracy", "response_decides", "prompt_sensitivity")
    lines = _head("audit", *names)
    for method, own in runs.items():
        lines.append(_row(method, *(_interval([run["audit"][name] for run in own]) for name in names)))
    return "\n".join(lines)


def write_planes(runs: Runs, path: Path) -> None:
    """D1 against D2 as in arXiv:2504.06020, Fig. 4, of the last seed that has both methods."""
    from matplotlib.figure import Figure

    from inform_rm.eval.decompose_report import draw_plane
    from inform_rm.util.files import atomic_write_bytes
    from inform_rm.util.page import figure_png

    titles = {"bt": "ordinary training", "smallest": "prioritized training"}
    if not all(method in runs and "gaps" in runs[method][-1] for method in titles):
        return
    gaps = {title: runs[method][-1]["gaps"] for method, title in titles.items()}
    reach = 1.05 * max(np.abs(found[name]).max() for found in gaps.values() for name in GAPS)
    figure = Figure(figsize=(10.5, 4.75), layout="constrained")
    for axes, (title, found) in zip(figure.subplots(1, 2), gaps.items(), strict=True):
        free, related = (np.array(found[name]) for name in GAPS)
        draw_plane(axes, reach)
        points = axes.scatter(free, related, c=found["words_difference"], cmap="coolwarm", s=10, vmin=-30, vmax=30)
        axes.set_title(f"{title}: {np.mean(free + related > 0):.0%} ranked right")
    figure.colorbar(points, ax=figure.axes, label="words, chosen - rejected", shrink=0.9, extend="both")
    atomic_write_bytes(path, figure_png(figure))


def _mark(run: dict[str, Any], updates: int) -> dict[str, Any]:
    return next(mark for mark in run["marks"] if mark["updates"] == updates)


def _interval(values: Sequence[float], sign: str = "") -> str:
    return "{:{}.3f} [{:{}.3f}, {:{}.3f}]".format(
        *sum(((value, sign) for value in mean_and_interval(list(values))), ())
    )


def _row(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _head(*cells: str) -> list[str]:
    return [_row(*cells), "|" + "---|" * len(cells)]


if __name__ == "__main__":
    main()
