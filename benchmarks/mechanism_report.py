"""Tables and figures of the results of `mechanism.py`.

    python benchmarks/mechanism_report.py --output runs/mechanism

Settings are chosen by the accuracy on 200 noisy validation pairs a seed, pooled over the selection seeds, from equally
many settings of each kind, each at the last and at the best epoch; figures are of the other seeds, with 95 % intervals
over seeds (Student's t); differences are paired by seed. Writes ``report.md`` and ``map.png``.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mechanism import (
    HEAD_STARTS,
    REPORT_SEEDS,
    SELECTION_SEEDS,
    crossed,
    inform_candidates,
    key_of,
    read_results,
    runs_of,
    standard_candidates,
)
from mechanism_models import KL_GRID, Variant
from mechanism_world import Dials
from prioritized import mean_and_interval

Choice = tuple[Variant, str]  # a variant, at the "end" or at the "best" epoch
Results = dict[str, dict[str, Any]]
DEFAULT = Variant(kl_warmup_steps=0.1)
LABELS = {"default": "InfoRM, beta 0.1, warm-up 0.1", "chosen": "InfoRM, chosen on validation pairs"}
MEASURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "accuracy": lambda row: row["accuracy"],
    "flips learnt": lambda row: row["flips_learnt"],
    "best of 1,024": lambda row: row["best_of_n"][-1],
    "gold at 8 nats": lambda row: gold_at(row, 8),
    "16": lambda row: gold_at(row, 16),
    "32": lambda row: gold_at(row, 32),
    "peak": lambda row: row["policy"]["peak"],
    "end": lambda row: row["policy"]["end"],
    "neutral words at the end": lambda row: row["policy"]["neutral_end"],
}


def gold_at(row: dict[str, Any], nats: int) -> float:
    """Gold at a KL; where the policy never gets so far, at its end."""
    found = row["policy"]["gold_at_kl"][KL_GRID.index(nats)]
    return row["policy"]["end"] if found is None else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/mechanism"))
    output = parser.parse_args().output
    results = {row["key"]: row for row in read_results(output)}
    cells = list(dict.fromkeys(run[2] for part in ("table", "map") for run in runs_of(part)))
    complete = [cell for cell in cells if has_all(results, cell)]
    lines = [
        f"{len(results)} runs; selection seeds {list(SELECTION_SEEDS)}, reported seeds {list(REPORT_SEEDS)}.", "",
        *main_table(results), *map_table(results, complete), *bias_table(results), *rule_table(results, complete),
        *head_table(results),
    ]  # fmt: skip
    (output / "report.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))
    if complete:
        (output / "map.png").write_bytes(map_png(results, complete))


def rows_of(results: Results, choice: Choice, dials: Dials, seeds: Iterable[int]) -> list[dict[str, Any]]:
    """Figures of one choice, one row a seed; empty if a seed is missing."""
    found = [results.get(key_of(choice[0], seed, dials)) for seed in seeds]
    return [] if None in found else [row[choice[1]] for row in found if row is not None]


def has_all(results: Results, dials: Dials) -> bool:
    runs = crossed([*standard_candidates(), *inform_candidates()], [*SELECTION_SEEDS, *REPORT_SEEDS], [dials])
    return all(key_of(*run) in results for run in runs)


def chosen(results: Results, candidates: list[Variant], dials: Dials) -> Choice:
    """What is right about most validation pairs of the selection seeds, both epochs of every candidate tried."""
    choices = [(variant, kept) for variant in candidates for kept in ("end", "best")]

    def accuracy(choice: Choice) -> float:
        rows = rows_of(results, choice, dials, SELECTION_SEEDS)
        return statistics.mean(row["validation_accuracy"] for row in rows) if rows else -1.0

    return max(choices, key=accuracy)


def name_of(choice: Choice) -> str:
    """What is not the default of its kind."""
    variant, kept = choice
    usual = asdict(Variant(variant.architecture))
    if variant.architecture == "inform":
        words = [f"InfoRM, beta {variant.beta:g}, warm-up {variant.kl_warmup_steps:g}"]
        del usual["beta"], usual["kl_warmup_steps"]
    else:
        words = ["standard"]
    words += [f"{key.replace('_', ' ')} {asdict(variant)[key]}" for key in usual if asdict(variant)[key] != usual[key]]
    return ", ".join(words) + (", early stopping" if kept == "best" else "")


def shown(values: list[float], sign: str = "") -> str:
    mean, low, _ = mean_and_interval(values)
    digits = 3 if abs(mean) < 1.5 else 2
    return f"{mean:{sign}.{digits}f} ± {mean - low:.{digits}f}"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    names = list(header)
    return [
        "| " + " | ".join(names) + " |",
        "|" + "---|" * len(names),
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def main_table(results: Results) -> list[str]:
    """Every setting at the default dials, the chosen ones marked; then differences to the best standard model."""
    dials = Dials()
    if not has_all(results, dials):
        return []
    kinds = {"standard": standard_candidates(), "InfoRM": inform_candidates()}
    best = {name: chosen(results, candidates, dials) for name, candidates in kinds.items()}
    variants = [*standard_candidates(), *inform_candidates(), Variant(beta=0.01, latent_dim=32)]
    lines, differences = [], []
    for variant in variants:
        for kept in ("end", "best"):
            choice = (variant, kept)
            rows = rows_of(results, choice, dials, REPORT_SEEDS)
            if not rows:
                continue
            mark = "**" if choice in best.values() else ""
            lines.append(
                [f"{mark}{name_of(choice)}{mark}", *(shown([f(row) for row in rows]) for f in MEASURES.values())]
            )
            if variant.architecture == "inform":
                differences.append(
                    [f"{mark}{name_of(choice)}{mark}", *against(results, choice, best["standard"], dials)]
                )
    words = ["## Default dials", "", "Bold: chosen on validation pairs of the selection seeds.", ""]
    words += table(["model", *MEASURES], lines)
    words += [f"Difference to the best standard model ({name_of(best['standard'])}):", ""]
    return words + table(["model", *MEASURES], differences)


def pairs_of(results: Results, one: Choice, other: Choice, dials: Dials, measure: str) -> list[float]:
    """Differences of a measure, one a reported seed."""
    rows = (rows_of(results, choice, dials, REPORT_SEEDS) for choice in (one, other))
    function = MEASURES[measure]
    return [function(a) - function(b) for a, b in zip(*rows, strict=True)]


def against(results: Results, one: Choice, other: Choice, dials: Dials) -> list[str]:
    return [
        "-" if measure == "flips learnt" and not dials.noise else
        shown(pairs_of(results, one, other, dials, measure), "+") for measure in MEASURES
    ]  # fmt: skip


def cell_name(dials: Dials) -> str:
    return f"{dials.pairs:,} pairs, {dials.noise:.0%} flipped, {dials.neutral} neutral words"


def rivals(results: Results, dials: Dials) -> tuple[Choice, dict[str, Choice]]:
    """The best standard model, and what is compared with it."""
    inform = chosen(results, inform_candidates(), dials)
    return chosen(results, standard_candidates(), dials), {"default": (DEFAULT, "end"), "chosen": inform}


def map_table(results: Results, cells: list[Dials]) -> list[str]:
    """Where InfoRM is ahead of the best standard model: by its intervals."""
    lines = []
    for dials in sorted(cells, key=lambda each: (each.neutral, each.pairs, each.noise)):
        standard, others = rivals(results, dials)
        accuracy = shown([row["accuracy"] for row in rows_of(results, standard, dials, REPORT_SEEDS)])
        for name, choice in others.items():
            own = shown([row["accuracy"] for row in rows_of(results, choice, dials, REPORT_SEEDS)])
            cells_of = []
            for measure in ("accuracy", "best of 1,024", "16", "peak", "end"):
                values = pairs_of(results, choice, standard, dials, measure)
                _, low, high = mean_and_interval(values)
                verdict = "ahead" if low > 0 else "behind" if high < 0 else "equal"
                cells_of.append(f"{shown(values, '+')} {verdict}")
            words = name_of(choice) + (" (default)" if name == "default" else " (chosen)")
            lines.append([cell_name(dials), f"{name_of(standard)}: {accuracy}", f"{words}: {own}", *cells_of])
    header = ["dials", "best standard: accuracy", "InfoRM: accuracy", "accuracy", "best of 1,024", "gold at 16 nats",
              "peak", "end"]  # fmt: skip
    return ["## Map", "", "Differences to the best standard model.", "", *table(header, lines)]


def bias_table(results: Results) -> list[str]:
    """What a word that only biased labels like is worth to each model, where a content word's worth of 1 is 1."""
    dials, lines = Dials(bias=0.7), []
    for variant in (*standard_candidates()[:3], *inform_candidates()):
        for kept in ("end", "best"):
            rows = rows_of(results, (variant, kept), dials, [*SELECTION_SEEDS, *REPORT_SEEDS])
            if rows:
                values = [[row[key] for row in rows] for key in ("accuracy", "neutral_effect", "bias_effect")]
                share = [row["policy"]["biased"][-1] for row in rows]
                lines.append([name_of((variant, kept)), *map(shown, (*values, share))])
    header = [
        "model",
        "accuracy",
        "neutral words, spread",
        "liked words (0.7 in the labels, gold 0)",
        "share at the end",
    ]
    return ["## Biased labels", "", *table(header, lines)] if lines else []


