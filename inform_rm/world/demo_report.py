"""The page and the table of `inform-rm demo`: one HTML file, tables first, legible on a phone and in dark mode."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from inform_rm.eval.best_of_n.report import CURVES_CAPTION, curves_figure
from inform_rm.eval.decompose_report import PLANE_CAPTION, draw_plane
from inform_rm.eval.detection.report import MAP_CAPTION, map_figure
from inform_rm.util.colors import BLUE, GREY, VERMILION
from inform_rm.util.page import (
    Block,
    Heading,
    Note,
    Page,
    Table,
    settings_table,
    themed_image,
    with_interval,
    words_table,
)

TEST_SETS = {
    "in_distribution": "in-distribution",
    "bias_reversed": "bias-reversed",
    "adversarial_prompt": "adversarial prompt",
    "unseen_family": "unseen family",
}
_MEANINGS = {
    "in_distribution": "pairs like those in training, without label noise",
    "bias_reversed": "what is asked is always done by the response with less filler; in training mostly with more",
    "adversarial_prompt": "two responses under two prompts with opposite preference; blind to the prompt gives 0.5",
    "unseen_family": "kinds of task that training never showed; length tells nothing",
}
_CAPTIONS = (
    "Accuracy on each test set with 95 % Wilson intervals. Dotted: chance.",
    "Reward margin (chosen minus rejected) against the difference in length. Points above 0 are ranked right. A model "
    "that goes by length puts the points on a rising line.",
    f"In-distribution pairs, coloured by length difference. {PLANE_CAPTION}",
    "Training. Loss without the KL term and accuracy are those of the validation pairs, which hold no label noise.",
    "Share of in-distribution pairs ranked right against the probability that the model gives, with 95 % Wilson "
    "intervals. On the dashed line a model is as sure as it should be.",
    f"Best of n responses, chosen by each model. {CURVES_CAPTION}",
    f"InfoRM's choices as candidates, the policy's first responses as reference. {MAP_CAPTION}",
)
_MODELS = {"standard": "standard", "inform": "InfoRM"}
_COLORS = {"standard": BLUE, "inform": VERMILION, "rule": GREY}


def console_table(result: dict[str, Any]) -> str:
    """The main table and what it says, as plain text."""
    table = _accuracy_table(result)
    rows = [table.header, *table.cells()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) if column else cell.ljust(width)
                  for column, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]  # fmt: skip
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", textwrap.fill(_verdict(result), 100)])


def demo_page(
    result: dict[str, Any],
    rows: dict[str, list[dict[str, Any]]],
    rewards: dict[str, dict[str, np.ndarray]],
    *,
    logs: dict[str, list[dict[str, float]]],
    gaps: dict[str, dict[str, np.ndarray]],
    curves: dict[str, Any],
    points: dict[str, list[Any]],
) -> Page:
    """The demo's page.

    Of the result, the pairs of each test set with their gold columns, ``(N, 2)`` rewards (chosen and rejected) by
    model and test set, the models' training logs, the columns of `DecompositionResult.pairs` by model, best-of-n with
    both models, and the points of the map (`inform_rm.eval.detection.report.map_figure`).
    """
    figures: list[Callable[[], Figure]] = [
        lambda: _accuracy_figure(result), lambda: _margin_figure(rows, rewards), lambda: _plane_figure(gaps),
        lambda: _training_figure(logs), lambda: _reliability_figure(result), lambda: curves_figure(curves),
        lambda: map_figure(points),
    ]  # fmt: skip
    elsewhere = result["loaded_elsewhere"]
    blocks: list[Block] = [
        *_findings(result),
        *(themed_image(draw, caption) for draw, caption in zip(figures, _CAPTIONS, strict=True)),
        Heading("Three pairs"),
        *(_example(name, rows[name][0], rewards) for name in ("in_distribution", "bias_reversed", "unseen_family")),
        Heading("Run"),
        "The exported InfoRM model was loaded in a fresh interpreter without this package and gave the same rewards "
        f"for {elsewhere['num_responses']} responses (largest difference "
        f"{elsewhere['largest_reward_difference']:.1e}).",
        Table(("stage", "seconds"), [(name, f"{value:.0f}") for name, value in result["seconds"].items()]),
        _settings(result),
    ]
    return Page("InfoRM and a standard reward model on a generated world", blocks)


def _findings(result: dict[str, Any]) -> list[Block]:
    return [
        _accuracy_table(result),
        _verdict(result),
        Note(
            "Accuracy: share of pairs in which the better response has the higher reward, a tie half; in brackets the "
            "95 % Wilson interval. Difference: InfoRM minus standard, 95 % paired bootstrap interval."
        ),
        words_table(("test set", "what it holds"), [(TEST_SETS[k], _MEANINGS[k]) for k in TEST_SETS]),
        _decomposition_table(result),
        Note(
            "Prompt-free and prompt-related reward on in-distribution pairs, each scored under "
            f"{result['settings']['num_prompts']} prompts. Response decides: share of pairs whose prompt-free gap is "
            "the larger one. Sign flips: share of pairs ranked the other way under another prompt. Prompt "
            "sensitivity: share of the gaps' variance between prompts of one pair. Length: rank correlation of the "
            "gap with the difference in words."
        ),
        _best_of_n_table(result),
        Note(
            "The world's policy writes many responses to each prompt and each model picks the best; gains are over a "
            f"response drawn at random. {_detection_verdict(result)}"
        ),
    ]


def _accuracy_table(result: dict[str, Any]) -> Table:
    rows = []
    for name, label in TEST_SETS.items():
        part = result["test_sets"][name]
        standard, gap = part["standard"], part["inform_minus_standard"]
        cells = [with_interval(part[model]["accuracy"], part[model]["accuracy_interval"]) for model in _MODELS]
        difference = with_interval(gap["accuracy_difference"], gap["interval"], sign="+")
        rows.append((label, standard["num_pairs"], *cells, difference, standard["longer_wins_accuracy"]))
    return Table(("test set", "n", "standard", "InfoRM", "difference", "longer wins"), rows)


def _decomposition_table(result: dict[str, Any]) -> Table:
    header = ("decomposition", "n", "response decides", "sign flips", "prompt sensitivity",
              "length, prompt-free", "length, prompt-related")  # fmt: skip
    rows = []
    for model, label in _MODELS.items():
        part = result["decomposition"][model]
        words = part["correlations"].get("words", {})
        decides = with_interval(part["response_decides"], part["response_decides_interval"])
        gaps = [f"{words[gap]:+.2f}" if gap in words else "" for gap in ("prompt_free_gap", "prompt_related_gap")]
        rows.append((label, part["num_pairs"], decides, part["sign_flips"], part.get("prompt_sensitivity"), *gaps))
    return Table(header, rows)


def _best_of_n_table(result: dict[str, Any]) -> Table:
    header = ("best of n, chosen by", "gain in its own reward", "gain in gold reward", "gold peaks at n",
              "fall from there")  # fmt: skip
    rows = [
        (
            _MODELS[name], f"{part['proxy_gain']:.2f}", f"{part['gold_gain']:.2f}", part["n"],
            with_interval(part["fall"], part["fall_interval"]),
        )
        for name, part in result["best_of_n"].items()
    ]  # fmt: skip
    return Table(header, rows)


def _detection_verdict(result: dict[str, Any]) -> str:
    found, null = result["detection"], result["detection"]["null"]
    csi, mop = ("{:.3f}, {:.3f}".format(*null[name]["interval"]) for name in ("csi_normalized", "mop"))
    return (
        f"Latents of {found['num_responses']} choices of InfoRM against the policy's own responses: CSI per response "
        f"{found['csi_normalized']:.2f} (halves of the policy's own give {csi}), outlier probability "
        f"{found['mop']:.3f} ({mop})."
    )


def _verdict(result: dict[str, Any]) -> str:
    """What the differences say, whichever way they fall, and what they leave open: two sentences."""
    groups: dict[str, list[str]] = {"ahead on": [], "behind on": [], "level on": []}
    for name, label in TEST_SETS.items():
        gap = result["test_sets"][name]["inform_minus_standard"]
        low, high = gap["interval"]
        side = "ahead on" if low > 0 else "behind on" if high < 0 else "level on"
        groups[side].append(f"{label} ({gap['accuracy_difference']:+.3f})")
    found = "; ".join(f"{side} {', '.join(labels)}" for side, labels in groups.items() if labels)
    return (
        f"Against the standard model InfoRM is {found} (level: the 95 % paired interval of the difference holds 0). "
        "The intervals cover the choice of test pairs, not that of the training seed, of which there is one: train "
        "with several before you prefer either model."
    )


def _settings(result: dict[str, Any]) -> Table:
    world = {f"world: {key}": value for key, value in result["world"].items()}
    parameters = {f"parameters, {_MODELS[key]}": f"{value:,}" for key, value in result["model_parameters"].items()}
    data = {f"pairs: {Path(key).name}": value[:12] for key, value in result["data_fingerprints"].items()}
    values = {**result["settings"], "training pairs": result["train_pairs"], **parameters, **world, **data}
    return settings_table({key.replace("_", " "): value for key, value in {**values, **result["versions"]}.items()})


def _example(name: str, row: dict[str, Any], rewards: dict[str, dict[str, np.ndarray]]) -> Table:
    """The first pair of a test set."""
    cells = [
        (row[side], f"{row[f'gold_r1_{side}']:.0f}", f"{row[f'gold_r2_{side}']:.2f}",
         *(f"{rewards[model][name][0, column]:.2f}" for model in _MODELS))
        for column, side in enumerate(("chosen", "rejected"))
    ]  # fmt: skip
    header = ("response (better first)", "gold r1", "gold r2", *(f"{label} reward" for label in _MODELS.values()))
    return Table(header, cells, caption=f"{TEST_SETS[name]}: {row['prompt']}")


def _panels(height: float, *shape: int, **shared: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.4, height), layout="constrained")
    return figure, figure.subplots(*shape, **shared)


def _error_bars(parts: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Accuracies ``(N,)`` and how far their intervals reach below and above ``(2, N)``."""
    accuracy = np.array([part["accuracy"] for part in parts])
    low, high = np.array([part["accuracy_interval"] for part in parts]).T
    return accuracy, np.maximum([accuracy - low, high - accuracy], 0)


