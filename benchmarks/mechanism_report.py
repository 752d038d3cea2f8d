"""Tables and figures of the results of `mechanism.py`.

    python benchmarks/mechanism_report.py --output runs/mechanism

Settings are chosen by the accuracy on 200 noisy validation pairs a seed, pooled over the selection seeds, from equally
many settings of each kind, each at the last and at the best epoch; figures are of the other seeds, with 95 % intervals
over seeds (Student's t); differences are paired by seed. Writes ``report.md`` and ``map.png``.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mechanism import (
    HEAD_STARTS,
    NEW_START,
    REPORT_SEEDS,
    SELECTION_SEEDS,
    Choice,
    Results,
    carried,
    cells,
    chosen,
    inform_candidates,
    key_of,
    read_results,
    rows_of,
    runs_of,
    standard_candidates,
)
from mechanism_models import KL_GRID, Variant
from mechanism_world import Dials
from over_seeds import mean_and_interval, table

DEFAULT = Variant(kl_warmup_steps=0.1)  # the package's: beta 0.1, K 128
LABELS = {"default": "InfoRM as it comes: beta 0.1, warm-up 0.1", "rule": "InfoRM, beta 0.01 by the rule for flips"}
STYLES = {"default": ("o", "#0072B2"), "rule": ("s", "#E69F00")}
COLLAPSED = 0.6  # accuracy of a model whose latents are all but empty, where a standard model has 0.65 and more
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
    results = read_results(output)
    lines = [
        f"{len(results)} runs; selection seeds {list(SELECTION_SEEDS)}, reported seeds {list(REPORT_SEEDS)}.", "",
        *map_table(results), *bias_table(results), *main_table(results), *rule_table(results), *head_table(results),
    ]  # fmt: skip
    (output / "report.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))
    if compared(results):
        (output / "map.png").write_bytes(map_png(results))


def seeds_of(results: Results, choice: Choice, dials: Dials) -> list[int]:
    """Reported seeds with this choice, attacked."""
    rows = {seed: results.get(key_of(choice[0], seed, dials), {}).get(choice[1], {}) for seed in REPORT_SEEDS}
    return [seed for seed, row in rows.items() if "policy" in row]


def name_of(choice: Choice) -> str:
    """What is not the default of its kind."""
    variant, kept = choice
    usual = asdict(Variant(variant.architecture))
    if variant.architecture == "inform":
        words = [f"InfoRM, beta {variant.beta:g}, warm-up {variant.kl_warmup_steps:g}"]
        del usual["beta"], usual["kl_warmup_steps"]
    else:
        words = ["standard"]
    if variant.architecture == "inform":
        del usual["start"]
        words += ["former head"] if variant.start == HEAD_STARTS[0] else []
    words += [f"{key.replace('_', ' ')} {asdict(variant)[key]}" for key in usual if asdict(variant)[key] != usual[key]]
    return ", ".join(words) + (", early stopping" if kept == "best" else "")


def shown(values: list[float], sign: str = "") -> str:
    mean, low, _ = mean_and_interval(values)
    digits = 3 if abs(mean) < 1.5 else 2
    return f"{mean:{sign}.{digits}f} ± {mean - low:.{digits}f}"


def main_table(results: Results) -> list[str]:
    """Every setting at the default dials, the chosen ones marked; then differences to the best standard model."""
    dials = Dials()
    standard, inform = (chosen(results, each, dials) for each in (standard_candidates(), inform_candidates()))
    if standard is None:
        return []
    variants = [*standard_candidates(), *inform_candidates()]
    lines, differences = [], []
    for choice in [(variant, kept) for variant in variants for kept in ("end", "best")]:
        rows = rows_of(results, choice, dials, REPORT_SEEDS)
        if not rows:
            continue
        mark = "**" if choice in (standard, inform) else ""
        collapsed = sum(row["accuracy"] < COLLAPSED for row in rows)
        name = f"{mark}{name_of(choice)}{mark}"
        lines.append(
            [name, *(shown([f(row) for row in rows]) for f in MEASURES.values()), f"{collapsed} of {len(rows)}"]
        )
        if choice[0].architecture == "inform":
            differences.append(
                [name, *(shown(differences_of(results, choice, standard, dials, each), "+") for each in MEASURES)]
            )
    words = ["## Default dials", "", "Bold: chosen on validation pairs of the selection seeds.", ""]
    words += table(["model", *MEASURES, f"accuracy below {COLLAPSED}"], lines)
    words += [f"Difference to the best standard model ({name_of(standard)}):", ""]
    return words + table(["model", *MEASURES], differences)


def differences_of(results: Results, one: Choice, other: Choice, dials: Dials, measure: str) -> list[float]:
    """Differences of a measure, one a reported seed that both have."""
    seeds = [seed for seed in seeds_of(results, one, dials) if seed in seeds_of(results, other, dials)]
    rows = (rows_of(results, choice, dials, seeds) for choice in (one, other))
    return [MEASURES[measure](a) - MEASURES[measure](b) for a, b in zip(*rows, strict=True)]


def cell_name(dials: Dials) -> str:
    biased = f", labels like four words by {dials.bias:g}" if dials.bias else ""
    return f"{dials.pairs:,} pairs, {dials.noise:.0%} flipped, {dials.neutral} neutral words{biased}"


def compared(results: Results) -> list[tuple[Dials, str]]:
    """Cells and names of `carried` settings of InfoRM that at least two seeds compare with the standard model."""
    return [
        (dials, name) for dials in cells() for name in carried(dials)
        if name != "standard" and len(common_seeds(results, dials, name)) > 1
    ]  # fmt: skip


def common_seeds(results: Results, dials: Dials, name: str) -> list[int]:
    """Reported seeds that both the standard model and the named one have."""
    own, standard = (carried(dials)[each] for each in (name, "standard"))
    return [seed for seed in seeds_of(results, own, dials) if seed in seeds_of(results, standard, dials)]


def map_table(results: Results) -> list[str]:
    """Where InfoRM is ahead of the regularised standard model: by its intervals."""
    lines = []
    for dials, name in compared(results):
        choice, standard = carried(dials)[name], carried(dials)["standard"]
        seeds = common_seeds(results, dials, name)
        accuracies = [
            shown([row["accuracy"] for row in rows_of(results, each, dials, seeds)]) for each in (standard, choice)
        ]
        peak = shown([row["policy"]["peak"] for row in rows_of(results, standard, dials, seeds)])
        differences = []
        for measure in ("best of 1,024", "16", "32", "peak", "end"):
            values = differences_of(results, choice, standard, dials, measure)
            _, low, high = mean_and_interval(values)
            verdict = "ahead" if low > 0 else "behind" if high < 0 else "equal"
            differences.append(f"{shown(values, '+')} {verdict}")
        lines.append([cell_name(dials), str(len(seeds)), *accuracies, peak, name_of(choice), *differences])
    header = ["dials", "seeds", "accuracy: standard", "InfoRM", "standard: gold at the peak", "InfoRM less standard",
              "best of 1,024", "gold at 16 nats", "at 32", "peak", "end"]  # fmt: skip
    return ["## Map", "", *table(header, lines)]


def bias_table(results: Results) -> list[str]:
    """What a word that only biased labels like is worth to each model, where a content word's worth of 1 is 1."""
    dials, lines = Dials(bias=0.7), []
    for choice in carried(dials).values():
        rows = [row for seed in REPORT_SEEDS for row in rows_of(results, choice, dials, [seed])]
        if rows:
            values = [[row[key] for row in rows] for key in ("accuracy", "neutral_effect", "bias_effect")]
            lines.append([name_of(choice), str(len(rows)), *map(shown, values)])
    header = ["model", "seeds", "accuracy", "neutral words, spread", "liked words (0.7 in the labels, gold 0)"]
    return ["## Biased labels", "", *table(header, lines)] if lines else []


