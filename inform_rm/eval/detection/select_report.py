"""Table, figure and page of `inform-rm select`."""

from typing import Any

from matplotlib.figure import Figure

from inform_rm.eval.report import result_settings
from inform_rm.util.colors import SKY, VERMILION
from inform_rm.util.page import Block, Heading, Image, Page, Table, figure_png

_CAPTION = (
    "CSI of each model's candidate responses over the mean CSI of halves of the reference in the same latents; bars "
    "are 95 % bootstrap intervals of the candidates. At the dashed line a candidate is like the reference."
)


def models_table(result: dict[str, Any]) -> Table:
    """A line a model, the best first; with the choice by gold where it is known."""
    has_gold = "chosen_by_gold" in result
    header = ["model", "K", "beta", "n", "rank in the null", "CSI / null", "CSI per response", "95 % interval", "MOP"]
    header += ["gold", "95 % interval", "place by gold"] * has_gold
    rows = []
    for entry in result["models"]:
        is_inform = entry.get("architecture") == "inform"
        row = [entry["name"], *((entry["latent_dim"], f"{entry['beta']:g}") if is_inform else ("", ""))]
        row += [entry[name] for name in ("num_responses", "null_rank", "csi_over_null", "csi_normalized")]
        row += [entry["csi_normalized_interval"], entry["mop"]]
        row += [entry["gold"], entry["gold_interval"], entry["gold_place"]] if has_gold else []
        rows.append(row)
    return Table(header, rows)


def models_figure(result: dict[str, Any]) -> Figure:
    """CSI over that of the null, a line a model."""
    entries = result["models"][::-1]
    figure = Figure(figsize=(6.8, 1.2 + 0.45 * len(entries)), layout="constrained")
    axes = figure.subplots()
    for place, entry in enumerate(entries):
        unit = entry["csi_null"] or 1.0
        low, high = (value / unit for value in entry["csi_normalized_interval"])
        axes.plot([low, high], [place, place], color=SKY, linewidth=3)
        axes.plot(entry["csi_over_null"], place, "o", color=VERMILION)
    axes.axvline(1.0, color="grey", linestyle="--", linewidth=0.9)
    axes.set_yticks(range(len(entries)), [entry["name"] for entry in entries])
    axes.set_xlabel("CSI / CSI of halves of the reference")
    return figure


def selection_page(title: str, result: dict[str, Any]) -> Page:
    """The result of `select`."""
    blocks: list[Block] = [
        models_table(result), *_notes(result), Image(figure_png(models_figure(result)), _CAPTION, "models.png"),
        Heading("Settings"), result_settings(result),
    ]  # fmt: skip
    return Page(title, blocks)


def _notes(result: dict[str, Any]) -> list[str]:
    splits = result["settings"]["num_splits"]
    texts = [
        "Order: by rank in the null, the share of the reference's halves with at least the candidate's CSI (1: like "
        f"the reference; the smallest there is is 1 / {splits + 1}), then by CSI over their mean. Units of CSI differ "
        "between latent spaces; neither of these does. CSI alone does not say that a model is right: latents that "
        "tell nothing have none (compare accuracy, too).",
    ]
    if len(result["tied"]) > 1:
        texts.append(f"The null does not tell apart {', '.join(result['tied'])}.")
    if "chosen_by_gold" in result:
        same = result["chosen"] == result["chosen_by_gold"]
        texts.append(
            f"By gold reward the choice is {result['chosen_by_gold']}, {'the same' if same else 'another one'}; it is "
            "known in generated worlds only."
        )
    if any(entry["kind"] != "latent" for entry in result["models"]):
        texts.append(
            "A model without a latent space is measured by hidden states, where overoptimized responses need not "
            "stand out (arXiv:2402.09345, appendix F)."
        )
    return texts
