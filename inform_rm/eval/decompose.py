"""How much of a reward model's preference the response alone decides: an audit on preference data."""

import itertools
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor

from inform_rm.data.sources import Sources
from inform_rm.decomposition.gap_grid import GapGrid, distinct_prompts, gap_grid
from inform_rm.decomposition.information import InformationTerms, information_terms, mutual_information
from inform_rm.decomposition.likelihoods import ResponseLikelihood, load_likelihood
from inform_rm.decomposition.prompt_free_gap import decompose_gaps, sample_prompts, tempered_weights
from inform_rm.errors import InputError
from inform_rm.eval import decompose_report as report
from inform_rm.eval.accuracy import share_right
from inform_rm.eval.frame import JOURNAL_FILE, Frame, ModelResult, parquet, progress_bars, settings_of, unwritten
from inform_rm.eval.sources import PairSettings, load_sources, warn_of_left_out
from inform_rm.scoring.scorer import RewardScorer
from inform_rm.util.intervals import wilson_interval
from inform_rm.util.page import Page, Table, figure_png

LIKELIHOOD_JOURNAL_FILE = "likelihoods.partial"
WEIGHTS = ("uniform", "behavior")
_LIST_ITEM = re.compile(r"^\s*([-*•]|\d+[.)])\s", re.MULTILINE)
FEATURES = {
    "characters": len,
    "words": lambda text: len(text.split()),
    "lines": lambda text: text.count("\n") + 1,
    "list items": lambda text: len(_LIST_ITEM.findall(text)),
    "exclamation marks": lambda text: text.count("!"),
}
_SHOWN_PAIRS = 20
_TERM = "_term"  # ends the columns of `InformationTerms`


@dataclass(frozen=True, kw_only=True)
class DecompositionSettings(PairSettings):
    """How reward gaps are decomposed: keywords of `decompose`.

    Attributes:
        num_prompts: prompts for each pair, its own among them.
        stratify: draw only prompts of the same ``subset``: those of a maths set say little about a chat pair.
        weights: ``"uniform"``: all prompts of a pair count the same; ``"behavior"``: as likely as ``behavior_model``
            finds both responses under them, tempered (`inform_rm.decomposition.prompt_free_gap.tempered_weights`).
        behavior_model: causal language model that is near what wrote the responses: a folder, Hub id or loaded model;
            a loaded one must have the reward model's tokenizer.
        length_normalized: use mean log-likelihoods of the tokens instead of sums.
        ess_target: effective sample size that tempering keeps, as a share of the prompts.
        color: what colours the plane of D1 and D2: ``"length"`` (characters, chosen - rejected) or ``"subset"``.
    """

    num_prompts: int = 16
    stratify: bool = False
    weights: str = "uniform"
    behavior_model: str | Path | torch.nn.Module | None = None
    length_normalized: bool = False
    ess_target: float = 0.25
    color: str = "length"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.num_prompts, bool) or not isinstance(self.num_prompts, int) or self.num_prompts < 2:
            raise InputError(f"num_prompts: {self.num_prompts!r}; expected at least 2, the pair's own and one other.")
        if self.weights not in WEIGHTS or (self.weights == "behavior") != (self.behavior_model is not None):
            raise InputError(
                f"weights: {self.weights!r} with behavior_model {self.behavior_model!r}; expected 'uniform' without "
                "one, or 'behavior' with one."
            )
        if not 0 < self.ess_target <= 1:
            raise InputError(f"ess_target: {self.ess_target!r}; it is a share of the prompts, above 0 and at most 1.")
        if self.color not in report.COLORS:
            raise InputError(f"color: {self.color!r}; expected one of {', '.join(report.COLORS)}.")

    def to_dict(self) -> dict[str, Any]:
        """What decides the figures."""
        without = {"behavior_model", "color"}
        without |= {"length_normalized", "ess_target"} if self.behavior_model is None else set()
        return {name: value for name, value in super().to_dict().items() if name not in without}