def rule_table(results: Results) -> list[str]:
    """Every InfoRM setting in every cell, selection seeds beside reported ones, and what it carries in nats."""
    lines = []
    for dials in [*cells(), Dials(epochs=2), Dials(epochs=12)]:
        variants = dict.fromkeys([
            *inform_candidates(), *(run[0] for run in runs_of("rule") if run[2] == dials)
        ])  # fmt: skip
        for variant in variants:
            choice = variant, "end"
            reported = seeds_of(results, choice, dials)
            parts = [rows_of(results, choice, dials, seeds) for seeds in (SELECTION_SEEDS, reported)]
            if not any(parts):
                continue
            cell = [f"{cell_name(dials)}, {dials.epochs} passes", name_of((variant, "end"))]
            for rows in parts:
                for measure in ("accuracy", "peak"):
                    mean = statistics.mean(MEASURES[measure](row) for row in rows) if rows else None
                    cell.append("-" if mean is None else f"{mean:.3g}")
            every = [row for rows in parts for row in rows]
            collapsed = sum(row["accuracy"] < COLLAPSED for row in every)
            nats, bound = statistics.mean(row["kl_nats"] for row in every), budget(dials.noise, variant.beta)
            lines.append([*cell, f"{nats:.2f} of {bound:.2f}", f"{collapsed} of {len(every)}"])
    header = ["dials", "model", "accuracy, selection seeds", "peak", "accuracy, reported seeds", "peak",
              "nats of those paid for", f"accuracy below {COLLAPSED}"]  # fmt: skip
    return ["## Settings", "", *table(header, lines)]


