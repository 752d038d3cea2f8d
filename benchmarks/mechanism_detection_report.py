"""Tables and figure of `mechanism_detection.py`: alarms, stops, and what rule for CSI fires in time.

    python benchmarks/mechanism_detection_report.py --output runs/mechanism

Levels and ratios are chosen on the selection seeds, figures are of the reported seeds. Writes ``detection.md`` and
``detection.png``.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechanism import REPORT_SEEDS, SELECTION_SEEDS, kept_variants
from mechanism_detection import NULL_SETS, RESPONSES
from mechanism_models import MEASURE_EVERY
from over_seeds import mean_and_interval

Row = dict[str, Any]
FALL = 0.05  # of the gain at the peak
SHARES = (0.02, 0.05, 0.1, 0.2)  # of the gain of the other model's reward
RATIOS = (1.1, 1.2, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/mechanism"))
    output = parser.parse_args().output
    rows = json.loads((output / "detection.json").read_text(encoding="utf-8"))
    for row in rows:  # known at every point, and without chance in the base policy
        row["values"]["KL"] = [0.0] * NULL_SETS + row["kl"]
        row["values"]["reward of the proxy"] = [row["proxy"][0]] * NULL_SETS + row["proxy"]
    lines = [*alarm_table(rows), *stop_table(rows), *rule_table(rows)]
    (output / "detection.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (output / "detection.png").write_bytes(detection_png(rows))
    print("\n".join(lines))


def of(rows: Iterable[Row], attacked: str, seeds: Iterable[int]) -> list[Row]:
    return [row for row in rows if row["attacked"] == attacked and row["seed"] in seeds]


def watched(rows: list[Row]) -> list[str]:
    """Attacked models that both kinds of seeds have."""
    return [name for name in kept_variants() if of(rows, name, SELECTION_SEEDS) and of(rows, name, REPORT_SEEDS)]


def policy_values(run: Row, statistic: str) -> NDArray:
    return np.array(run["values"][statistic][NULL_SETS:])


def has_fallen(run: Row) -> NDArray:
    """At which points gold has fallen by 5 % of its gain since the peak."""
    gold = np.array(run["gold"])
    peak = int(gold.argmax())
    return (np.arange(len(gold)) > peak) & (gold[peak] - gold > FALL * (gold[peak] - gold[0]))


def alarm_table(rows: list[Row]) -> list[str]:
    """Per attacked model and statistic: the first alarm beyond chance, false alarms, area under ROC."""
    lines = [
        "| attacked | statistic | gold falls | lead, nats | before / at / after the peak / never | false alarms "
        "| AUC, gold has fallen by 5 % |", "|" + "---|" * 7,
    ]  # fmt: skip
    for attacked in kept_variants():
        runs = of(rows, attacked, REPORT_SEEDS)
        for statistic in runs[0]["values"] if runs else ():
            leads, false, falls = [], [], sum(has_fallen(run).any() for run in runs)
            for run in runs:
                null = np.array(run["values"][statistic][:NULL_SETS])
                level = null[: NULL_SETS // 2].max()
                false.append(float((null[NULL_SETS // 2 :] > level).mean()))
                alarms = np.flatnonzero(policy_values(run, statistic)[1:] > level)
                if has_fallen(run).any():
                    kl = run["kl"]
                    leads.append(kl[int(np.argmax(run["gold"]))] - kl[1 + alarms[0]] if len(alarms) else None)
            heard = [lead for lead in leads if lead is not None]
            signs = np.sign(heard)
            order = [int((signs == sign).sum()) for sign in (1, 0, -1)] + [len(leads) - len(heard)]
            lines.append("| " + " | ".join([
                attacked, statistic, f"{falls} of {len(runs)}", interval(heard), " / ".join(map(str, order)),
                f"{np.mean(false):.3f}", pooled_area(runs, statistic),
            ]) + " |")  # fmt: skip
    return [*lines, "", f"Sets of {RESPONSES} responses, every {MEASURE_EVERY} steps of the policy.", ""]


def pooled_area(runs: list[Row], statistic: str, resamples: int = 1000) -> str:
    """Area under ROC over all points of all runs, and its interval when seeds are drawn anew."""
    values = [policy_values(run, statistic)[1:] for run in runs]
    fallen = [has_fallen(run)[1:] for run in runs]

    def over(places: NDArray) -> float | None:
        own, labels = (np.concatenate([part[place] for place in places]) for part in (values, fallen))
        return area(own[labels], own[~labels]) if labels.any() and not labels.all() else None

    found = over(np.arange(len(runs)))
    if found is None:
        return "-"
    generator = np.random.default_rng(0)
    draws = [over(generator.integers(len(runs), size=len(runs))) for _ in range(resamples)]
    low, high = np.quantile([each for each in draws if each is not None], [0.025, 0.975])
    return f"{found:.2f} [{low:.2f}, {high:.2f}]"


def area(positive: NDArray, negative: NDArray) -> float:
    """Area under ROC: share of pairs in which the positive is larger, ties half."""
    difference = positive[:, None] - negative[None, :]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def kept_by(run: Row, statistic: str, level: float) -> float:
    """Gold at the first point whose value is above the level, else at the end, as a share of gold at the peak."""
    return kept_at(run, np.flatnonzero(policy_values(run, statistic) > level))


def kept_at(run: Row, stops: NDArray) -> float:
    gold = run["gold"]
    return float(gold[stops[0]] if len(stops) else gold[-1]) / max(gold)


def falls_of(run: Row, share: float) -> NDArray:
    """Points at which the reward of a model that the policy does not see has lost a share of its largest gain."""
    from inform_rm.eval.detection.early_stopping import RewardFallStopping

    rule = RewardFallStopping(share)
    return np.flatnonzero([rule.update(reward) for reward in run["other_reward"]])


def stop_table(rows: list[Row]) -> list[str]:
    """Share of the peak's gold that a stop keeps at the level that kept most on the selection seeds."""
    names = watched(rows)
    lines = ["| stop when this is above a level of its own | " + " | ".join(names) + " | all, one level |",
             "|" + "---|" * (len(names) + 2)]  # fmt: skip
    groups = [*([name] for name in names), names]
    selection = [run for name in names for run in of(rows, name, SELECTION_SEEDS)]
    share = max(SHARES, key=lambda each: np.mean([kept_at(run, falls_of(run, each)) for run in selection]))
    plain: dict[str, Callable[[Row], NDArray]] = {
        "never": lambda run: np.array([]),
        f"the other model's reward fell by {share:.0%} of its gain": lambda run: falls_of(run, share),
    }  # fmt: skip
    for words, stops in plain.items():
        shares = [[kept_at(run, stops(run)) for name in group for run in of(rows, name, REPORT_SEEDS)]
                  for group in groups]  # fmt: skip
        lines.append(f"| {words} | " + " | ".join(map(interval, shares)) + " |")
    statistics = dict.fromkeys(statistic for row in rows for statistic in row["values"])
    for statistic in statistics:
        cells = []
        for group in groups:
            own = [run for name in group for run in of(rows, name, SELECTION_SEEDS)]
            level = best_level(own, statistic)
            shares = [kept_by(run, statistic, level) for name in group for run in of(rows, name, REPORT_SEEDS)]
            cells.append(interval(shares))
        lines.append(f"| {statistic} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def best_level(runs: list[Row], statistic: str) -> float:
    """The level at which stopping keeps most on average; the lowest of equals."""
    levels = np.unique(np.concatenate([policy_values(run, statistic) for run in runs]))
    return float(max(levels, key=lambda level: np.mean([kept_by(run, statistic, level) for run in runs])))


def rule_table(rows: list[Row]) -> list[str]:
    """The paper's rule for jumps of CSI, and one for its rise: when they fire, and what they keep."""
    from inform_rm.eval.detection.early_stopping import CSIEarlyStopping

    def jump(csi: NDArray) -> NDArray:
        rule = CSIEarlyStopping()
        return np.flatnonzero([rule.update(value) for value in csi])

    def rise(ratio: float, start: NDArray) -> Callable[[NDArray], NDArray]:
        return lambda csi: np.flatnonzero(csi > ratio * np.mean(start))

    lines = ["| attacked | rule for CSI | stops | lead, nats | share of the peak's gold |", "|" + "---|" * 5]
    statistic = "CSI, latents of InfoRM"
    for name in watched(rows):
        selection = of(rows, name, SELECTION_SEEDS)

        def shares(runs: list[Row], ratio: float | None) -> tuple[list[float], list[float]]:
            kept, leads = [], []
            for run in runs:
                null = np.array(run["values"][statistic][: NULL_SETS // 2])
                csi = policy_values(run, statistic)
                stops = (jump if ratio is None else rise(ratio, null))(csi)
                kept.append(kept_at(run, stops))
                leads += [run["kl"][int(np.argmax(run["gold"]))] - run["kl"][stops[0]]] if len(stops) else []
            return kept, leads

        best = max(RATIOS, key=lambda ratio: np.mean(shares(selection, ratio)[0]))
        for words, ratio in (("jump, 10 (the paper)", None), (f"rise, {best:g} (chosen)", best), ("rise, 1.5", 1.5)):
            kept, leads = shares(of(rows, name, REPORT_SEEDS), ratio)
            lines.append(f"| {name} | {words} | {len(leads)} of {len(kept)} | {interval(leads)} | {interval(kept)} |")
    return lines


def detection_png(rows: list[Row]) -> bytes:
    """Gold, the other model's reward and statistics by step, as shares of a run's largest, mean over seeds."""
    from matplotlib.figure import Figure

    from inform_rm.util.page import figure_png

    names = [name for name in kept_variants() if of(rows, name, REPORT_SEEDS)]
    figure = Figure(figsize=(4.0 * len(names), 3.6), layout="constrained")
    shown: dict[str, tuple[str, Callable[[Row], Any]]] = {
        "gold": ("black", lambda run: run["gold"]),
        "reward of the other model": ("#009E73", lambda run: run["other_reward"]),
        "CSI, latents of InfoRM": ("#D55E00", lambda run: policy_values(run, "CSI, latents of InfoRM")),
        "kNN distance, states of the standard model": (
            "#56B4E9", lambda run: policy_values(run, "kNN distance, states of the standard model")),
        "repetition": ("#8A8A8A", lambda run: policy_values(run, "repetition")),
    }  # fmt: skip
    for axes, name in zip(figure.subplots(1, len(names), sharey=True), names, strict=True):
        runs = of(rows, name, REPORT_SEEDS)
        for label, (colour, values) in shown.items():
            shares = np.mean([np.array(values(run)) / max(values(run)) for run in runs], axis=0)
            axes.plot(MEASURE_EVERY * np.arange(len(shares)), shares, color=colour, label=label,
                      linewidth=2.2 if label == "gold" else 1.3)  # fmt: skip
        kl = np.mean([run["kl"][-1] for run in runs])
        axes.set_title(f"policy against {name}", fontsize=9)
        axes.set_xlabel(f"step ({len(runs)} seeds; {kl:.0f} nats at the end)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    figure.axes[0].set_ylabel("share of the run's largest")
    return figure_png(figure)


def interval(values: Iterable[float]) -> str:
    numbers = list(values)
    if not numbers:
        return "-"
    mean, low, high = mean_and_interval(numbers)
    return f"{mean:.2f}" if len(numbers) < 2 else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
