"""Choice among trained models, of different K and beta for instance, by CSI (arXiv:2402.09345, appendix E.2).

CSI is in the units of a latent space, and models have spaces of their own. So each model's CSI is compared with what
halves of the reference give in its own space, and models are ordered by that rank.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from inform_rm.data.response_rows import ScoreRow, score_rows_or_faults
from inform_rm.data.sources import Source
from inform_rm.errors import InputError, shown
from inform_rm.eval.detection.detect import detect
from inform_rm.eval.detection.report import DetectionResult
from inform_rm.eval.detection.settings import DetectionSettings
from inform_rm.eval.frame import Result, settings_of
from inform_rm.scoring.scorer import RewardScorer, as_scorer
from inform_rm.util.colors import SKY, VERMILION
from inform_rm.util.files import check_output_directory
from inform_rm.util.page import Block, Table

_CAPTION = (
    "CSI of each model's candidate responses over the mean CSI of halves of the reference in the same latents; bars "
    "are 95 % bootstrap intervals of the candidates. At the dashed line a candidate is like the reference."
)
_HEAD = ("architecture", "latent_dim", "beta", "decoder", "kl_reduction")


@dataclass(frozen=True, kw_only=True)
class SelectionResult(Result):
    """Models in the order of the choice by CSI.

    Attributes:
        models: the best first, each with its ``name``, ``model`` and fingerprint, settings of its head, ``candidate``,
            ``csi_normalized`` with interval, ``csi_null`` (mean of the reference's halves), ``csi_over_null``,
            ``null_rank``, ``mop``, ``mean_reward``, and ``gold`` with interval and ``gold_place``.
        chosen: the first one's name.
        tied: names that have the first one's rank, itself among them: the null does not tell them apart.
        chosen_by_gold: name of the one with the most gold reward.
    """

    models: list[dict[str, Any]]
    chosen: str
    tied: list[str]
    chosen_by_gold: str | None = None

    @property
    def title(self) -> str:
        """How many there were."""
        return f"Choice among {len(self.models)} reward models by CSI"

    def table(self) -> Table:
        """A line a model, the best first; with the choice by gold where it is known."""
        has_gold = self.chosen_by_gold is not None
        header = ["model", "K", "beta", "n", "rank in the null", "CSI / null", "CSI per response", "95 % interval"]
        header += ["MOP", *(["gold", "95 % interval", "place by gold"] if has_gold else [])]
        rows = []
        for entry in self.models:
            is_inform = entry.get("architecture") == "inform"
            row = [entry["name"], *((entry["latent_dim"], f"{entry['beta']:g}") if is_inform else ("", ""))]
            row += [entry[name] for name in ("num_responses", "null_rank", "csi_over_null", "csi_normalized")]
            row += [entry["csi_normalized_interval"], entry["mop"]]
            row += [entry["gold"], entry["gold_interval"], entry["gold_place"]] if has_gold else []
            rows.append(row)
        return Table(header, rows)

    def figure(self) -> Figure:
        """CSI of each model over that of the reference's halves."""
        entries = self.models[::-1]
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

    def _blocks(self) -> list[Block]:
        texts = [
            "Order: by rank in the null, the share of the reference's halves with at least the candidate's CSI (1: "
            f"like the reference; the smallest there is is 1 / {self.settings['num_splits'] + 1}), then by CSI over "
            "their mean. Units of CSI differ between latent spaces; neither of these does. CSI alone does not say "
            "that a model is right: latents that tell nothing have none (compare accuracy, too).",
        ]
        if len(self.tied) > 1:
            texts.append(f"The null does not tell apart {', '.join(self.tied)}.")
        if self.chosen_by_gold is not None:
            same = self.chosen == self.chosen_by_gold
            texts.append(
                f"By gold reward the choice is {self.chosen_by_gold}, {'the same' if same else 'another one'}; it is "
                "known in generated worlds only."
            )
        if any(entry["kind"] != "latent" for entry in self.models):
            texts.append(
                "A model without a latent space is measured by hidden states, where overoptimized responses need not "
                "stand out (arXiv:2402.09345, appendix F)."
            )
        return [self.table(), *texts, self._drawn(_CAPTION, "models.png")]


def select(
    models: Mapping[str, str | Path | torch.nn.Module | RewardScorer],
    reference: Source,
    candidates: Source | Mapping[str, Source],
    output: str | Path | None = None,
    *,
    gold: str | None = None,
    tokenizer: Any = None,
    progress: bool = True,
    **options: Any,
) -> SelectionResult:
    """Order models by how little the responses to them stand out from a reference in their own latents.

    Appendix E.2 of arXiv:2402.09345 chooses K and beta so that the responses of the policy trained against a model
    have a small CSI. The order is by ``null_rank``, the share of the reference's halves whose CSI is at least as large
    (1: like the reference), then by CSI over the mean of these halves.

    Args:
        models: trained models by name.
        reference: responses before any optimisation, as for `inform_rm.detect`.
        candidates: for each model, by its name, responses that were optimised against it (of a policy, or the best of
            n); or one set for all, which asks another question: in whose latents do these stand out least.
        output: folder for ``result.json``, ``result.html``, ``result.md`` and ``models.png``; ``None`` writes nothing.
        gold: column of the candidates with the gold reward of each response, where there is one, as in the generated
            world: the choice by its mean stands beside the choice by CSI.
        tokenizer: see `RewardScorer`.
        progress: show progress bars.
        options: fields of `DetectionSettings` and keywords of `RewardScorer`.

    Returns:
        The models in order, and the choice.

    Raises:
        InputError: fewer than two models, other names among the candidates, a row without a gold reward, or what
            `inform_rm.detect` refuses.
    """
    settings, scorer_options = settings_of(DetectionSettings, options)
    if len(models) < 2:
        raise InputError(f"models: {list(models)}; expected at least two to choose from.")
    sets: Mapping[str, Source] = candidates if isinstance(candidates, Mapping) else dict.fromkeys(models, candidates)
    if set(sets) != set(models):
        raise InputError(f"candidates: names {sorted(sets)} are not those of the models, {sorted(models)}.")
    folder = None if output is None else check_output_directory(output)
    golds = {name: None if gold is None else _gold(source, gold, settings) for name, source in sets.items()}
    found = []
    for name, model in models.items():
        scorer = as_scorer(model, tokenizer, scorer_options)
        result = detect(scorer, reference, {name: sets[name]}, progress=progress, **asdict(settings))
        source = sets[name]
        label = str(source) if isinstance(source, str | Path) else name
        found.append(
            {"name": name, "candidate": label, **_figures(result, scorer.model.config), **(golds[name] or {})}
        )
    found.sort(key=lambda entry: (-entry["null_rank"], entry["csi_over_null"]))
    by_gold = sorted(found, key=lambda entry: -entry.get("gold", 0.0))
    for place, entry in enumerate(by_gold if gold is not None else (), start=1):
        entry["gold_place"] = place
    given = {"reference": str(reference) if isinstance(reference, str | Path) else "in memory", "gold": gold}
    given |= {name: value for name, value in asdict(settings).items() if name != "seed"}
    selection = SelectionResult(
        settings={name: value for name, value in given.items() if value is not None},
        seed=settings.seed,
        models=found,
        chosen=found[0]["name"],
        tied=[entry["name"] for entry in found if entry["null_rank"] == found[0]["null_rank"]],
        chosen_by_gold=by_gold[0]["name"] if gold is not None else None,
    )
    if folder is not None:
        selection.save(folder)
    return selection


def _figures(result: DetectionResult, config: Any) -> dict[str, Any]:
    """What of a detection stands in the choice."""
    (part,) = result.candidates
    by_chance, value = result.null["csi_normalized"]["mean"], part["csi_normalized"]
    kept = ("num_responses", "csi_normalized", "csi_normalized_interval", "mop", "mop_interval", "mean_reward")
    return {
        "model": result.model,
        "model_fingerprint": result.model_fingerprint,
        "kind": result.kind,
        **{name: getattr(config, name) for name in _HEAD if hasattr(config, name)},
        **{name: part[name] for name in kept},
        "csi_null": by_chance,
        "csi_over_null": value / by_chance if by_chance else float(value > 0),
        "null_rank": part["csi_normalized_null_rank"],
    }


def _gold(source: Source, column: str, settings: DetectionSettings) -> dict[str, Any]:
    """Mean gold reward of a set and its 95 % interval (normal)."""
    values = []
    for row in score_rows_or_faults(source, settings.columns):
        value: Any = row.fields.get(column)
        if isinstance(row, ScoreRow):
            try:
                values.append(float("nan" if isinstance(value, bool) else value))  # a cell of a CSV file is text
            except (TypeError, ValueError):
                values.append(np.nan)
            if not np.isfinite(values[-1]):
                raise InputError(f"{row.where}: column {column!r} holds {shown(value)}; expected its gold reward.")
    mean, half = np.mean(values or [0.0]), 1.96 * np.std(values or [0.0]) / np.sqrt(max(1, len(values)))
    return {"gold": float(mean), "gold_interval": [float(mean - half), float(mean + half)]}