def _accuracy_figure(result: dict[str, Any]) -> Figure:
    figure, axes = _panels(4.2)
    places = np.arange(len(TEST_SETS))
    for shift, model in ((-0.19, "standard"), (0.19, "inform")):
        heights, errors = _error_bars([result["test_sets"][name][model] for name in TEST_SETS])
        axes.bar(places + shift, heights, 0.36, color=_COLORS[model], label=_MODELS[model])
        axes.errorbar(places + shift, heights, errors, fmt="none", ecolor=mpl.rcParams["text.color"], capsize=4)
    rule = [result["test_sets"][name]["standard"]["longer_wins_accuracy"] for name in TEST_SETS]
    axes.scatter(places, rule, marker="D", color=_COLORS["rule"], label='rule "longer wins"', zorder=3)
    axes.axhline(0.5, linestyle=":", color=_COLORS["rule"])
    axes.set(ylabel="pairs ranked right (share)", ylim=(0, 1))
    axes.set_xticks(places, [label.replace(" ", "\n").replace("-", "-\n") for label in TEST_SETS.values()])
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def _margin_figure(rows: dict[str, list[dict[str, Any]]], rewards: dict[str, dict[str, np.ndarray]]) -> Figure:
    figure, grid = _panels(5.6, 2, 2, sharex=True, sharey="row")
    for axes_row, (model, label) in zip(grid, _MODELS.items(), strict=True):
        for axes, name in zip(axes_row, ("in_distribution", "bias_reversed"), strict=True):
            words = [len(row["chosen"].split()) - len(row["rejected"].split()) for row in rows[name]]
            margins = rewards[model][name] @ [1.0, -1.0]
            axes.scatter(words, margins, s=9, alpha=0.45, color=_COLORS[model], linewidths=0)
            axes.axhline(0, color=_COLORS["rule"], linewidth=1)
            axes.axvline(0, color=_COLORS["rule"], linewidth=1)
            axes.set_title(f"{label}, {TEST_SETS[name]}", fontsize=11)
    for axes in grid[:, 0]:
        axes.set_ylabel("reward margin")
    figure.supxlabel("chosen minus rejected length (words)", fontsize=11)
    return figure


