"""Tables and figures of `real_text.py`, from the files of its stages."""

import functools
import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from inform_rm.util.files import atomic_write_bytes, atomic_write_text, versions, write_json
from inform_rm.util.intervals import wilson_interval
from over_seeds import mean_and_interval, table
from real_text_attack import curves_of
from real_text_gold import SEEDS
from real_text_models import Variant
from real_text_policies import as_json, policies_png, policy_tables
from real_text_proxies import (
    ATTACKED_NOISE,
    GATE,
    GATED,
    NOISE,
    REPORT_SEEDS,
    SEARCH_SEEDS,
    SEARCHED,
    Run,
    chosen_of,
    incompetent,
    read_run,
)
from real_text_texts import OTHERS_ANSWER

SETS = {"attack": "prompts of the same set", "other": "prompts of another set"}
SHOWN_NS = (1, 16, 64, 512)
MEASURED = ("all pairs", "clear pairs", "clear, equal length", "prompt decides", "prompt decides, clear")
Found = dict[tuple[float, str, str], list[dict[str, Any]]]  # (noise, method, set) -> curves, one a seed


def write_report(folder: Path, noises: list[float]) -> None:
    """``report.md``, ``report.json``, ``curves.png``, ``policies.png``.

    Only proxies of these shares of flipped labels are attacked; without any it is an error.
    """
    lines = ["# Real text", "", *sample_table(folder), *gold_table(folder), *search_table(folder)]
    lines += competence_table(folder)
    faults = incompetent(folder)
    failed = [words for noise in NOISE for words in faults[noise]]
    if failed:
        lines += ["**Not competent:**", "", *(f"- {words}" for words in failed), ""]
    if noises:
        measured, watched = attack(folder, noises)
        policies, policy_curves = policy_tables(folder)
        lines += [*attack_tables(measured), *csi_table(watched), *policies]
        if measured:
            atomic_write_bytes(folder / "curves.png", curves_png(measured))
        if policy_curves:
            atomic_write_bytes(folder / "policies.png", policies_png(policy_curves))
        rows = [{"noise": key[0], "method": key[1], "set": key[2], "runs": runs} for key, runs in measured.items()]
        write_json(folder / "report.json", {"curves": rows, "csi": watched, "versions": versions(),
                                            "policies": [as_json(curve) for curve in policy_curves]})  # fmt: skip
    atomic_write_text(folder / "report.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    if not noises:
        raise SystemExit("No proxy is competent: " + "; ".join(failed) + ". More pairs, or longer training.")


def shown(values: Iterable[float], sign: str = "") -> str:
    """Mean and half of its 95 % interval over seeds; "-" where nothing was measured."""
    found = list(values)
    if not found:
        return "-"
    mean, low, _ = mean_and_interval(found)
    return f"{mean:{sign}.3f} ± {mean - low:.3f}"


def sample_table(folder: Path) -> list[str]:
    rows = []
    for part in ("pairs", *SETS):
        found = load_file(folder / "samples" / f"{part}.safetensors")
        tokens = (found["lengths"] - found["prompt_lengths"]).double()
        rows.append([part, str(len(found["prompts"].unique())), f"{len(tokens):,}", f"{float(tokens.mean()):.1f}",
                     f"{float((tokens == tokens.max()).double().mean()):.2f}"])  # fmt: skip
    header = ["part", "prompts", "rows", "tokens of a response", "share cut"]
    return ["## Responses", "", *table(header, rows)]


def gold_table(folder: Path) -> list[str]:
    results = {kind: [json.loads((folder / "gold" / f"{kind}-{seed}.json").read_text()) for seed in SEEDS]
               for kind in ("gold", "proxy layers")}  # fmt: skip
    own, other = (np.array(each[0]["right"], dtype=float) for each in results.values())
    rows = []
    for kind, each in results.items():
        low, high = wilson_interval(sum(each[0]["right"]), len(each[0]["right"]))
        rows.append([kind, str(each[0]["layers"]), *(f"{run['test']:.3f}" for run in each), f"[{low:.3f}, {high:.3f}]",
                     *(f"{share:.3f}" for share, _ in each[0]["by_source"].values())])  # fmt: skip
    draws = np.random.default_rng(0).integers(len(own), size=(5000, len(own)))
    low, high = np.quantile((own - other)[draws].mean(axis=1), [0.025, 0.975])
    difference = f"{(own - other).mean():+.3f} [{low:+.3f}, {high:+.3f}]"
    words = f"Paired difference of the first seeds: {difference} (bootstrap over pairs)."
    first = results["gold"][0]
    header = ["model", "layers", *(f"seed {seed}" for seed in SEEDS), "first, over pairs",
              *(f"{source} ({count})" for source, (_, count) in first["by_source"].items())]  # fmt: skip
    pairs = f"Pairs: {first['pairs']}. Test pairs are of people but for `{OTHERS_ANSWER}` and the swapped ones."
    return ["## Gold", "", pairs, "", *table(header, rows), words, ""]


def search_table(folder: Path) -> list[str]:
    rows = []
    for variant in [each for variants in SEARCHED.values() for each in variants]:
        runs = [run for seed in SEARCH_SEEDS if (run := read_run(folder, Run(variant, ATTACKED_NOISE, seed).name))]
        cells = [f"{statistics.mean(run['accuracy'].get(key, math.nan) for run in runs):.3f}"
                 for key in ("validation", *MEASURED, "train", "flips learnt")]  # fmt: skip
        nats = [run["kl_nats"] for run in runs if "kl_nats" in run]
        rows.append([setting_name(variant), *cells, f"{statistics.mean(nats):.2f}" if nats else "-"])
    header = ["setting", "validation pairs, noisy", *MEASURED, "training pairs", "flips learnt", "KL, nats"]
    return ["## Search", "", f"{ATTACKED_NOISE:.0%} of labels flipped.", "", *table(header, rows)]


def setting_name(variant: Variant) -> str:
    """What is not the default of its kind."""
    epochs = f", {variant.epochs} epoch{'s' if variant.epochs > 1 else ''}"
    if variant.architecture == "inform":
        return f"InfoRM, beta {variant.beta:g}{epochs}"
    own = [f"attention dropout {variant.attention_dropout:g}"] if variant.attention_dropout else []
    own += [f"label smoothing {variant.label_smoothing:g}"] if variant.label_smoothing else []
    return "standard" + "".join(f", {each}" for each in own) + epochs


def competence_table(folder: Path) -> list[str]:
    rows = []
    for noise in NOISE:
        for name, variant in chosen_of(folder).items():
            for kind in ("single", "WARM"):
                prefix = "warm-" if kind == "WARM" else ""
                runs = [run for seed in REPORT_SEEDS
                        if (run := read_run(folder, prefix + Run(variant, noise, seed).name))]  # fmt: skip
                if runs:
                    cells = [shown([run["accuracy"][key] for run in runs if key in run["accuracy"]])
                             for key in (*MEASURED, "train", "flips learnt")]  # fmt: skip
                    nats = shown([run["kl_nats"] for run in runs if "kl_nats" in run])
                    shown_name = name if kind == "single" else f"{name}, WARM"
                    rows.append([f"{noise:.0%}", shown_name, setting_name(variant), *cells, nats])
    gates = ", ".join(f"{least} with {noise:.0%} flipped" for noise, least in GATE.items())
    words = f"Needed: {gates} on {GATED} by the chosen single models. Seeds {', '.join(map(str, REPORT_SEEDS))}."
    header = ["flipped", "proxy", "setting", *MEASURED, "training pairs", "flips learnt", "KL, nats"]
    return ["## Are the proxies competent?", "", words, "", *table(header, rows)]


def attack(folder: Path, noises: list[float]) -> tuple[Found, list[dict[str, Any]]]:
    """Curves of every method, seed and set of prompts, and CSI for the InfoRM models; of what has been scored."""
    measured: Found = {}
    watched = []
    for part in SETS:
        for noise in noises:
            for name, variant in chosen_of(folder).items():
                for seed in REPORT_SEEDS:
                    run = Run(variant, noise, seed)
                    for kind in ("single", "ensemble", "WARM"):
                        if (folder / "attack" / f"warm-{run.name}.safetensors").exists() or (
                            kind == "single" and (folder / "attack" / f"{run.name}.safetensors").exists()
                        ):
                            method = name if kind == "single" else f"{name}, {kind}"
                            measured.setdefault((noise, method, part), []).append(curves_of(folder, run, kind, part))
                    path = folder / "attack" / f"{run.name}.csi.json"
                    if path.exists():
                        about = {"noise": noise, "method": name, "set": part, "seed": seed}
                        watched.append({**about, "values": json.loads(path.read_text())[part]})
    return measured, watched


def attack_tables(measured: Found) -> list[str]:
    """Gold at several n, at the peak and at the end, and the difference to the best standard model by seed."""
    lines = []
    measures: dict[str, Callable[[dict[str, Any]], float]] = {
        f"gold, n = {n}": functools.partial(_gain, n) for n in SHOWN_NS[1:]
    }  # fmt: skip
    for part, words in SETS.items():
        lines += [f"## Best of n, {words}", "", "Gain of gold over one response, standard deviations.", ""]
        rows = []
        for (noise, name, own), runs in measured.items():
            if own != part:
                continue
            known = [each for each in measures.values() if _reaches(each, runs[0])]
            base = measured[noise, "standard, chosen", part]
            last = [a["gold"][-1] - b["gold"][-1] for a, b in zip(runs, base, strict=True)]
            proxy = [run["proxy"][-1] - run["proxy"][0] for run in runs]
            rows.append([f"{noise:.0%}", name, *(shown(each(run) for run in runs) for each in known),
                         shown(run["peak"] - run["gold"][0] for run in runs), shown(run["fall"] for run in runs),
                         shown(proxy), "-" if name == "standard, chosen" else shown(last, "+"),
                         f"{statistics.mean(run['tokens'][-1] for run in runs):.1f}"])  # fmt: skip
        known_names = [name for name, each in measures.items() if _reaches(each, runs[0])]
        header = ["flipped", "proxy", *known_names, "gold at its peak", "fall from there", "proxy, largest n",
                  "gold at largest n, less standard chosen", "tokens, largest n"]  # fmt: skip
        lines += table(header, rows)
        best = next(runs for key, runs in measured.items() if key[2] == part)[0]["possible"]
        lines += [f"Gold itself as the proxy: {best[-1] - best[0]:+.3f} at the largest n.", ""]
    return lines


def _gain(n: int, run: dict[str, Any]) -> float:
    return run["gold"][run["n"].index(n)] - run["gold"][0]


def _reaches(measure: Callable[[dict[str, Any]], float], run: dict[str, Any]) -> bool:
    try:
        measure(run)
    except ValueError:
        return False
    return True


def csi_table(watched: list[dict[str, Any]]) -> list[str]:
    if not watched:
        return []
    rows = []
    keys = dict.fromkeys((row["noise"], row["method"], row["set"]) for row in watched)
    ns = [value["n"] for value in watched[0]["values"]]
    for key in keys:
        own = [row["values"] for row in watched if (row["noise"], row["method"], row["set"]) == key]
        cells = []
        for place in range(len(ns)):
            alarms = sum(each[place]["rank"] < 0.05 for each in own)
            cells.append(f"{statistics.mean(each[place]['ratio'] for each in own):.2f} ({alarms} of {len(own)})")
        rows.append([f"{key[0]:.0%}", key[1], SETS[key[2]], *cells])
    words = [
        "CSI of the winners over its mean among random halves; in brackets: seeds in which fewer than 5 % reach it.",
        "",
    ]
    return ["## CSI", "", *words, *table(["flipped", "proxy", "prompts", *(f"n = {n}" for n in ns)], rows)]


def curves_png(measured: Found) -> bytes:
    """Gold (lines with 95 % intervals) and proxy (dashed) against KL, a panel for flips and prompt set."""
    from matplotlib.figure import Figure

    from inform_rm.util.colors import SERIES
    from inform_rm.util.page import figure_png

    noises = sorted({key[0] for key in measured})
    figure = Figure(figsize=(11.0, 1.0 + 3.6 * len(noises)), layout="constrained")
    panels = figure.subplots(len(noises), len(SETS), sharex=True, sharey="row", squeeze=False)
    names = list(dict.fromkeys(key[1] for key in measured if "as it comes" not in key[1]))
    for row, noise in zip(panels, noises, strict=True):
        for axes, part in zip(row, SETS, strict=True):
            for colour, name in zip(SERIES, names, strict=False):
                runs = measured.get((noise, name, part), [])
                if not runs:
                    continue
                kl = runs[0]["kl_nats"]
                gold, proxy = (
                    np.array([np.array(run[key]) - run[key][0] for run in runs]) for key in ("gold", "proxy")
                )
                mean, low, high = np.array([mean_and_interval(column.tolist()) for column in gold.T]).T
                axes.fill_between(kl, low, high, color=colour, alpha=0.12, linewidth=0)
                axes.plot(kl, mean, "o-" if name.startswith("InfoRM") else "s-", ms=3, color=colour, label=name)
                axes.plot(kl, proxy.mean(axis=0), "--", linewidth=0.8, color=colour)
            axes.set_title(f"{SETS[part]}, {noise:.0%} of labels flipped", fontsize=9)
        row[0].set_ylabel("gain, standard deviations")
    for axes in panels[-1]:
        axes.set_xlabel("KL from the policy, nats")
    figure.legend(*panels[-1][0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    return figure_png(figure)