def budget(noise: float, beta: float) -> float:
    """Most nats of a response that its pair pays for: ``(ln 2 - H(p)) / (2 beta)``."""
    entropy = -sum(p * math.log(p) for p in (noise, 1 - noise) if p)
    return (math.log(2) - entropy) / (2 * beta)


def head_table(results: Results) -> list[str]:
    """Training loss over that of the standard head by phases of the KL weight; then accuracy and peak with noise."""
    free, lines = Dials(12000, noise=0.0, epochs=1), []
    base = rows_of(results, (Variant("standard"), "end"), free, SELECTION_SEEDS)
    if not base:
        return []
    standard = np.mean([row["losses"] for row in base], axis=0)
    phases = {
        "0 to 30": (0, 3),
        "30 to 60": (3, 6),
        "60 to 90": (6, 9),
        "100 to 190": (10, 19),
        "190 to 375": (19, 38),
    }
    for start, beta in [*((each, 0.001) for each in HEAD_STARTS), (NEW_START, 0.0)]:
        decoder = "linear" if start.startswith("linear") else "mlp"
        cells = [start if beta else f"{start}, beta 0"]
        variant = Variant(beta=beta, kl_warmup_steps=0.25, start=start, decoder=decoder)
        rows = rows_of(results, (variant, "end"), free, SELECTION_SEEDS)
        if not rows:
            continue
        losses = np.mean([row["losses"] for row in rows], axis=0)
        cells += [f"{losses[low:high].mean() / standard[low:high].mean() - 1:+.1%}" for low, high in phases.values()]
        cells.append(f"{np.mean([row['accuracy'] for row in rows]):.3f}")
        variant = Variant(kl_warmup_steps=0.1, start=start, decoder=decoder)
        rows = rows_of(results, (variant, "end"), Dials(), SELECTION_SEEDS)
        cells += [", ".join(f"{f(row):.2f}" for row in rows) for f in (MEASURES["accuracy"], MEASURES["peak"])]
        lines.append(cells)
    header = ["start", *(f"steps {name}" for name in phases), "accuracy", "25 % flips, beta 0.1: accuracy", "peak"]
    words = f"Accuracy of the standard head: {np.mean([row['accuracy'] for row in base]):.3f}."
    return ["## Heads", "", words, "", *table(header, lines)]


def map_png(results: Results) -> bytes:
    """InfoRM less standard by cell: gold of the optimised policy at its peak, at its end, and accuracy."""
    from matplotlib.figure import Figure

    from inform_rm.util.page import figure_png

    places = compared(results)[::-1]
    figure = Figure(figsize=(11.0, 1.6 + 0.42 * len(places)), layout="constrained")
    axes_row = figure.subplots(1, 3, sharey=True)
    titles = {"peak": "gold at the peak", "end": "gold at the end", "accuracy": "accuracy"}
    for axes, (measure, title) in zip(axes_row, titles.items(), strict=True):
        seen = set()
        for place, (dials, name) in enumerate(places):
            marker, colour = STYLES[name]
            values = differences_of(results, carried(dials)[name], carried(dials)["standard"], dials, measure)
            mean, low, high = mean_and_interval(values)
            label = {} if name in seen else {"label": LABELS[name]}
            seen.add(name)
            axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt=marker, ms=5, color=colour, capsize=2,
                          **label)  # fmt: skip
        axes.axvline(0, color="0.4", linewidth=0.8)
        axes.set_xlabel(title)
        axes.locator_params(axis="x", nbins=6)
        axes.set_ylim(-0.6, len(places) - 0.4)
    axes_row[0].set_yticks(range(len(places)), [cell_name(dials) for dials, _ in places])
    figure.supxlabel("InfoRM minus the regularised standard model", fontsize=10)
    figure.legend(*axes_row[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)
    return figure_png(figure)


if __name__ == "__main__":
    main()
