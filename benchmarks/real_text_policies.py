"""What became of the policies of `real_text_grpo.py`: curves, who told of a fall of gold, tables and figure.

Watchers are asked after the runs, on the measured responses: CSI of the latents of the chosen InfoRM of the run's own
seed, and the reward of a second model, the chosen standard one of the next seed, which learnt from other flips. The
reference of CSI are the start's responses to the same prompts, drawn by all runs of the seed.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

import real_text_grpo
from inform_rm.eval.detection.early_stopping import CSIEarlyStopping, RewardFallStopping
from inform_rm.eval.detection.outliers import null_rank, split_half_null
from inform_rm.eval.detection.settings import DetectionSettings
from inform_rm.eval.detection.statistic import STATISTICS
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
        "repeated": np.array([np.mean([_repeated(row[start : start + length].tolist())
                                       for row, start, length in zip(*each, strict=True)])
                              for each in zip(ids, starts.tolist(), tokens.tolist(), strict=True)]),
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
    """Put the package's statistics, their ranks among random halves, and when rules stop in place of the latents."""
    settings = DetectionSettings(alpha=ALPHA, num_splits=SPLITS)
    for seed in sorted({curve["run"].seed for curve in curves}):
        own = [curve for curve in curves if curve["run"].seed == seed]
        starts = np.concatenate([curve["latents"][0] for curve in own])
        reference = starts[np.random.default_rng(seed).permutation(len(starts))[:REFERENCE]]
        for statistic in STATISTICS:
            null = split_half_null(
                reference, lambda one, other: statistic.fit(other, settings)(one, 0)[0][statistic.name],  # noqa: B023
                num_splits=SPLITS, seed=seed,
            )  # fmt: skip
            measure = statistic.fit(reference, settings)
            for curve in own:
                values = [measure(latents, 0)[0][statistic.name] for latents in curve["latents"]]
                ranks = [null_rank(value, null) for value in values]
                curve[statistic.name] = np.array(values)
                curve.setdefault("alarms", {})[statistic.title] = _first(
                    place for place, rank in enumerate(ranks) if place and rank < ALPHA
                )
        for curve in own:
            del curve["latents"]
            stops = CSIEarlyStopping(), RewardFallStopping()
            gains = zip(curve["second"].tolist(), curve["error"].tolist(), strict=True)
            curve["alarms"]["the paper's rule"] = _first(
                place for place, value in enumerate(curve["csi_normalized"]) if stops[0].update(float(value))
            )
            curve["alarms"]["second reward"] = _first(
                place for place, (value, error) in enumerate(gains) if stops[1].update(value, error)
            )


def _first(places: Iterable[int]) -> int | None:
    return next(iter(places), None)


def areas(curves: list[Curve]) -> dict[str, float]:
    """Area under ROC of what is measured after the start, for gold having lost `FALL` of its peak so far."""
    from sklearn.metrics import roc_auc_score

    fallen, signs = [], {}
    for curve in curves:
        gold, second = curve["gold"], curve["second"]
        best = np.maximum.accumulate(gold)
        fallen += (best - gold > FALL * best)[1:].tolist()
        columns = {statistic.title: curve[statistic.name] for statistic in STATISTICS}
        columns |= {"KL": curve["kl"], "tokens repeated": curve["repeated"], "the proxy itself": curve["proxy"]}
        columns["fall of the second reward"] = np.maximum.accumulate(second) - second
        for name, values in columns.items():
            signs.setdefault(name, []).extend(values[1:].tolist())
    return {name: float(roc_auc_score(fallen, values)) for name, values in signs.items()}


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
    """When rules fire against gold's peak, and how well each number tells that gold has fallen."""
    groups = _groups(curves)
    found = {key: areas(own) for key, own in groups.items()}
    rows = []
    for rule in curves[0]["alarms"]:
        cells = []
        for own in groups.values():
            places = [(curve["alarms"][rule], turning(curve)["peak place"]) for curve in own]
            early = sum(place is not None and place < peak for place, peak in places)
            at = sum(place == peak for place, peak in places)
            never = sum(place is None for place, _ in places)
            cells.append(f"{early} / {at} / {len(own) - early - at - never} / {never}")
        rows.append([rule, *cells])
    names = [f"{name}" + (f", KL coefficient {value:g}" if value else "") for name, value in groups]
    words = "First alarm: before / at / after gold's peak / never."
    lines = [words, "", *table(["rule", *names], rows)]
    rows = [[name, *(f"{each[name]:.2f}" for each in found.values())] for name in next(iter(found.values()))]
    words = (
        f"Area under ROC for gold having lost {FALL:.0%} of its peak so far, over all measurements after the start."
    )
    return [*lines, words, "", *table(["what is measured", *names], rows)]


def policies_png(curves: list[Curve]) -> bytes:
    """By step gold (solid, each seed thin, their mean thick), proxy (dashed) and KL (below), a column a proxy."""
    from matplotlib.figure import Figure

    from inform_rm.util.colors import SERIES
    from inform_rm.util.page import figure_png

    groups = _groups(curves)
    figure = Figure(figsize=(4.8 * len(groups), 5.6), layout="constrained")
    panels = figure.subplots(2, len(groups), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 1))
    for column, ((name, coefficient), own) in zip(panels.T, groups.items(), strict=True):
        rewards, nats = column
        common = min(len(curve["step"]) for curve in own) - 1  # the last one may be of another step
        steps = own[0]["step"][:common]
        for curve in own:
            rewards.plot(curve["step"], curve["gold"], "-", linewidth=0.7, alpha=0.5, color=SERIES[0])
            nats.plot(curve["step"], curve["kl"], "-", linewidth=0.9, color="0.4")
        for key, line, colour in (("gold", "o-", SERIES[0]), ("second", ":", SERIES[2]), ("proxy", "--", SERIES[1])):
            mean = np.mean([curve[key][:common] for curve in own], axis=0)
            label = {"gold": "gold", "second": "another standard model", "proxy": "the proxy itself"}[key]
            rewards.plot(steps, mean, line, ms=4, linewidth=2 if key == "gold" else 1.4, color=colour, label=label)
        rewards.axhline(0, color="0.6", linewidth=0.6)
        rewards.set_ylim(-1, 5)
        rewards.set_title(f"against {name}" + (f", KL coefficient {coefficient:g}" if coefficient else ""), fontsize=9)
        nats.set_xlabel("step")
        nats.set_ylim(0, 250)
    panels[0][0].set_ylabel("gain, standard deviations")
    panels[1][0].set_ylabel("KL, nats")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    return figure_png(figure)


def as_json(curve: Curve) -> dict[str, Any]:
    """A curve of plain numbers."""
    found = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in curve.items()}
    return json.loads(json.dumps({**found, "run": vars(curve["run"])}, default=int))
