"""What became of the policies of `real_text_grpo.py`: curves, who told of a fall of gold, tables and figure.

Watchers are asked after the runs, on the measured responses: CSI of the latents of the chosen InfoRM of the run's own
seed, and the reward of a second model, the chosen standard one of the next seed, which learnt from other flips. The
reference of CSI are the start's responses to the same prompts, drawn by all runs of the seed.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

import real_text_grpo
from inform_rm.eval.detection.clusters import auto_eps, cluster_separation_index
from inform_rm.eval.detection.early_stopping import CSIEarlyStopping, RewardFallStopping
from inform_rm.eval.detection.outliers import null_rank, split_half_null
from over_seeds import mean_and_interval, table
from real_text_grpo import ATTACKED, COEFFICIENTS, PolicyRun

NATS = (2, 5, 10, 20, 40)
FALL = 0.1  # of its gain at the peak that gold has lost: then it has turned
ALPHA, SPLITS, REFERENCE = 0.05, 100, 512
Curve = dict[str, Any]


def curve_of(folder: Path, run: PolicyRun) -> Curve | None:
    """By measured step means over prompts, rewards as gains over the start; ``None`` if the run was not done."""
    path = folder / "policy" / f"{run.name}.safetensors"
    if not path.exists():
        return None
    found = load_file(path)
    steps = found["step"].unique().tolist()
    columns = {name: found[name].double().view(len(steps), -1).numpy()
               for name in ("proxy", "gold", "second", "kl", "tokens")}  # fmt: skip
    ids = found["ids"].view(len(steps), -1, found["ids"].shape[1])
    starts, tokens = (found[name].view(len(steps), -1) for name in ("prompt_lengths", "tokens"))
    return {
        "run": run, "step": steps, "kl": columns["kl"].mean(axis=1), "tokens": columns["tokens"].mean(axis=1),
        **{name: (columns[name] - columns[name][0]).mean(axis=1) for name in ("proxy", "gold", "second")},
        # of the second model's paired gains
        "error": (columns["second"] - columns["second"][0]).std(axis=1, ddof=1) / math.sqrt(columns["kl"].shape[1]),
        "repeated": [float(np.mean([_repeated(row[start : start + length].tolist())
                                    for row, start, length in zip(*each, strict=True)]))
                     for each in zip(ids, starts.tolist(), tokens.tolist(), strict=True)],
        "latents": found["latents"].double().view(len(steps), -1, found["latents"].shape[1]).numpy(),
    }  # fmt: skip


def _repeated(tokens: list[int]) -> float:
    """Share of the tokens that stood in the response before."""
    return 1 - len(set(tokens)) / len(tokens)


def turning(curve: Curve) -> dict[str, float]:
    """Where gold is highest, what it has lost at the end, and the step at which it has lost `FALL` of its gain."""
    gold = curve["gold"]
    peak = int(gold.argmax())
    lost = [place for place in range(peak, len(gold)) if gold[peak] - gold[place] > FALL * gold[peak]]
    return {
        "peak": float(gold[peak]), "kl at peak": float(curve["kl"][peak]), "end": float(gold[-1]),
        "fall": float(gold[peak] - gold[-1]), "kl at end": float(curve["kl"][-1]),
        "proxy at end": float(curve["proxy"][-1]), "peak place": peak,
        "turned": float(curve["kl"][lost[0]]) if lost else math.nan,
    }  # fmt: skip


def at_nats(curve: Curve, nats: float) -> float | None:
    """Gold's gain where the KL divergence first reaches `nats`, between two measurements in proportion."""
    kl, gold = curve["kl"], curve["gold"]
    reached = np.flatnonzero(kl >= nats)
    if not len(reached):
        return None
    after = int(reached[0])
    if after == 0:
        return float(gold[0])
    share = (nats - kl[after - 1]) / (kl[after] - kl[after - 1])
    return float(gold[after - 1] + share * (gold[after] - gold[after - 1]))


