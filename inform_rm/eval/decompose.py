"""How much of a reward model's preference the response alone decides: an audit on preference data."""

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from scipy.stats import spearmanr
from torch import Tensor

from inform_rm.data.sources import Sources
from inform_rm.decomposition.gap_grid import GapGrid, distinct_prompts, gap_grid
from inform_rm.decomposition.information import TERMS, information_terms, mutual_information
from inform_rm.decomposition.likelihoods import ResponseLikelihood, load_likelihood
from inform_rm.decomposition.prompt_free_gap import decompose_gaps, sample_prompts, tempered_weights
from inform_rm.errors import InputError
from inform_rm.eval.accuracy import share_right
from inform_rm.eval.decompose_report import DecompositionResult
from inform_rm.eval.frame import JOURNAL_FILE, Frame, parquet, progress_bars, settings_of
from inform_rm.eval.settings import DecompositionSettings
from inform_rm.eval.sources import load_sources, warn_of_left_out
from inform_rm.scoring.scorer import RewardScorer
from inform_rm.util.intervals import wilson_interval

LIKELIHOOD_JOURNAL_FILE = "likelihoods.partial"
_LIST_ITEM = re.compile(r"^\s*([-*•]|\d+[.)])\s", re.MULTILINE)
FEATURES = {
    "characters": len,
    "words": lambda text: len(text.split()),
    "lines": lambda text: text.count("\n") + 1,
    "list items": lambda text: len(_LIST_ITEM.findall(text)),
    "exclamation marks": lambda text: text.count("!"),
}
_SHOWN_PAIRS = 20
_TERM = "_term"  # ends the columns of `information_terms`


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
            `inform_rm.eval.settings.PairSettings` are among them) and keywords of `RewardScorer`. A pair that cannot
            be rendered under another's prompt, or becomes too long, does without it.

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
    model, is_split = settings.behavior_model, scorer.split_over_processes
    if not isinstance(model, str | Path):
        return ResponseLikelihood(model, scorer.tokenizer, split_over_processes=is_split)
    passed_on = {"chat_template", "device", "trust_remote_code"} & scorer_options.keys()
    options = {name: scorer_options[name] for name in passed_on}
    return load_likelihood(model, split_over_processes=is_split, **options)


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
        **{f"{name}{_TERM}": values for name, values in information_terms(gaps, weights).items()},
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
    result["information"] = mutual_information({name: table[f"{name}{_TERM}"] for name in TERMS})
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