def _plane_figure(gaps: dict[str, dict[str, np.ndarray]]) -> Figure:
    figure, panels = _panels(3.9, 1, 2)
    limit = max(1.0, *(np.abs(columns["words difference"]).max() for columns in gaps.values()))
    for axes, (model, label) in zip(panels, _MODELS.items(), strict=True):
        free, related = (gaps[model][name] for name in ("prompt_free_gap", "prompt_related_gap"))
        draw_plane(axes, 1.05 * max(np.abs(free).max(), np.abs(related).max(), 1e-6))
        words = gaps[model]["words difference"]
        points = axes.scatter(free, related, s=9, linewidths=0, c=words, cmap="coolwarm", vmin=-limit, vmax=limit)
        axes.set_title(label, fontsize=11)
    panels[1].set_ylabel("")
    figure.colorbar(points, ax=panels, location="bottom", label="words, chosen - rejected", shrink=0.6)
    return figure


def _training_figure(logs: dict[str, list[dict[str, float]]]) -> Figure:
    figure, axes_list = _panels(6.4, 3, 1, sharex=True)
    labels = {"eval_bradley_terry_loss": "Bradley-Terry loss (nats)", "eval_accuracy": "accuracy (share)"}
    for axes, (key, label) in zip(axes_list, labels.items(), strict=False):
        for model, log in logs.items():
            points = [(line["step"], line[key]) for line in log if key in line]
            axes.plot(*np.array(points).T, "o-", markersize=4, color=_COLORS[model], label=_MODELS[model])
        axes.set(ylabel=label)
    axes_list[0].axhline(np.log(2), linestyle=":", color=_COLORS["rule"], label="coin toss")
    axes_list[0].legend(ncols=3)
    kl = [(line["step"], line["kl_nats"]) for line in logs["inform"] if "kl_nats" in line]
    axes_list[2].plot(*np.array(kl).T, color=_COLORS["inform"])
    axes_list[2].set(ylabel="InfoRM KL (nats)", xlabel="training step", ylim=(0, None))
    figure.align_ylabels()
    return figure


def _reliability_figure(result: dict[str, Any]) -> Figure:
    figure, axes = _panels(4.4)
    axes.plot([0.5, 1], [0.5, 1], linestyle="--", color=_COLORS["rule"], label="as sure as it should be")
    for model, label in _MODELS.items():
        calibration = result["test_sets"]["in_distribution"][model]["calibration"]
        bins = calibration["bins"]
        label += f", calibration error {calibration['expected_calibration_error']:.3f}"
        confidences = [part["mean_confidence"] for part in bins]
        axes.errorbar(confidences, *_error_bars(bins), fmt="o-", capsize=3, color=_COLORS[model], label=label)
    axes.set(xlabel="predicted probability, sigmoid(|margin|)", ylabel="pairs ranked right (share)", ylim=(0, 1.02))
    axes.legend(loc="lower right")
    return figure
