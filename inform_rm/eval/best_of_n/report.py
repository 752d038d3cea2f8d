"""Plot and page of best-of-n overoptimization (`inform_rm.eval.best_of_n.simulate`)."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from inform_rm.scoring.scorer import Prompt
from inform_rm.util.files import atomic_write_bytes, atomic_write_text, write_json
from inform_rm.util.page import Block, Heading, Image, Page, Table, figure_png, settings_table

CURVES_CAPTION = (
    "Gain over a response drawn at random, against KL divergence from the policy, with 95 % intervals over prompts. "
    "Left: gold reward of what the proxy chose; the ring marks its peak. Right: the proxy's own reward, in its "
    "standard deviations within prompts, so that proxies of any scale can be compared. Where the right curve rises "
    "and the left one falls, the proxy is overoptimized."
)


def curves_figure(result: dict[str, Any]) -> Figure:
    """Gold and proxy against KL for every proxy, with intervals and peaks (arXiv:2402.09345, Fig. 3 and 4)."""
    figure = Figure(figsize=(10.0, 4.4), layout="constrained")
    gold_axes, proxy_axes = figure.subplots(1, 2)
    kl = np.array(result["kl_nats"])
    for number, (name, curve) in enumerate(result["proxies"].items()):
        color = f"C{number % 10}"
        deviation = curve["proxy_deviation"] or 1.0  # a constant proxy gains nothing in any unit
        for axes, part, unit in ((gold_axes, curve["gold"], 1.0), (proxy_axes, curve["proxy"], deviation)):
            low, high = np.array(part["gain_interval"]).T / unit
            axes.fill_between(kl, low, high, color=color, alpha=0.2, linewidth=0)
            axes.plot(kl, np.array(part["gain"]) / unit, ".-", color=color, label=name)
        peak = result["ns"].index(curve["peak"]["n"])
        gold_axes.plot(kl[peak], curve["gold"]["gain"][peak], "o", ms=11, mfc="none", color=color)
    for axes, label in ((gold_axes, "gold reward, gain"), (proxy_axes, "proxy reward, gain / standard deviation")):
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set(xlabel="KL divergence from the policy, nats", ylabel=label)
    gold_axes.legend(fontsize=8)
    return figure


def result_page(result: dict[str, Any], curves_png: bytes) -> Page:
    """The result of `simulate`."""
    header = ("proxy", "peak n", "peak KL", "95 % interval", "gold at the peak", "fall to the last n", "95 % interval")
    parts = ("n", "kl_nats", "kl_nats_interval", "gold", "fall", "fall_interval")
    peaks = [(name, *(curve["peak"][part] for part in parts)) for name, curve in result["proxies"].items()]
    blocks: list[Block] = [Table(header, peaks), *_notes(result), Image(curves_png, CURVES_CAPTION)]
    columns = ("n", "KL", "proxy", "gold", "gold, 95 % interval", "gold, gain", "gain, 95 % interval", "words")
    for name, curve in result["proxies"].items():
        gold = [curve["gold"][part] for part in ("mean", "interval", "gain", "gain_interval")]
        rows = zip(result["ns"], result["kl_nats"], curve["proxy"]["mean"], *gold, curve["words"]["mean"], strict=True)
        blocks += [Heading(f"{name}: {curve['model']}"), Table(columns, list(rows))]
    made_by = {"seed": result["seed"], "policy": result["policy"], "gold": result["gold"]}
    blocks += [Heading("Settings"), settings_table(result["settings"], made_by, result["versions"])]
    return Page("Best-of-n overoptimization", blocks)


def write_results(
    folder: Path,
    result: dict[str, Any],
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[str]],
    gold: np.ndarray,
    rewards: dict[str, np.ndarray],
) -> None:
    """Files of `simulate`; rewards are ``(P, N)``, responses N texts for each of P prompts."""
    number = len(responses[0])
    texts = [prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False) for prompt in prompts]
    columns = {
        "prompt_id": np.repeat(np.arange(len(prompts)), number),
        "prompt": [text for text in texts for _ in range(number)],
        "response": [text for row in responses for text in row],
        "gold": gold.ravel(),
        **{name: values.ravel() for name, values in rewards.items()},
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    atomic_write_bytes(folder / "responses.parquet", buffer.getvalue())
    curves = figure_png(curves_figure(result))
    atomic_write_bytes(folder / "curves.png", curves)
    atomic_write_text(folder / "result.html", result_page(result, curves).html())
    write_json(folder / "result.json", result)  # last: its presence says that the rest is complete


def _notes(result: dict[str, Any]) -> list[str]:
    responses = result["num_prompts"] * result["num_responses"]
    notes = [
        f"{result['num_responses']} responses to each of {result['num_prompts']} prompts by "
        f"{result['policy']['model']}; gold reward: {result['gold']['model']}. Intervals: {result['intervals']}. "
        f"Of {responses} responses {result['distinct_responses']} are distinct within their prompt and "
        f"{result['empty_responses']} are empty.",
        "A fall is never negative, and noise alone makes it positive: take it as real only where the lower end "
        "of its interval is above 0.",
    ]
    if "cut_responses" in result:
        notes.append(f"{result['cut_responses']} responses had not ended and were cut.")
    return notes