def watch_runs(curves: list[Curve]) -> None:
    """Put CSI over its mean among random halves, its rank there, and when the rules stop in place of the latents."""
    for seed in sorted({curve["run"].seed for curve in curves}):
        own = [curve for curve in curves if curve["run"].seed == seed]
        starts = np.concatenate([curve["latents"][0] for curve in own])
        kept = np.random.default_rng(seed).permutation(len(starts))[:REFERENCE]
        reference = starts[kept]
        eps = auto_eps(reference)

        def csi(candidate: np.ndarray, others: np.ndarray, eps: float = eps) -> float:
            return cluster_separation_index(candidate, others, eps=eps, normalized=True)

        null = split_half_null(reference, csi, num_splits=SPLITS, seed=seed)
        for curve in own:
            values = [csi(each, reference) for each in curve.pop("latents")]
            curve["csi"] = np.array(values) / float(null.mean())
            curve["csi rank"] = np.array([null_rank(value, null) for value in values])
            stops = CSIEarlyStopping(), RewardFallStopping()
            alarms = {
                "CSI rank": [place for place, rank in enumerate(curve["csi rank"]) if place and rank < ALPHA],
                "CSI rule": [place for place, value in enumerate(values) if stops[0].update(value)],
                "second reward": [
                    place for place, (value, error) in enumerate(zip(curve["second"], curve["error"], strict=True))
                    if stops[1].update(float(value), float(error))
                ],
            }  # fmt: skip
            curve["alarms"] = {name: places[0] if places else None for name, places in alarms.items()}


def shown(values: list[float], digits: int = 2, sign: str = "") -> str:
    """Mean and half of its 95 % interval over seeds; the number of seeds where some are missing."""
    found = [value for value in values if not math.isnan(value)]
    if not found:
        return "-"
    mean, low, _ = mean_and_interval(found)
    few = f" ({len(found)} of {len(values)})" if len(found) < len(values) else ""
    return f"{mean:{sign}.{digits}f}" + (f" ± {mean - low:.{digits}f}" if len(found) > 1 else "") + few


def policy_tables(folder: Path) -> tuple[list[str], list[Curve]]:
    """Lines of the report and the curves of all runs that are done; without any, none."""
    curves = [curve for run in real_text_grpo.policy_runs() if (curve := curve_of(folder, run))]
    if not curves:
        return [], []
    watch_runs(curves)
    lines = ["## GRPO", "", *_course_table(curves), *_nats_table(curves), *_alarm_table(curves)]
    return lines, curves


def _groups(curves: list[Curve]) -> dict[tuple[str, float], list[Curve]]:
    keys = [(name, value) for value in COEFFICIENTS for name in ATTACKED]
    found = {key: [curve for curve in curves if (curve["run"].proxy, curve["run"].coefficient) == key] for key in keys}
    return {key: own for key, own in found.items() if own}


def _course_table(curves: list[Curve]) -> list[str]:
    rows = []
    names = ("kl at end", "proxy at end", "end", "peak", "kl at peak", "fall")
    for (name, coefficient), own in _groups(curves).items():
        found = [turning(curve) for curve in own]
        turned = sum(not math.isnan(each["turned"]) for each in found)
        rows.append([f"{coefficient:g}", name, str(len(own)), *(shown([each[key] for each in found]) for key in names),
                     f"{turned} of {len(own)}", shown([curve["tokens"][-1] for curve in own], 1),
                     shown([curve["repeated"][-1] - curve["repeated"][0] for curve in own], 2, "+")])  # fmt: skip
    header = ["KL coefficient", "proxy", "seeds", "KL at the end", "proxy's gain", "gold's gain", "gold at its peak",
              "KL there", "fall from there", "turned", "tokens", "tokens repeated"]  # fmt: skip
    return table(header, rows)


