"""Plots and page of `inform-rm detect`."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from inform_rm.eval.report import result_settings
from inform_rm.util.page import Heading, Image, Page, PointMap, Table, format_interval

_COLORS = {"reference": "#9bb7d4", "candidate": "#e0a458", "outlier": "#c2413b"}
_SHOWN_CHARACTERS = 400
_OUTLIER_HEADER = ("candidate", "prompt", "response", "reward", "squared distance", "tail probability")
MAP_CAPTION = (
    "t-SNE map of the latents: reference responses, candidate responses, and those candidates whose distance from "
    "the reference is beyond chance (tail probability below alpha). Distances between far points of such a map mean "
    "little."
)
STEPS_CAPTION = (
    "Candidates in the order in which they were given; intervals are 95 % bootstrap intervals. The grey band is what "
    "halves of the reference give against each other (95 %). A dashed line marks where the stopping rule fires."
)


def map_figure(points: dict[str, list[Any]]) -> Figure:
    """The map of arXiv:2402.09345, Fig. 7, from ``x``, ``y`` and ``kind`` of each point."""
    figure = Figure(figsize=(6.8, 5.6), layout="constrained")
    axes = figure.subplots()
    kinds = np.array(points["kind"])
    for kind, color in _COLORS.items():
        mask = kinds == kind
        if mask.any():
            axes.scatter(
                np.array(points["x"])[mask], np.array(points["y"])[mask], s=10, c=color, label=f"{kind} ({mask.sum()})"
            )
    axes.set(xticks=[], yticks=[])
    axes.legend()
    return figure


def steps_figure(result: dict[str, Any]) -> Figure:
    """CSI, MOP, mean reward and length over the candidates (arXiv:2402.09345, Fig. 8 and 14)."""
    candidates = result["candidates"]
    places = np.arange(len(candidates))
    figure = Figure(figsize=(9.5, 6.4), layout="constrained")
    panels = {
        "CSI per response": "csi_normalized", "outlier probability (MOP)": "mop", "mean reward": "mean_reward",
        "mean words": "mean_words",
    }  # fmt: skip
    for axes, (title, name) in zip(figure.subplots(2, 2, sharex=True).flat, panels.items(), strict=True):
        values = np.array([part[name] for part in candidates])
        axes.plot(places, values, "o-", color=_COLORS["outlier"])
        if f"{name}_interval" in candidates[0]:
            low, high = np.array([part[f"{name}_interval"] for part in candidates]).T
            axes.fill_between(places, low, high, color=_COLORS["outlier"], alpha=0.2, linewidth=0)
        if name in result["null"]:
            axes.axhspan(*result["null"][name]["interval"], color="grey", alpha=0.25, linewidth=0)
        if name in result["reference"]:
            axes.axhline(result["reference"][name], color="grey", linewidth=0.9)
        for place, part in zip(places, candidates, strict=True):
            if part.get("stop"):
                axes.axvline(place, color="grey", linestyle="--", linewidth=0.9)
        axes.set_title(title)
        axes.set_xticks(places, [part["name"] for part in candidates], rotation=30, ha="right", fontsize=8)
    return figure


def result_page(result: dict[str, Any], points: dict[str, Any], map_png: bytes, steps_png: bytes | None) -> Page:
    """The result of `detect`, whose map shows a response when a point is pointed at."""
    outliers = [
        (part["name"], shortened(row["prompt"]), shortened(row["response"]), f"{row['reward']:.2f}",
         f"{row['squared_mahalanobis']:.1f}", f"{row['tail_probability']:.1e}")
        for part in result["candidates"] for row in part["most_outlying"]
    ]  # fmt: skip
    return Page(
        f"Overoptimization check of {result['model']}",
        [
            candidate_table(result),
            *notes(result),
            *([Image(steps_png, STEPS_CAPTION)] if steps_png is not None else []),
            Heading("Map"),
            PointMap(points, _COLORS),
            Image(map_png, MAP_CAPTION),
            Heading("The most outlying responses"),
            Table(_OUTLIER_HEADER, outliers, align="lllrrr"),
            Heading("Settings"),
            result_settings(result),
        ],
    )


def candidate_table(result: dict[str, Any]) -> Table:
    """The reference, then every candidate with CSI, MOP, reward and what its texts are like."""
    header = ("candidate", "n", "CSI per response", "95 % interval", "MOP", "95 % interval", "mean reward",
              "words", "repeated trigrams", "stopping rule")  # fmt: skip
    detection = ("csi_normalized", "csi_normalized_interval", "mop", "mop_interval")
    reference = {"name": "(reference)", **dict.fromkeys(detection), **result["reference"]}
    rows = [
        (
            part["name"], part["num_responses"], *(part[name] for name in detection),
            f"{part['mean_reward']:.2f}", f"{part['mean_words']:.1f}", part["repeated_trigrams"],
            "fires" if part.get("stop") else "",
        )
        for part in [reference, *result["candidates"]]
    ]  # fmt: skip
    return Table(header, rows)


def notes(result: dict[str, Any]) -> list[str]:
    """Whose latents these are, what comes by chance, and how far to trust it."""
    null = result["null"]
    texts = [
        f"Latents: {'InfoRM latent means' if result['kind'] == 'latent' else 'hidden states'} of {result['model']}, "
        f"{result['dimensions']} dimensions, DBSCAN eps {result['eps']:.3g}.",
        "False alarms: halves of the reference against each other, "
        f"{null['splits']} times, give CSI per response {format_interval(null['csi_normalized']['interval'])} and MOP "
        f"{format_interval(null['mop']['interval'])} (95 % of the splits).",
    ]
    parts = {"reference": result["reference"], **{part["name"]: part for part in result["candidates"]}}
    left_out = [f"{part['bad_rows']} of {name}" for name, part in parts.items() if part.get("bad_rows")]
    if left_out:
        texts.append(f"Bad rows left out: {', '.join(left_out)}.")
    if result["kind"] != "latent":
        texts.append(
            "This model has no latent space of its own. For hidden states of ordinary reward models the authors find "
            "that overoptimized responses do not stand out (arXiv:2402.09345, appendix F): read CSI with care."
        )
    return texts


def shortened(text: str) -> str:
    """At most 400 characters of a text."""
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " …"
