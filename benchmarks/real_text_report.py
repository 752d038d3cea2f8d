"""Tables and figure of `real_text.py`, from the files of its stages."""

import functools
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from inform_rm.util.files import atomic_write_bytes, atomic_write_text, versions, write_json
from over_seeds import mean_and_interval, table
from real_text_attack import curves, rewards_of_run, watch
from real_text_gold import gold_rewards
from real_text_models import Variant
from real_text_policies import as_json, policies_png, policy_tables
from real_text_proxies import (
    GATE,
    GATED,
    NOISE,
    REPORT_SEEDS,
    Run,
    incompetent,
    methods_of,
    read_run,
)
from real_text_samples import OTHERS_ANSWER, jsonl

SETS = {"attack": "prompts of the same set", "other": "prompts of another set"}
SHOWN_NS = (1, 16, 64, 512)
MEASURED = ("all pairs", "clear pairs", "clear, equal length", "prompt decides", "prompt decides, clear")
Found = dict[tuple[float, str, str], list[dict[str, Any]]]  # (noise, method, set) -> curves, one a seed


def write_report(folder: Path, model_folder: Path, noises: list[float]) -> None:
    """``report.md``, ``report.json``, ``curves.png``, ``policies.png``.

    Only proxies of these shares of flipped labels are attacked; without any it is an error.
    """
    lines = [
        "# Real text",
        "",
        *sample_table(folder),
        *gold_table(folder),
        *competence_table(folder),
    ]
    faults = incompetent(folder)
    failed = [words for noise in NOISE for words in faults[noise]]
    if failed:
        lines += ["**Not competent:**", "", *(f"- {words}" for words in failed), ""]
    if noises:
        measured, watched = attack(folder, noises)
        policies, policy_curves = policy_tables(folder, model_folder)
        lines += [*attack_tables(measured), *csi_table(watched), *policies]
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
    for part in ("pairs", "attack", "other"):
        lines = [line for path in sorted((folder / "samples" / part).glob("*.jsonl")) for line in jsonl(path)]
        texts = {(line["prompt_number"], line["response"]) for line in lines}
        prompts = len({line["prompt_number"] for line in lines})
        rows.append([part, str(prompts), f"{len(lines):,}", f"{len(texts) / len(lines):.3f}",
                     f"{statistics.mean(line['tokens'] for line in lines):.1f}",
                     f"{statistics.mean(line['cut'] for line in lines):.2f}"])  # fmt: skip
    return [
        "## Responses",
        "",
        *table(["part", "prompts", "responses", "share that is distinct", "tokens", "share cut"], rows),
    ]


def gold_table(folder: Path) -> list[str]:
    result = json.loads((folder / "gold" / "result.json").read_text())
    own, other = (np.array(result[name]["right"], dtype=float) for name in ("gold", "proxy layers"))
    rows = []
    for name in ("gold", "proxy layers"):
        each = result[name]
        low, high = each["interval_of_first"]
        rows.append([name, shown(each["test"]), f"{each['test'][0]:.3f} [{low:.3f}, {high:.3f}]",
                     *(shown(values) for values in each["by_source"].values())])  # fmt: skip
    draws = np.random.default_rng(0).integers(len(own), size=(5000, len(own)))
    low, high = np.quantile((own - other)[draws].mean(axis=1), [0.025, 0.975])
    difference = f"{(own - other).mean():+.3f} [{low:+.3f}, {high:+.3f}]"
    words = f"Paired difference of the first seeds: {difference} (bootstrap over pairs)."
    header = ["layers", "held-out human pairs, over seeds", "the first seed, over pairs", *result["gold"]["by_source"]]
    pairs = f"Pairs: {result['pairs']}. Test pairs are of people but for `{OTHERS_ANSWER}`."
    return ["## Gold", "", pairs, "", *table(header, rows), words, ""]


def setting_name(variant: Variant) -> str:
    """What is not the default of its kind."""
    if variant.architecture == "inform":
        return f"InfoRM, beta {variant.beta:g}, warm-up {variant.kl_warmup_steps:g}, K {variant.latent_dim}"
    own = [f"weight decay {variant.weight_decay:g}"] if variant.weight_decay else []
    own += [f"label smoothing {variant.label_smoothing:g}"] if variant.label_smoothing else []
    own += [f"dropout {variant.dropout:g}"] if variant.dropout else []
    own += ["head from zero"] if variant.zero_head else []
    return "standard" + "".join(f", {each}" for each in own)


def competence_table(folder: Path) -> list[str]:
    rows = []
    for noise in NOISE:
        for name, (variant, members, kind) in methods_of(noise).items():
            found = [read_run(folder, Run(variant, noise, seed, members)) for seed in REPORT_SEEDS]
            runs = [run for run in found if run]
            if runs:
                cells = [shown(run[kind][key] for run in runs if key in run[kind])
                         for key in (*MEASURED, "train", "flips learnt")]  # fmt: skip
                nats = shown(run["kl_nats"] for run in runs if "kl_nats" in run)
                rows.append([f"{noise:.0%}", name, setting_name(variant), *cells, nats])
    gates = ", ".join(f"{least} with {noise:.0%} flipped" for noise, least in GATE.items())
    words = f"Needed: {gates} on {GATED} by the chosen single models. Seeds {', '.join(map(str, REPORT_SEEDS))}."
    header = ["flipped", "proxy", "setting", *MEASURED, "training pairs", "flips learnt", "KL, nats"]
    return ["## Are the proxies competent?", "", words, "", *table(header, rows)]


def attack(folder: Path, noises: list[float]) -> tuple[Found, list[dict[str, Any]]]:
    """Curves of every method, seed and set of prompts, and CSI for the InfoRM models."""
    measured: Found = {}
    watched = []
    for part in SETS:
        lines = [line for path in sorted((folder / "samples" / part).glob("*.jsonl")) for line in jsonl(path)]
        gold = gold_rewards(folder, part)
        if len(gold) != len(lines):
            raise ValueError(f"{part}: {len(gold)} gold rewards for {len(lines)} responses. Run the stage gold again.")
        for noise in noises:
            for name, (variant, members, kind) in methods_of(noise).items():
                for seed in REPORT_SEEDS:
                    run = read_run(folder, Run(variant, noise, seed, members))
                    if run is None:
                        continue
                    found = rewards_of_run(folder, Run(variant, noise, seed, members))
                    result = curves(found[f"{kind}.{part}"] / run["units"][kind][1], gold, lines)
                    measured.setdefault((noise, name, part), []).append(result)
                    if f"latents.{part}" in found and kind == "member 0":
                        about = {"noise": noise, "method": name, "set": part, "seed": seed}
                        values = watch(found[f"{kind}.{part}"], found[f"latents.{part}"], lines, seed)
                        watched.append(about | {"values": values})
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
