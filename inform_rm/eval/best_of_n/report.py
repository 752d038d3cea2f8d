"""Result, plot and page of best-of-n overoptimization (`inform_rm.eval.best_of_n.simulate`)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from inform_rm.eval.frame import Result, unwritten
from inform_rm.util.colors import SERIES
from inform_rm.util.page import Block, Heading, Table, settings_table

CURVES_CAPTION = (
    "Gain over a response drawn at random, against KL divergence from the policy, with 95 % intervals over prompts. "
    "Left: gold reward of what the proxy chose; the ring marks its peak. Right: the proxy's own reward, in its "
    "standard deviations within prompts, so that proxies of any scale can be compared. Where the right curve rises "
    "and the left one falls, the proxy is overoptimized."
)


@dataclass(frozen=True, kw_only=True)
class BestOfNResult(Result):
    """What `simulate` found.

    Attributes:
        ns: numbers of responses to choose from.
        kl_nats: of the policy that chooses from so many.
        num_prompts: that were answered.
        num_responses: to each prompt.
        distinct_responses: within their prompt, of all prompts together.
        empty_responses: that hold no text.
        cut_responses: of a language model, those that had not ended.
        intervals: what the 95 % intervals are over.
        gold: ``model`` and ``identity``.
        policy: the same of what wrote the responses.
        proxies: by name (``"proxy"`` if there is one): likewise, and what
            `inform_rm.eval.best_of_n.simulate.overoptimization_curves` gives.
        prompts_fingerprint: SHA-256.
        responses: columns ``prompt_id``, ``prompt``, ``response``, ``gold`` and one of each proxy, a row a response.
    """

    ns: list[int]
    kl_nats: list[float]
    num_prompts: int
    num_responses: int
    distinct_responses: int
    empty_responses: int
    cut_responses: int | None = None
    intervals: str
    gold: dict[str, Any]
    policy: dict[str, Any]
    proxies: dict[str, dict[str, Any]]
    prompts_fingerprint: str
    responses: dict[str, Any] = unwritten()

    title = "Best-of-n overoptimization"

    def table(self) -> Table:
        """The peak of the gold reward for each proxy."""
        header = ("proxy", "peak n", "peak KL", "95 % interval", "gold at the peak", "fall to the last n",
                  "95 % interval")  # fmt: skip
        parts = ("n", "kl_nats", "kl_nats_interval", "gold", "fall", "fall_interval")
        return Table(header, [(name, *map(curve["peak"].get, parts)) for name, curve in self.proxies.items()])

    def figure(self) -> Figure:
        """Gold and proxy against KL."""
        return curves_figure(self.to_dict())

    def settings_table(self) -> Table:
        """What it was computed with."""
        return settings_table(
            self.settings, {"seed": self.seed, "policy": self.policy, "gold": self.gold}, self.versions
        )

    def _blocks(self) -> list[Block]:
        blocks: list[Block] = [
            self.table(),
            f"{self.num_responses} responses to each of {self.num_prompts} prompts by {self.policy['model']}; gold "
            f"reward: {self.gold['model']}. Intervals: {self.intervals}. Of {self.num_prompts * self.num_responses} "
            f"responses {self.distinct_responses} are distinct within their prompt and {self.empty_responses} are "
            "empty.",
            "A fall is never negative, and noise alone makes it positive: take it as real only where the lower end "
            "of its interval is above 0.",
        ]
        if self.cut_responses is not None:
            blocks.append(f"{self.cut_responses} responses had not ended and were cut.")
        blocks.append(self._drawn(CURVES_CAPTION, "curves.png"))
        columns = ("n", "KL", "proxy", "gold", "gold, 95 % interval", "gold, gain", "gain, 95 % interval", "words")
        for name, curve in self.proxies.items():
            gold = [curve["gold"][part] for part in ("mean", "interval", "gain", "gain_interval")]
            rows = zip(self.ns, self.kl_nats, curve["proxy"]["mean"], *gold, curve["words"]["mean"], strict=True)
            blocks += [Heading(f"{name}: {curve['model']}"), Table(columns, list(rows))]
        return blocks


def curves_figure(result: dict[str, Any]) -> Figure:
    """Gold and proxy against KL for every proxy, with intervals and peaks (arXiv:2402.09345, Fig. 3 and 4)."""
    figure = Figure(figsize=(10.0, 4.4), layout="constrained")
    gold_axes, proxy_axes = figure.subplots(1, 2)
    kl = np.array(result["kl_nats"])
    for number, (name, curve) in enumerate(result["proxies"].items()):
        color = SERIES[number % len(SERIES)]
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