def rule_table(results: Results, cells: list[Dials]) -> list[str]:
    """Accuracy and peak of every InfoRM setting in every cell, on selection and on reported seeds."""
    lines = []
    for dials in [*cells, Dials(epochs=2), Dials(epochs=12)]:
        variants = inform_candidates() if dials in cells else sorted(
            {run[0] for run in runs_of("rule") if run[2] == dials}, key=lambda each: (each.beta, each.kl_warmup_steps)
        )  # fmt: skip
        for variant in variants:
            choice = (variant, "end")
            seeds = [*SELECTION_SEEDS, *REPORT_SEEDS]
            rows = rows_of(results, choice, dials, seeds)
            if rows:
                nats = statistics.mean(row["kl_nats"] for row in rows)
                peak, accuracy = (
                    statistics.mean(MEASURES[name](row) for row in rows) for name in ("peak", "accuracy")
                )
                lines.append([f"{cell_name(dials)}, {dials.epochs} passes", name_of(choice), f"{accuracy:.3f}",
                              f"{peak:.2f}", f"{nats:.2f}"])  # fmt: skip
    for variant in dict.fromkeys(run[0] for run in runs_of("rule") if run[2] == Dials()):
        rows = rows_of(results, (variant, "end"), Dials(), [*SELECTION_SEEDS, *REPORT_SEEDS])
        if rows:
            nats = statistics.mean(row["kl_nats"] for row in rows)
            peak, accuracy = (statistics.mean(MEASURES[name](row) for row in rows) for name in ("peak", "accuracy"))
            lines.append(
                [cell_name(Dials()), name_of((variant, "end")), f"{accuracy:.3f}", f"{peak:.2f}", f"{nats:.2f}"]
            )
    return ["## Settings", "", *table(["dials", "model", "accuracy", "peak", "nats"], lines)]