@dataclass(frozen=True, kw_only=True)
class DecompositionResult(ModelResult):
    """How much of a reward model's preference the response alone decides.

    Attributes:
        data: per source what was read and left out.
        distinct_prompts: from which the other prompts of a pair are drawn.
        num_pairs: that were decomposed.
        left_out: pairs by reason, non-finite rewards with the pairs' ids.
        cost: tokens that were computed, and that one pass a reward would take.
        accuracy: share of pairs with the larger reward for the chosen response, ties half.
        accuracy_interval: 95 %, Wilson, as those of the other shares.
        response_decides_interval: see above.
        sign_flips_interval: see above.
        mean_standard_error: of D2, from the choice of the prompts.
        mean_effective_sample_size: of the prompts' weights, as a number of prompts.
        response_decides: share of pairs with abs(D2) > abs(D1): no prompt-related part of this size could turn the
            preference.
        prompt_sensitivity: share of the gaps' variance that lies between prompts of one pair; 0 for a model blind to
            prompts.
        sign_flips: share of pairs whose preference is another one under at least one other prompt.
        not_converged: gaps whose root was not found.
        correlations: Spearman, of each gap with differences of features that the response alone has.
        quadrants: pairs and accuracy by the signs of both parts.
        information: mutual information in nats, each with a 95 % interval over pairs: ``preference``, of which
            ``responses`` are told by the responses alone and ``prompt`` is added by the prompt; ``prompt_free`` and
            ``prompt_related`` of the two parts (`inform_rm.decomposition.information`).
        subsets: shares by subset, where there are several.
        pairs: column by name, one row a pair: the content of ``pairs.parquet``.
    """

    data: list[dict[str, Any]]
    distinct_prompts: int
    left_out: dict[str, Any]
    cost: dict[str, int]
    num_pairs: int
    accuracy: float
    accuracy_interval: list[float]
    response_decides: float
    response_decides_interval: list[float]
    sign_flips: float
    sign_flips_interval: list[float]
    mean_standard_error: float
    mean_effective_sample_size: float
    not_converged: int
    correlations: dict[str, dict[str, float]]
    quadrants: list[dict[str, Any]]
    information: dict[str, dict[str, Any]]
    prompt_sensitivity: float | None = None
    subsets: dict[str, dict[str, Any]] | None = None
    pairs: dict[str, np.ndarray] = unwritten()
    color: str = unwritten(default="length")

    @property
    def title(self) -> str:
        """What was decomposed."""
        return f"Prompt-free and prompt-related reward of {self.model}"

    def table(self) -> Table:
        """The shares of all pairs and of each subset."""
        return report.share_table(self.to_dict())

    def figure(self) -> Figure:
        """The plane of D2 and D1, one point a pair."""
        return report.plane_figure(self.pairs, self.color)

    def page(self) -> Page:
        """All of it."""
        spread = figure_png(report.spread_figure(self.pairs))
        return report.result_page(self.to_dict(), spread, figure_png(self.figure()))


def decompose(
    model: str | Path | torch.nn.Module | RewardScorer,
    data: Sources,
    output: str | Path | None = None,
    *,
    tokenizer: Any = None,
    progress: bool = True,
    **options: Any,
) -> DecompositionResult:
    """Decompose the reward gaps of any reward model into prompt-free and prompt-related parts (arXiv:2504.06020).

    Both responses of every pair are scored under the pair's own prompt and under prompts of other pairs; see
    `inform_rm.decomposition.prompt_free_gap` for what is made of the gaps. With ``output`` the folder receives
    ``pairs.parquet`` (one row a pair), two plots, ``result.md``, ``result.html`` and at last ``result.json``. For
    interruptions and several processes see `inform_rm.evaluate`.

    Args:
        model: folder, Hub id, loaded model, or a `RewardScorer`.
        data: one or several sources of pairs, by name or in memory, as `load_preferences` reads them. Prompts are
            drawn from them, too.
        output: folder for the results; ``None`` only returns them.
        tokenizer: see `RewardScorer`.
        progress: show progress bars.
        options: fields of `DecompositionSettings` (``num_prompts``, ``stratify``, ``weights``, ...; those of
            `inform_rm.eval.sources.PairSettings` are among them) and keywords of `RewardScorer`. A pair that cannot be
            rendered under another's prompt, or becomes too long, does without it.

    Returns:
        The shares, what was left out, and what they were computed with.

    Raises:
        InputError: on bad data, fewer than two distinct prompts, a model that is no reward model, or an unfinished run
            with other settings.
    """
    settings, scorer_options = settings_of(DecompositionSettings, options)
    frame = Frame(model, output, tokenizer, scorer_options, progress)
    scorer = frame.scorer
    with progress_bars(frame.progress):
        sources = load_sources(data, settings)
        # All before the first forward pass, and without the prompts that no pair could be scored under.
        pairs = concatenate_datasets([source.encode(scorer, settings, keep_text=True).dataset for source in sources])
    choice, prompt_rows, population = _chosen_prompts(pairs, settings)
    cells: dict[str, Any] = {"pairs": pairs, "choice": choice, "prompt_rows": prompt_rows, "progress": frame.progress}
    described, run = frame.described_with(settings, [source.record for source in sources])
    with frame.journal(JOURNAL_FILE, run) as journal:
        grid = gap_grid(scorer, **cells, overlong=settings.overlong, journal=journal)
    log_likelihoods = None
    if settings.behavior_model is not None:
        likelihood = _likelihood(settings, scorer, scorer_options)
        with frame.journal(LIKELIHOOD_JOURNAL_FILE, {**run, "likelihood": likelihood.identity()}) as journal:
            # A prompt that it cannot weigh has no weight.
            logs = gap_grid(likelihood, **cells, overlong="drop", on_bad_row="skip", journal=journal)
        log_likelihoods = logs.pair_log_likelihoods.masked_fill(~grid.used, -torch.inf)
    rows, left_out = _decomposable(pairs, grid, log_likelihoods)
    weights = grid.used[rows].double()
    if log_likelihoods is not None:
        weights, _ = tempered_weights(log_likelihoods[rows], settings.ess_target)
    table = _table(pairs.select(rows.tolist()), grid.gaps[rows], grid.used[rows], weights, population[rows])
    for source in sources:
        warn_of_left_out(source.record)
    result = DecompositionResult(
        **described,
        distinct_prompts=len(prompt_rows),
        left_out=left_out,
        cost={"tokens_computed": grid.tokens_computed, "tokens_of_a_plain_loop": grid.tokens_plain},
        **summary(table),
        pairs=table,
        color=settings.color,
    )
    columns = {name.replace(" ", "_"): values.tolist() for name, values in table.items()}
    frame.finish(result, {"pairs.parquet": parquet(columns)})
    return result