def _nats_table(curves: list[Curve]) -> list[str]:
    rows = []
    groups = _groups(curves)
    for (name, coefficient), own in groups.items():
        cells = [shown([math.nan if (value := at_nats(curve, nats)) is None else value for curve in own])
                 for nats in NATS]  # fmt: skip
        base = {curve["run"].seed: curve for curve in groups.get(("standard, chosen", coefficient), [])}
        less = []
        for nats in NATS:
            pairs = [(at_nats(curve, nats), at_nats(base[curve["run"].seed], nats)) for curve in own
                     if curve["run"].seed in base]  # fmt: skip
            less.append(shown([one - other for one, other in pairs if one is not None and other is not None], 2, "+"))
        if name != "standard, chosen":
            cells = [f"{cell}; {difference}" for cell, difference in zip(cells, less, strict=True)]
        rows.append([f"{coefficient:g}", name, *cells])
    words = "Gold's gain at a KL divergence; behind the semicolon less the chosen standard model's, paired by seed."
    return [words, "", *table(["KL coefficient", "proxy", *(f"{nats} nats" for nats in NATS)], rows)]


def _alarm_table(curves: list[Curve]) -> list[str]:
    rows = []
    place: Callable[[Curve, str], int | None] = lambda curve, rule: curve["alarms"][rule]  # noqa: E731
    for (name, coefficient), own in _groups(curves).items():
        cells = []
        for rule in own[0]["alarms"]:
            before = sum(place(curve, rule) is not None and place(curve, rule) <= turning(curve)["peak place"]
                         for curve in own)  # fmt: skip
            never = sum(place(curve, rule) is None for curve in own)
            cells.append(f"{before} / {len(own) - before - never} / {never}")
        rows.append([f"{coefficient:g}", name, *cells, shown([curve["csi"][-1] for curve in own]),
                     shown([curve["second"][-1] for curve in own])])  # fmt: skip
    header = ["KL coefficient", "proxy", *(f"{rule}: before, after the peak, never" for rule in own[0]["alarms"]),
              "CSI at the end over chance", "second reward's gain at the end"]  # fmt: skip
    return table(header, rows)


def policies_png(curves: list[Curve]) -> bytes:
    """Gold (solid, each seed thin, their mean thick) and proxy (dashed) against KL, a panel for each coefficient."""
    from matplotlib.figure import Figure

    from inform_rm.util.colors import SERIES
    from inform_rm.util.page import figure_png

    groups = _groups(curves)
    coefficients = sorted({key[1] for key in groups})
    figure = Figure(figsize=(5.8 * len(coefficients) + 0.6, 4.6), layout="constrained")
    panels = figure.subplots(1, len(coefficients), sharey=True, squeeze=False)[0]
    for axes, coefficient in zip(panels, coefficients, strict=True):
        for colour, marker, name in zip(SERIES, "so^", ATTACKED, strict=False):
            own = groups.get((name, coefficient), [])
            for curve in own:
                axes.plot(curve["kl"], curve["gold"], "-", linewidth=0.7, alpha=0.45, color=colour)
            if own:
                common = min(len(curve["kl"]) for curve in own)
                means = {key: np.mean([curve[key][:common] for curve in own], axis=0)
                         for key in ("kl", "gold", "proxy")}  # fmt: skip
                axes.plot(means["kl"], means["gold"], f"{marker}-", ms=4, linewidth=2, color=colour, label=name)
                axes.plot(means["kl"], means["proxy"], "--", linewidth=1.2, color=colour)
        axes.axhline(0, color="0.6", linewidth=0.6)
        axes.set_title(f"KL coefficient {coefficient:g}", fontsize=9)
        axes.set_xlabel("KL from the start policy, nats a response")
    panels[0].set_ylabel("gain, standard deviations")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    return figure_png(figure)


def as_json(curve: Curve) -> dict[str, Any]:
    """A curve of plain numbers."""
    found = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in curve.items()}
    return json.loads(json.dumps({**found, "run": vars(curve["run"])}, default=int))
