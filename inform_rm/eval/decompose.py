"""How much of a reward model's preference the response alone decides: an audit on preference data."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, concatenate_datasets
from scipy.stats import spearmanr
from torch import Tensor

from inform_rm.decomposition.gap_grid import GapGrid, distinct_prompts, gap_grid
from inform_rm.decomposition.likelihoods import ResponseLikelihood, load_likelihood
from inform_rm.decomposition.prompt_free_gap import Decomposition, decompose_gaps, sample_prompts, tempered_weights
from inform_rm.errors import InputError
from inform_rm.eval import decompose_report as report
from inform_rm.eval.sources import leave_out_bad_rows, load_sources, warn_of_left_out
from inform_rm.scoring.scorer import RewardScorer, as_scorer
from inform_rm.util.files import atomic_write_bytes, atomic_write_text, check_output_directory, versions, write_json
from inform_rm.util.intervals import wilson_interval
from inform_rm.util.journal import RewardJournal
from inform_rm.util.page import figure_png
from inform_rm.util.processes import is_main_process

JOURNAL_FILE = "rewards.partial"
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


def decompose(
    model: str | Path | torch.nn.Module | RewardScorer,
    data: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    tokenizer: Any = None,
    num_prompts: int = 16,
    stratify: bool = False,
    weights: str = "uniform",
    behavior_model: str | Path | torch.nn.Module | None = None,
    length_normalized: bool = False,
    ess_target: float = 0.25,
    color: str = "length",
    columns: Mapping[str, str] | None = None,
    data_revision: str | None = None,
    on_bad_row: str = "error",
    overlong: str = "error",
    max_pairs: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **scorer_options: Any,
) -> dict[str, Any]:
    """Decompose the reward gaps of any reward model into prompt-free and prompt-related parts (arXiv:2504.06020).

    Both responses of every pair are scored under the pair's own prompt and under prompts of other pairs; see
    `inform_rm.decomposition.prompt_free_gap` for what is made of the gaps. With ``output`` the folder receives
    ``pairs.parquet`` (one row a pair), two plots, ``result.html`` and at last ``result.json``. After a kill the same
    call takes up the rewards computed before (``rewards.partial``), and refuses if model, data or settings have
    changed. With a scorer that splits its work over processes, all of them read the data and the main one writes.

    Args:
        model: folder, Hub id, loaded model, or a `RewardScorer`.
        data: one or several sources of pairs, as `load_preferences` reads them. Prompts are drawn from them, too.
        output: folder for the results; ``None`` only returns them.
        tokenizer: see `RewardScorer`.
        num_prompts: prompts for each pair, its own among them; all others are drawn without replacement.
        stratify: draw only prompts of the same ``subset``: those of a maths set say little about a chat pair.
        weights: ``"uniform"``: all prompts of a pair count the same; ``"behavior"``: as likely as ``behavior_model``
            finds both responses under them, tempered (`inform_rm.decomposition.prompt_free_gap.tempered_weights`).
        behavior_model: causal language model that is near what wrote the responses: a folder, Hub id or loaded model;
            a loaded one must have the reward model's tokenizer.
        length_normalized: use mean log-likelihoods of the tokens instead of sums.
        ess_target: effective sample size that tempering keeps, as a share of the prompts.
        color: what colours the plane of D1 and D2: ``"length"`` (characters, chosen - rejected) or ``"subset"``.
        columns: which columns are prompt, chosen, rejected, ...: see `Columns.of`.
        data_revision: revision of the data on the Hub.
        on_bad_row: ``"error"`` or ``"skip"``, which leaves out, counts and lists bad rows, those among them that
            cannot be encoded or do not fit. A pair that cannot be rendered under another's prompt does without it.
        overlong: see `inform_rm.decomposition.gap_grid.gap_grid`; a pair that is too long under its own prompt is
            counted.
        max_pairs: use a random subset of this many pairs of each source.
        seed: seed of the subset and of the draw of prompts.
        progress: show a progress bar.
        scorer_options: keywords of `RewardScorer`, such as ``max_length``, ``device`` and ``trust_remote_code``.

    Returns:
        ``num_pairs`` that were decomposed, ``left_out`` (pairs by reason, non-finite rewards with the pairs' ids),
        ``accuracy``, ``response_decides`` (share of pairs with abs(D2) > abs(D1): no prompt-related part of this size
        could turn the preference), ``prompt_sensitivity`` (share of the gaps' variance that lies between prompts of
        one pair; 0 for a model blind to prompts), ``sign_flips`` (share of pairs whose preference is another one under
        at least one other prompt), ``correlations`` (Spearman, of each gap with differences of features that the
        response alone has), ``quadrants``, ``subsets``, ``cost``, and settings, seed, versions and fingerprints.

    Raises:
        InputError: on bad data, fewer than two distinct prompts, a model that is no reward model, or an unfinished run
            with other settings.
    """
    if isinstance(num_prompts, bool) or not isinstance(num_prompts, int) or num_prompts < 2:
        raise InputError(f"num_prompts: {num_prompts!r}; expected at least 2, the pair's own and one other.")
    if weights not in WEIGHTS or (weights == "behavior") != (behavior_model is not None):
        raise InputError(
            f"weights: {weights!r} with behavior_model {behavior_model!r}; expected 'uniform' without one, or "
            "'behavior' with one."
        )
    if not 0 < ess_target <= 1:
        raise InputError(f"ess_target: {ess_target!r}; it is a share of the prompts, above 0 and at most 1.")
    if color not in report.COLORS:
        raise InputError(f"color: {color!r}; expected one of {', '.join(report.COLORS)}.")
    folder = None if output is None else check_output_directory(output)
    scorer = as_scorer(model, tokenizer, scorer_options)
    sources = load_sources(
        data, columns=columns, revision=data_revision, on_bad_row=on_bad_row, max_pairs=max_pairs, seed=seed
    )
    # All before the first forward pass, and without the prompts that no pair could be scored under.
    pairs = concatenate_datasets([leave_out_bad_rows(source, scorer, overlong, on_bad_row) for source in sources])
    prompt_rows, own = distinct_prompts(pairs)
    if len(prompt_rows) < 2:
        raise InputError(
            "data: all pairs have the same prompt. What a response is worth without its prompt shows only under other "
            "prompts: add pairs with other prompts."
        )
    subsets = np.array(pairs["subset"][:])
    strata = torch.from_numpy(np.unique(subsets[prompt_rows], return_inverse=True)[1]) if stratify else None
    choice = sample_prompts(own, num_prompts, len(prompt_rows), seed=seed, strata=strata)
    population: int | Tensor = len(prompt_rows)
    if strata is not None:
        population = torch.bincount(strata)[strata[own]]

    identity = scorer.identity()
    settings = {
        "data": [source.record["source"] for source in sources],
        "columns": None if columns is None else dict(columns), "data_revision": data_revision,
        "num_prompts": num_prompts, "stratify": stratify, "weights": weights, "on_bad_row": on_bad_row,
        "overlong": overlong, "max_pairs": max_pairs, "max_length": scorer.max_length, "dtype": identity["dtype"],
    }  # fmt: skip
    fingerprints = [source.record["fingerprint"] for source in sources]
    run = {**identity, "data": fingerprints, "settings": settings, "seed": seed}
    shared = scorer.split_over_processes
    writes = not shared or is_main_process()

    def compute(model: RewardScorer | ResponseLikelihood, name: str, policies: dict[str, Any], **more: Any) -> GapGrid:
        journal = None if folder is None else RewardJournal(folder / name, {**run, **more}, shared)
        bar = progress and writes
        try:
            return gap_grid(model, pairs, choice, prompt_rows, **policies, journal=journal, progress=bar)
        finally:
            if journal is not None:
                journal.close()

    grid = compute(scorer, JOURNAL_FILE, {"overlong": overlong})
    log_likelihoods = None
    if behavior_model is not None:
        likelihood = _likelihood(behavior_model, scorer.tokenizer, length_normalized, scorer_options)
        likelihood.split_over_processes = shared
        settings |= {"length_normalized": length_normalized, "ess_target": ess_target}
        policies = {"overlong": "drop", "on_bad_row": "skip"}  # a prompt that it cannot weigh has no weight
        behavior = compute(likelihood, LIKELIHOOD_JOURNAL_FILE, policies, likelihood=likelihood.identity())
        log_likelihoods = behavior.pair_log_likelihoods
    table, left_out = _table(pairs, grid, population, log_likelihoods, ess_target)
    for source in sources:
        warn_of_left_out(source.record)
    result = {
        "model": scorer.name,
        "model_fingerprint": identity["model"],
        "tokenizer_fingerprint": identity["tokenizer"],
        "settings": {name: value for name, value in settings.items() if value is not None},
        "seed": seed,
        "versions": versions(),
        "data": [source.record for source in sources],
        "distinct_prompts": len(prompt_rows),
        "left_out": left_out,
        "cost": {"tokens_computed": grid.tokens_computed, "tokens_of_a_plain_loop": grid.tokens_plain},
        **summary(table),
    }
    if folder is not None and writes:
        _write(folder, result, table, color)
        for name in (JOURNAL_FILE, LIKELIHOOD_JOURNAL_FILE):
            (folder / name).unlink(missing_ok=True)
    return result


def _likelihood(
    model: str | Path | torch.nn.Module, tokenizer: Any, length_normalized: bool, scorer_options: dict[str, Any]
) -> ResponseLikelihood:
    if isinstance(model, str | Path):
        passed_on = ("chat_template", "device", "trust_remote_code")
        options = {name: scorer_options[name] for name in passed_on if name in scorer_options}
        return load_likelihood(model, length_normalized=length_normalized, **options)
    return ResponseLikelihood(model, tokenizer, length_normalized)


def _table(
    pairs: Dataset, grid: GapGrid, population: int | Tensor, log_likelihoods: Tensor | None, ess_target: float
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """One row for each pair that is not left out, and counts of those that are."""
    own_used = grid.used[:, 0]
    alone = own_used & (grid.used.sum(dim=1) == 1)
    # A gap counts only where it is used, so that NaN elsewhere says nothing.
    gaps = grid.gaps.masked_fill(~grid.used, 0.0)
    nonfinite = own_used & ~gaps.isfinite().all(dim=1)
    kept = own_used & ~alone & ~nonfinite
    unlikely = torch.zeros_like(kept)
    if log_likelihoods is not None:
        unlikely = kept & ~(log_likelihoods.isfinite() & grid.used).any(dim=1)
        kept &= ~unlikely
    left_out = {
        "overlong": int((~own_used).sum()),
        "no_other_prompt": int(alone.sum()),
        "nonfinite_rewards": int(nonfinite.sum()),
        "nonfinite_ids": [pairs[int(row)]["id"] for row in nonfinite.nonzero()[:_SHOWN_PAIRS, 0]],
    }
    if unlikely.any():
        left_out["no_likelihood"] = int(unlikely.sum())
    rows = kept.nonzero()[:, 0]
    if not len(rows):
        raise InputError(f"data: no pair can be decomposed; left out: {left_out}.")
    part_population = population[rows] if isinstance(population, Tensor) else population
    if log_likelihoods is None:
        weights = grid.used[rows].double()
    else:
        weights, _ = tempered_weights(log_likelihoods[rows].masked_fill(~grid.used[rows], -torch.inf), ess_target)
    parts: Decomposition = decompose_gaps(gaps[rows], weights, population=part_population)
    spread = torch.where(grid.used[rows], gaps[rows], torch.nan)[:, 1:]
    low, high = torch.nanquantile(spread, torch.tensor([0.1, 0.9], dtype=spread.dtype), dim=1)
    table: dict[str, Any] = {
        "id": [], "subset": [], **{f"{name} difference": [] for name in FEATURES},
    }  # fmt: skip
    for batch in pairs.select(rows.tolist()).iter(1000):
        table["id"] += batch["id"]
        table["subset"] += batch["subset"]
        for name, feature in FEATURES.items():
            both = zip(batch["chosen"], batch["rejected"], strict=True)
            table[f"{name} difference"] += [feature(chosen) - feature(rejected) for chosen, rejected in both]
    own_sign = gaps[rows, :1].sign()
    table |= {
        "reward_gap": parts.own_gap,
        "prompt_related_gap": parts.prompt_related_gap,
        "prompt_free_gap": parts.prompt_free_gap,
        "effective_sample_size": parts.effective_sample_size,
        "standard_error": parts.standard_error,
        "converged": parts.converged,
        "prompts": grid.used[rows].sum(dim=1),
        "other_gaps_10_percent": low,
        "other_gaps_90_percent": high,
        "variance_between_prompts": _variance(gaps[rows], grid.used[rows]),
        "sign_flips": ((gaps[rows].sign() != own_sign) & grid.used[rows]).any(dim=1),
    }
    return {name: np.asarray(values) for name, values in table.items()}, left_out


def _variance(gaps: Tensor, used: Tensor) -> Tensor:
    """``(P,)`` unbiased variance of each row's used entries."""
    number = used.sum(dim=1)
    mean = (gaps * used).sum(dim=1) / number
    return ((gaps - mean[:, None]).square() * used).sum(dim=1) / (number - 1)


def summary(table: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the table of pairs says about the model, over all pairs and by subset; see `decompose`."""
    result = _shares(table)
    correlations: dict[str, dict[str, float]] = {}
    for name in FEATURES:
        difference = table[f"{name} difference"]
        if np.ptp(difference) == 0:
            continue  # a rank correlation with a constant is no number
        correlations[name] = {
            gap: float(spearmanr(table[gap], difference).statistic)
            for gap in ("reward_gap", "prompt_free_gap", "prompt_related_gap")
            if np.ptp(table[gap]) > 0
        }
    result["correlations"] = correlations
    result["quadrants"] = [
        {"prompt_free_gap": free, "prompt_related_gap": related, **_accuracy(table["reward_gap"][chosen])}
        for free, related, chosen in _quadrants(table)
        if chosen.any()
    ]
    names = np.unique(table["subset"])
    if len(names) > 1:
        parts = {name: table["subset"] == name for name in names.tolist()}
        result["subsets"] = {
            name: _shares({column: values[mask] for column, values in table.items()}) for name, mask in parts.items()
        }
    return result


def _shares(table: dict[str, np.ndarray]) -> dict[str, Any]:
    own, free, related = (table[name] for name in ("reward_gap", "prompt_free_gap", "prompt_related_gap"))
    decided, flips = np.abs(free) > np.abs(related), table["sign_flips"]
    within = float(table["variance_between_prompts"].mean())
    between = float(np.var(free, ddof=1)) if len(free) > 1 else 0.0
    result = {
        **_accuracy(own),
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


def _accuracy(gaps: np.ndarray) -> dict[str, Any]:
    correct = float((gaps > 0).sum() + 0.5 * (gaps == 0).sum())
    return {
        "num_pairs": len(gaps),
        "accuracy": correct / len(gaps),
        "accuracy_interval": list(wilson_interval(correct, len(gaps))),
    }


def _quadrants(table: dict[str, np.ndarray]) -> list[tuple[str, str, np.ndarray]]:
    free, related = table["prompt_free_gap"] > 0, table["prompt_related_gap"] > 0
    return [
        ("above 0", "above 0", free & related), ("above 0", "0 or below", free & ~related),
        ("0 or below", "above 0", ~free & related), ("0 or below", "0 or below", ~free & ~related),
    ]  # fmt: skip


def _write(folder: Path, result: dict[str, Any], table: dict[str, np.ndarray], color: str) -> None:
    buffer = io.BytesIO()
    columns = {name.replace(" ", "_"): values.tolist() for name, values in table.items()}
    pq.write_table(pa.table(columns), buffer)
    atomic_write_bytes(folder / "pairs.parquet", buffer.getvalue())
    spread, plane = (figure_png(figure) for figure in (report.spread_figure(table), report.plane_figure(table, color)))
    atomic_write_bytes(folder / "spread.png", spread)
    atomic_write_bytes(folder / "plane.png", plane)
    atomic_write_text(folder / "result.html", report.result_page(result, spread, plane).html())
    write_json(folder / "result.json", result)  # last: its presence says that the rest is complete