def _chosen_prompts(pairs: Dataset, settings: DecompositionSettings) -> tuple[Tensor, Tensor, Tensor]:
    """The prompts of each pair (`sample_prompts`), the row of each prompt, and how many each pair's come from."""
    prompt_rows, own = distinct_prompts(pairs)
    if len(prompt_rows) < 2:
        raise InputError(
            "data: all pairs have the same prompt. What a response is worth without its prompt shows only under other "
            "prompts: add pairs with other prompts."
        )
    strata = torch.zeros(len(prompt_rows), dtype=torch.long)
    if settings.stratify:
        strata = torch.from_numpy(np.unique(np.array(pairs["subset"][:])[prompt_rows], return_inverse=True)[1])
    choice = sample_prompts(own, settings.num_prompts, len(prompt_rows), seed=settings.seed, strata=strata)
    return choice, prompt_rows, torch.bincount(strata)[strata[own]]


def _likelihood(
    settings: DecompositionSettings, scorer: RewardScorer, scorer_options: dict[str, Any]
) -> ResponseLikelihood:
    model = settings.behavior_model
    own: dict[str, Any] = {
        "length_normalized": settings.length_normalized, "split_over_processes": scorer.split_over_processes
    }  # fmt: skip
    if not isinstance(model, str | Path):
        return ResponseLikelihood(model, scorer.tokenizer, **own)
    passed_on = {"chat_template", "device", "trust_remote_code"} & scorer_options.keys()
    return load_likelihood(model, **own, **{name: scorer_options[name] for name in passed_on})


