"""Tables and the plot of `benchmarks/prioritized.py`.

    python benchmarks/prioritized_report.py --runs runs/prioritized/runs.jsonl

Writes ``table.md`` and, from the last seed, ``planes.png`` beside the runs; ``docs/results/prioritized.md`` shows and
discusses them.
"""

import argparse
from pathlib import Path

import numpy as np

from equal_compute import Runs, accuracies, audits, by_method, differences, head, interval, read_runs, row
from prioritized import METHODS, PLAN, TEST_PAIRS, policy_responses

AUDIT = ("accuracy", "response_decides", "prompt_sensitivity")
BEST_OF = (1, 4, 16, 64)
WIN_BEST_OF = 16
GAPS = ("prompt_free_gap", "prompt_related_gap")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/prioritized/runs.jsonl"))
    parser.add_argument("--label-noise", type=float, default=0.0)
    arguments = parser.parse_args()
    chosen = [run for run in read_runs(arguments.runs) if run["label_noise"] == arguments.label_noise]
    runs, tests = by_method(chosen, tuple(METHODS)), tuple(TEST_PAIRS)
    gold = {run["seed"]: policy_responses(run["seed"])[2] for run in chosen}
    tables = [accuracies(runs, PLAN, tests), differences(runs, PLAN, tests)]
    parts = [*tables, policies(runs, gold), audits(runs, AUDIT)]
    text = "\n\n".join(parts) + "\n"
    (arguments.runs.parent / "table.md").write_text(text)
    print(text)
    write_planes(runs, arguments.runs.parent / "planes.png")


def policies(runs: Runs, gold: dict[int, np.ndarray]) -> str:
    """Mean gold reward of best of n by the finished models, and how often their choice beats that of Bradley-Terry."""
    from inform_rm.eval.best_of_n.simulate import best_of_n_expectation

    lines = head("method", *(f"best of {n}" for n in BEST_OF), f"win rate against bt, best of {WIN_BEST_OF}")
    base = {run["seed"]: np.array(run["policy"]) for run in runs["bt"]}
    for method, own in runs.items():
        curves = [best_of_n_expectation(run["policy"], gold[run["seed"]], BEST_OF).mean(axis=0) for run in own]
        cells = [interval([curve[place] for curve in curves]) for place in range(len(BEST_OF))]
        wins = [win_rate(np.array(run["policy"]), base[run["seed"]], gold[run["seed"]], WIN_BEST_OF) for run in own]
        lines.append(row(method, *cells, "" if method == "bt" else interval(wins)))
    best = interval([float(table.max(axis=1).mean()) for table in gold.values()])
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


if __name__ == "__main__":
    main()
