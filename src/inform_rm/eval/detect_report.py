"""Plots and page of `inform-rm detect`."""

import html
import json
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from inform_rm.eval.report import format_interval, html_figure, html_page, html_table

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


def result_html(result: dict[str, Any], points: dict[str, Any], map_png: bytes, steps_png: bytes | None) -> str:
    """The result of `detect` as one self-contained page whose map shows a response when a point is pointed at."""
    outliers = [
        (part["name"], shortened(row["prompt"]), shortened(row["response"]), f"{row['reward']:.2f}",
         f"{row['squared_mahalanobis']:.1f}", f"{row['tail_probability']:.1e}")
        for part in result["candidates"] for row in part["most_outlying"]
    ]  # fmt: skip
    settings = {**result["settings"], "seed": result["seed"], **result["versions"]}
    sections = [
        html_table(*candidate_table(result)),
        *(f"<p>{html.escape(note)}</p>" for note in notes(result)),
        *([html_figure(steps_png, STEPS_CAPTION)] if steps_png is not None else []),
        "<h2>Map</h2>",
        interactive_map(points),
        html_figure(map_png, MAP_CAPTION),
        "<h2>The most outlying responses</h2>",
        html_table(_OUTLIER_HEADER, outliers, of_words=True),
        "<h2>Settings</h2>",
        html_table(("setting", "value"), [(name, str(value)) for name, value in settings.items()], of_words=True),
    ]
    return html_page(f"Overoptimization check of {result['model']}", sections)


def candidate_table(result: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Header and rows: the reference, then every candidate with CSI, MOP, reward and what its texts are like."""
    header = ("candidate", "n", "CSI per response", "95 % interval", "MOP", "95 % interval", "mean reward",
              "words", "repeated trigrams", "stopping rule")  # fmt: skip
    rows: list[tuple[Any, ...]] = [
        (
            part["name"], part["num_responses"], f"{part['csi_normalized']:.3f}",
            format_interval(part["csi_normalized_interval"]), f"{part['mop']:.3f}",
            format_interval(part["mop_interval"]), f"{part['mean_reward']:.2f}", f"{part['mean_words']:.1f}",
            f"{part['repeated_trigrams']:.3f}", "fires" if part.get("stop") else "",
        )
        for part in result["candidates"]
    ]  # fmt: skip
    reference = result["reference"]
    rows.insert(0, (
        "(reference)", reference["num_responses"], "", "", "", "", f"{reference['mean_reward']:.2f}",
        f"{reference['mean_words']:.1f}", f"{reference['repeated_trigrams']:.3f}", "",
    ))  # fmt: skip
    return header, rows


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


def interactive_map(points: dict[str, Any]) -> str:
    """A canvas and its script: pointing at a point shows its response. Texts are data, never markup."""
    # "<" must not appear: "</script>" in a response would end the script.
    data = json.dumps({**points, "colors": _COLORS}).replace("<", "\\u003c")
    legend = ", ".join(f'<b style="color: {color}">{kind}</b>' for kind, color in _COLORS.items())
    return f"""<p>Point at (or tap) a point to read its response: {legend}.</p>
<div id="map" style="position: relative">
<canvas id="points" width="900" height="560" style="width: 100%"></canvas>
<pre id="response" style="min-height: 5rem"></pre></div>
<script type="application/json" id="data">{data}</script>
<script>{_SCRIPT}</script>"""


_SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const canvas = document.getElementById("points"), context = canvas.getContext("2d");
const span = values => [Math.min(...values), Math.max(...values)];
const [left, right] = span(data.x), [low, high] = span(data.y);
const places = data.x.map((x, i) => [
  20 + (canvas.width - 40) * (x - left) / (right - left || 1),
  canvas.height - 20 - (canvas.height - 40) * (data.y[i] - low) / (high - low || 1)]);
function draw(marked) {
  context.clearRect(0, 0, canvas.width, canvas.height);
  places.forEach(([x, y], i) => {
    context.fillStyle = data.colors[data.kind[i]];
    context.beginPath(); context.arc(x, y, i === marked ? 7 : 3.5, 0, 7); context.fill();
  });
}
function show(event) {
  const box = canvas.getBoundingClientRect();
  const x = (event.clientX - box.left) * canvas.width / box.width;
  const y = (event.clientY - box.top) * canvas.height / box.height;
  let nearest = -1, least = 400;
  places.forEach(([a, b], i) => {
    const distance = (a - x) ** 2 + (b - y) ** 2;
    if (distance < least) { least = distance; nearest = i; }
  });
  if (nearest < 0) return;
  draw(nearest);
  document.getElementById("response").textContent =
    `${data.set[nearest]} (${data.kind[nearest]}), reward ${data.reward[nearest].toFixed(2)}\\n\\n` +
    data.response[nearest];
}
canvas.addEventListener("pointermove", show);
canvas.addEventListener("pointerdown", show);
draw(-1);
"""