def _decomposable(pairs: Dataset, grid: GapGrid, log_likelihoods: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
    """The rows of pairs that can be decomposed, and counts of the others."""
    own_used = grid.used[:, 0]
    alone = own_used & (grid.used.sum(dim=1) == 1)
    nonfinite = own_used & (grid.used & ~grid.gaps.isfinite()).any(dim=1)
    kept = own_used & ~alone & ~nonfinite
    left_out = {
        "overlong": int((~own_used).sum()),
        "no_other_prompt": int(alone.sum()),
        "nonfinite_rewards": int(nonfinite.sum()),
        "nonfinite_ids": [pairs[int(row)]["id"] for row in nonfinite.nonzero()[:_SHOWN_PAIRS, 0]],
    }
    if log_likelihoods is not None:
        unlikely = kept & ~log_likelihoods.isfinite().any(dim=1)
        kept &= ~unlikely
        left_out |= {"no_likelihood": int(unlikely.sum())} if unlikely.any() else {}
    if not kept.any():
        raise InputError(f"data: no pair can be decomposed; left out: {left_out}.")
    return kept.nonzero()[:, 0], left_out


def _table(pairs: Dataset, gaps: Tensor, used: Tensor, weights: Tensor, population: Tensor) -> dict[str, np.ndarray]:
    """Columns by name, one row a pair; of the gaps ``(P, M)`` those that are ``used`` count."""
    table: dict[str, Any] = {"id": [], "subset": [], **{f"{name} difference": [] for name in FEATURES}}
    for batch in pairs.iter(1000):
        table["id"] += batch["id"]
        table["subset"] += batch["subset"]
        for name, feature in FEATURES.items():
            both = zip(batch["chosen"], batch["rejected"], strict=True)
            table[f"{name} difference"] += [feature(chosen) - feature(rejected) for chosen, rejected in both]
    parts = decompose_gaps(gaps, weights, population=population)
    terms = asdict(information_terms(gaps, weights))
    number = used.sum(dim=1)
    counted = gaps.masked_fill(~used, 0.0)
    deviations = (counted - counted.sum(dim=1, keepdim=True) / number[:, None]).masked_fill(~used, 0.0)
    quantiles = torch.tensor([0.1, 0.9], dtype=gaps.dtype)
    low, high = torch.nanquantile(gaps.masked_fill(~used, torch.nan)[:, 1:], quantiles, dim=1)
    table |= {
        "reward_gap": parts.own_gap,
        "prompt_related_gap": parts.prompt_related_gap,
        "prompt_free_gap": parts.prompt_free_gap,
        "effective_sample_size": parts.effective_sample_size,
        "standard_error": parts.standard_error,
        "converged": parts.converged,
        "prompts": number,
        "other_gaps_10_percent": low,
        "other_gaps_90_percent": high,
        "variance_between_prompts": deviations.square().sum(dim=1) / (number - 1),
        **{f"{name}{_TERM}": values for name, values in terms.items()},
        "sign_flips": ((gaps.sign() != gaps[:, :1].sign()) & used).any(dim=1),
    }
    return {name: np.asarray(values) for name, values in table.items()}


def summary(table: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the table of pairs says about the model, over all pairs and by subset; see `decompose`."""
    result = _shares(table)
    gaps = ("reward_gap", "prompt_free_gap", "prompt_related_gap")
    # A rank correlation with a constant is no number.
    result["correlations"] = {
        name: {
            gap: float(spearmanr(table[gap], table[f"{name} difference"]).statistic)
            for gap in gaps if np.ptp(table[gap]) > 0
        }
        for name in FEATURES if np.ptp(table[f"{name} difference"]) > 0
    }  # fmt: skip
    result["information"] = mutual_information(
        {spec.name: table[f"{spec.name}{_TERM}"] for spec in fields(InformationTerms)}
    )
    result["quadrants"] = []
    for signs in itertools.product((True, False), repeat=2):
        inside = ((table["prompt_free_gap"] > 0) == signs[0]) & ((table["prompt_related_gap"] > 0) == signs[1])
        if inside.any():
            names = ("above 0" if sign else "0 or below" for sign in signs)
            place = dict(zip(("prompt_free_gap", "prompt_related_gap"), names, strict=True))
            result["quadrants"].append({**place, **_accuracy(table["reward_gap"][inside])})
    subsets = np.unique(table["subset"]).tolist()
    if len(subsets) > 1:
        result["subsets"] = {
            name: _shares({column: values[table["subset"] == name] for column, values in table.items()})
            for name in subsets
        }
    return result


def _accuracy(gaps: np.ndarray) -> dict[str, Any]:
    return share_right(0.5 + 0.5 * np.sign(gaps))


def _shares(table: dict[str, np.ndarray]) -> dict[str, Any]:
    free, flips = table["prompt_free_gap"], table["sign_flips"]
    decided = np.abs(free) > np.abs(table["prompt_related_gap"])
    within = float(table["variance_between_prompts"].mean())
    between = float(np.var(free, ddof=1)) if len(free) > 1 else 0.0
    result = {
        **_accuracy(table["reward_gap"]),
        "response_decides": float(decided.mean()),
        "response_decides_interval": list(wilson_interval(int(decided.sum()), len(decided))),
        "sign_flips": float(flips.mean()),
        "sign_flips_interval": list(wilson_interval(int(flips.sum()), len(flips))),
        "mean_standard_error": float(np.nanmean(table["standard_error"])),
        "mean_effective_sample_size": float(table["effective_sample_size"].mean()),
        "not_converged": int((~table["converged"]).sum()),
    }
    if within + between > 0:
        result["prompt_sensitivity"] = within / (within + between)
    return result
