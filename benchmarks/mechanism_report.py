"""Tables and figures of the results of `mechanism.py`.

    python benchmarks/mechanism_report.py --output runs/mechanism

Settings are chosen by the accuracy on 200 noisy validation pairs a seed, pooled over the selection seeds, from equally
many settings of each kind, each at the last and at the best epoch; figures are of the other seeds, with 95 % intervals
over seeds (Student's t); differences are paired by seed. Writes ``report.md`` and ``map.png``.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterable
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
    chosen,
    few_candidates,
    few_cells,
    inform_candidates,
    key_of,
    read_results,
    rows_of,
    runs_of,
    standard_candidates,
)
from mechanism_models import KL_GRID, Variant
from mechanism_world import Dials
from prioritized import mean_and_interval

DEFAULT = Variant(kl_warmup_steps=0.1)  # the package's: beta 0.1, K 128
FORMER = Variant(kl_warmup_steps=0.1, start=HEAD_STARTS[0])
LABELS = {"default": "InfoRM, beta 0.1, warm-up 0.1, as it comes", "former": "beta 0.1, warm-up 0.1, former head",
          "chosen": "InfoRM, chosen on validation pairs"}  # fmt: skip
STYLES = {"default": ("o", "#0072B2"), "former": ("^", "#009E73"), "chosen": ("s", "#E69F00")}
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
    cells = dict.fromkeys(run[2] for part in ("table", "map", "new head") for run in runs_of(part))
    complete = [cell for cell in cells if chosen(results, standard_candidates(), cell) and rivals(results, cell)[1]]
    lines = [
        f"{len(results)} runs; selection seeds {list(SELECTION_SEEDS)}, reported seeds {list(REPORT_SEEDS)}.", "",
        *main_table(results), *map_table(results, complete), *bias_table(results), *rule_table(results, complete),
        *head_table(results),
    ]  # fmt: skip
    (output / "report.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))
    if complete:
        (output / "map.png").write_bytes(map_png(results, complete))


def seeds_of(results: Results, choice: Choice, dials: Dials) -> list[int]:
    """Reported seeds with this choice."""
    return [seed for seed in REPORT_SEEDS if key_of(choice[0], seed, dials) in results]


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
    standard, inform = (chosen(results, each, dials) for each in (standard_candidates(), inform_candidates()))
    if standard is None:
        return []
    variants = [*standard_candidates(), *inform_candidates(),
                Variant(beta=0.01, latent_dim=32, start=HEAD_STARTS[0]), DEFAULT]  # fmt: skip
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
    return f"{dials.pairs:,} pairs, {dials.noise:.0%} flipped, {dials.neutral} neutral words"


def rivals(results: Results, dials: Dials) -> tuple[Choice, dict[str, Choice]]:
    """The best standard model, and what is compared with it."""
    standard = chosen(results, standard_candidates(), dials)
    inform = chosen(results, inform_candidates(), dials)
    others = {"default": (DEFAULT, "end"), "former": (FORMER, "end")} | ({} if inform is None else {"chosen": inform})
    ran = {name: each for name, each in others.items() if len(seeds_of(results, each, dials)) > 1}
    return standard or (Variant("standard"), "end"), ran


def map_table(results: Results, cells: list[Dials]) -> list[str]:
    """Where InfoRM is ahead of the best standard model: by its intervals."""
    lines = []
    for dials in sorted(cells, key=lambda each: (each.neutral, each.pairs, each.noise)):
        standard, others = rivals(results, dials)
        for name, choice in others.items():
            seeds = seeds_of(results, choice, dials)
            accuracies = [
                shown([row["accuracy"] for row in rows_of(results, each, dials, seeds)]) for each in (standard, choice)
            ]
            cells_of = []
            for measure in ("accuracy", "best of 1,024", "16", "32", "peak", "end"):
                values = differences_of(results, choice, standard, dials, measure)
                _, low, high = mean_and_interval(values)
                verdict = "ahead" if low > 0 else "behind" if high < 0 else "equal"
                cells_of.append(f"{shown(values, '+')} {verdict}")
            words = name_of(choice) + (" (chosen)" if name == "chosen" else "")
            lines.append([cell_name(dials), str(len(seeds)), f"{name_of(standard)}: {accuracies[0]}",
                          f"{words}: {accuracies[1]}", *cells_of])  # fmt: skip
    header = ["dials", "seeds", "best standard: accuracy", "InfoRM: accuracy", "accuracy", "best of 1,024",
              "gold at 16 nats", "at 32", "peak", "end"]  # fmt: skip
    return ["## Map", "", "Differences to the best standard model.", "", *table(header, lines)]


def bias_table(results: Results) -> list[str]:
    """What a word that only biased labels like is worth to each model, where a content word's worth of 1 is 1."""
    dials, lines = Dials(bias=0.7), []
    for variant in (*standard_candidates(), DEFAULT):
        for kept in ("end", "best"):
            rows = rows_of(results, (variant, kept), dials, seeds_of(results, (variant, kept), dials))
            if rows:
                values = [[row[key] for row in rows] for key in ("accuracy", "neutral_effect", "bias_effect")]
                lines.append([name_of((variant, kept)), str(len(rows)), *map(shown, values)])
    header = ["model", "seeds", "accuracy", "neutral words, spread", "liked words (0.7 in the labels, gold 0)"]
    return ["## Biased labels", "", *table(header, lines)] if lines else []


def rule_table(results: Results, cells: list[Dials]) -> list[str]:
    """Every InfoRM setting in every cell, selection seeds beside reported ones, and what it carries in nats."""
    lines = []
    for dials in [*cells, Dials(epochs=2), Dials(epochs=12)]:
        variants = dict.fromkeys([
            *inform_candidates(), DEFAULT, *(run[0] for run in runs_of("rule") if run[2] == dials)
        ])  # fmt: skip
        for variant in variants:
            parts = [rows_of(results, (variant, "end"), dials, seeds) for seeds in (SELECTION_SEEDS, REPORT_SEEDS)]
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


def map_png(results: Results, cells: list[Dials]) -> bytes:
    """Differences to the best standard model by cell: gold of the optimised policy at its peak, and accuracy."""
    from matplotlib.figure import Figure

    from inform_rm.util.page import figure_png

    cells = sorted(cells, key=lambda each: (each.neutral != 232, each.neutral, each.pairs, each.noise), reverse=True)
    figure = Figure(figsize=(11.0, 1.6 + 0.42 * len(cells)), layout="constrained")
    axes_row = figure.subplots(1, 2, sharey=True)
    for axes, measure, title in zip(axes_row, ("peak", "accuracy"), ("gold at the peak", "accuracy"), strict=True):
        for offset, (name, (marker, colour)) in enumerate(STYLES.items()):
            label: str | None = LABELS[name]
            for place, dials in enumerate(cells):
                standard, others = rivals(results, dials)
                if name not in others:
                    continue
                mean, low, high = mean_and_interval(differences_of(results, others[name], standard, dials, measure))
                axes.errorbar(mean, place + 0.22 * (1 - offset), xerr=[[mean - low], [high - mean]], fmt=marker, ms=5,
                              color=colour, capsize=2, label=label)  # fmt: skip
                label = None
        axes.axvline(0, color="0.4", linewidth=0.8)
        axes.set_xlabel(f"{title}: InfoRM minus the best standard model")
        axes.locator_params(axis="x", nbins=6)
        axes.set_ylim(-0.6, len(cells) - 0.4)
    axes_row[0].set_yticks(range(len(cells)), [cell_name(each) for each in cells])
    figure.legend(*axes_row[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    return figure_png(figure)


if __name__ == "__main__":
    main()