def head_table(results: Results) -> list[str]:
    """Training loss over that of the standard head, most and at the end; then accuracy and peak with noise."""
    free, lines = Dials(12000, noise=0.0, epochs=1), []
    base = rows_of(results, (Variant("standard"), "end"), free, SELECTION_SEEDS)
    if not base:
        return []
    standard = np.mean([row["losses"] for row in base], axis=0)
    for start in HEAD_STARTS:
        decoder = "linear" if start.startswith("linear") else "mlp"
        cells = [start]
        for warmup in (0.1, 0.25):
            variant = Variant(beta=0.001, kl_warmup_steps=warmup, start=start, decoder=decoder)
            rows = rows_of(results, (variant, "end"), free, SELECTION_SEEDS)
            if rows:
                losses = np.mean([row["losses"] for row in rows], axis=0)
                ratios = smooth(losses) / smooth(standard)
                cells += [f"{ratios.max() - 1:+.1%}", f"{ratios.mean() - 1:+.1%}", f"{ratios[-1] - 1:+.1%}",
                          f"{np.mean([row['accuracy'] for row in rows]):.3f}"]  # fmt: skip
            else:
                cells += ["-"] * 4
        for beta in (0.1, 0.03):
            variant = Variant(beta=beta, kl_warmup_steps=0.1, start=start, decoder=decoder)
            rows = rows_of(results, (variant, "end"), Dials(), SELECTION_SEEDS)
            cells += [f"{np.mean([f(row) for row in rows]):.3f}" if rows else "-" for f in
                      (MEASURES["accuracy"], MEASURES["peak"])]  # fmt: skip
        lines.append(cells)
    columns = ("most behind", "mean", "end", "accuracy")
    header = ["start", *(f"warm-up {w}: {what}" for w in (0.1, 0.25) for what in columns),
              *(f"25 % flips, beta {b}: {what}" for b in (0.1, 0.03) for what in ("accuracy", "peak"))]  # fmt: skip
    words = f"Standard head: {np.mean([row['accuracy'] for row in base]):.3f}; its losses by 50 steps: "
    return [
        "## Heads",
        "",
        words + json.dumps([round(float(x), 3) for x in smooth(standard)[::5]]),
        "",
        *table(header, lines),
    ]


def smooth(losses: Any, width: int = 5) -> Any:
    """Means of so many neighbours, ten steps each."""
    return np.convolve(losses, np.ones(width) / width, mode="valid")


def map_png(results: Results, cells: list[Dials]) -> bytes:
    """Differences to the best standard model by cell: gold of the optimised policy at its peak, and accuracy."""
    from matplotlib.figure import Figure

    from inform_rm.util.page import figure_png

    cells = sorted(cells, key=lambda each: (each.neutral != 232, each.neutral, each.pairs, each.noise), reverse=True)
    figure = Figure(figsize=(11.0, 1.6 + 0.42 * len(cells)), layout="constrained")
    axes_row = figure.subplots(1, 2, sharey=True)
    for axes, measure, title in zip(axes_row, ("peak", "accuracy"), ("gold at the peak", "accuracy"), strict=True):
        for offset, (name, marker, colour) in enumerate((("default", "o", "#0072B2"), ("chosen", "s", "#E69F00"))):
            for place, dials in enumerate(cells):
                standard, others = rivals(results, dials)
                mean, low, high = mean_and_interval(pairs_of(results, others[name], standard, dials, measure))
                axes.errorbar(mean, place + 0.2 * offset - 0.1, xerr=[[mean - low], [high - mean]], fmt=marker, ms=5,
                              color=colour, capsize=2, label=LABELS[name] if place == 0 else None)  # fmt: skip
        axes.axvline(0, color="0.4", linewidth=0.8)
        axes.set_xlabel(f"{title}: InfoRM minus the best standard model")
    axes_row[0].set_yticks(range(len(cells)), [cell_name(each) for each in cells])
    axes_row[0].legend(loc="lower right", fontsize=8)
    return figure_png(figure)


if __name__ == "__main__":
    main()
