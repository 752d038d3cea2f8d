"""Prioritized training (arXiv:2504.06020): learn most from the pairs with the smallest prompt-free gap.

Pairs whose preference the model already draws from the responses alone teach it to ignore the prompt even more. So
every step draws a pool of ``pool_factor`` batches, estimates the prompt-free gap D2 of its pairs without gradient, and
updates on the batch with the smallest *signed* D2 ("left half", Fig. 3).

What it costs: a forward pass is a third of a forward and backward pass, so a pool of f batches under m prompts makes
an update 1 + f m / 3 times as long; a little less, as responses to one prompt share it.
"""

import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inform_rm.decomposition.gap_grid import distinct_prompts, gap_grid
from inform_rm.decomposition.likelihoods import ResponseLikelihood, load_likelihood
from inform_rm.decomposition.prompt_free_gap import decompose_gaps, tempered_weights
from inform_rm.errors import InputError
from inform_rm.scoring.scorer import NonFiniteRewardError, RewardScorer
from inform_rm.training.collators import counted_pairs
from inform_rm.training.reward_arguments import RewardTrainingArguments


def pool_or_batch(collate: Any, pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Training rows -> ``{"positions": (N,)}``, places in the dataset; evaluation rows -> a batch of ``collate``."""
    if "position" in pairs[0]:
        return {"positions": torch.tensor([pair["position"] for pair in pairs])}
    return collate(pairs)


class PoolSelector:
    """Chooses from each pool what is learnt from; a part of `inform_rm.training.trainer.RewardTrainer`.

    With several processes the pools of all are one: every process estimates a part of its gaps, all select the same
    pairs, and each learns from its share of them, as one process with such a pool would.

    ``pairs`` are encoded with their text (``keep_text``); ``scorer`` scores the model that is trained; ``likelihood``
    weighs the prompts of a gap by how likely it finds both responses under them, ``None`` weighs all the same.
    """

    def __init__(
        self,
        args: RewardTrainingArguments,
        pairs: Any,
        collate: Any,
        scorer: RewardScorer,
        likelihood: ResponseLikelihood | None = None,
    ):
        self._args, self._pairs, self._collate = args, pairs, collate
        self._scorer, self._likelihood = scorer, likelihood
        self._prompt_rows, self._own_prompts = distinct_prompts(self._pairs)
        if len(self._prompt_rows) < 2:
            raise InputError("objective: 'prioritized' needs pairs with at least two prompts; these have one.")
        # D2 of selected and of left-out pairs, ESS: sum and number of each; seconds of selection and of steps.
        self._sums = torch.zeros(8, dtype=torch.float64)

    def batch(self, inputs: dict[str, Any], accelerator: Any, state: Any) -> dict[str, Any]:
        """What this process learns from of a pool that `pool_or_batch` made."""
        start = time.perf_counter()
        positions = accelerator.gather(inputs["positions"]).cpu()
        if pairs_left := inputs.get("pairs_left", 0):  # the rest are repetitions
            positions = positions[:pairs_left]
        wanted = math.ceil(len(positions) / self._args.drawn_per_pair)
        selected = torch.arange(wanted)  # the pool's order is random
        if state.global_step >= self._args.warmup_fraction * state.max_steps:
            selected = self._select(positions, wanted)
        self._sums[6] += time.perf_counter() - start
        own = torch.arange(wanted).tensor_split(accelerator.num_processes)[accelerator.process_index]
        # A process without a pair takes part in the passes with one that does not count.
        used = own if len(own) else torch.zeros(1, dtype=torch.long)
        rows = self._pairs[positions[selected[used]].tolist()]
        pairs = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        batch = self._collate(pairs)
        if accelerator.num_processes > 1:
            batch |= counted_pairs(len(own), wanted, accelerator.num_processes)
        return batch

    def metrics(self, accelerator: Any) -> dict[str, float]:
        """Of the selection since the last call.

        ``prompt_free_gap_selected`` and ``prompt_free_gap_left_out`` (means of D2), ``effective_sample_size`` (prompts
        behind a D2) and ``selection_time_share`` (of the time spent in steps).
        """
        sums = accelerator.reduce(self._sums.to(accelerator.device, torch.float32), reduction="sum").tolist()
        self._sums.zero_()
        names = ("prompt_free_gap_selected", "prompt_free_gap_left_out", "effective_sample_size")
        found = {name: sums[2 * at] / sums[2 * at + 1] for at, name in enumerate(names) if sums[2 * at + 1]}
        return found | ({"selection_time_share": sums[6] / sums[7]} if sums[7] else {})

    def add_seconds(self, seconds: float) -> None:
        """Of a whole step, its selection among them."""
        self._sums[7] += seconds

    def _select(self, positions: Tensor, wanted: int) -> Tensor:
        """Places in the pool of the pairs to learn from, in the pool's order."""
        gaps = self._estimate(positions)
        # Two pairs of the same responses have one gap: rounding must not decide which of them comes first.
        selected = gaps.round(decimals=4).argsort(stable=True)[:wanted].sort().values
        is_selected = torch.zeros(len(gaps), dtype=torch.bool)
        is_selected[selected] = True
        for at, part in ((0, gaps[is_selected]), (2, gaps[~is_selected])):
            self._sums[at] += part.sum()
            self._sums[at + 1] += len(part)
        return selected

    def _estimate(self, positions: Tensor) -> Tensor:
        """``(N,)`` float64: D2 of the pairs, under prompts that are drawn for the whole pool.

        Under ``weights="uniform"`` the own prompt is left out: over all prompts of the data it would hardly count, but
        of a few it would be a large part, and the gap that is to be free of the prompt would depend on it.
        """
        own = self._own_prompts[positions]
        # Of the pool alone, so that a resumed run draws the same; one draw for all, so that each prompt is computed
        # once for the whole pool.
        generator = np.random.default_rng([self._args.seed, 0, *positions.tolist()])
        takes_own = self._likelihood is not None
        # One more than is needed, for the pairs whose own prompt is among them.
        drawn = min(self._args.num_prompts + (not takes_own), len(self._prompt_rows))
        others = torch.from_numpy(generator.choice(len(self._prompt_rows), drawn, replace=False))
        others = others.expand(len(positions), -1)
        is_own = others == own[:, None]
        # Each pair takes the first that are not its own prompt; -1 is none.
        surplus = (~is_own).cumsum(dim=1) > self._args.num_prompts - takes_own
        first = own[:, None] if takes_own else torch.full((len(own), 1), -1)
        choice = torch.cat([first, others.masked_fill(is_own | surplus, -1)], dim=1)
        cells: dict[str, Any] = {
            "pairs": self._pairs, "choice": choice, "prompt_rows": self._prompt_rows, "rows": positions
        }  # fmt: skip
        grid = gap_grid(self._scorer, **cells, overlong=self._args.overlong)
        if not takes_own and (alone := ~grid.used.any(dim=1)).any():  # too long under any but its own prompt
            left: dict[str, Any] = cells | {"choice": own[alone, None], "rows": positions[alone]}
            grid.rewards[alone, 0] = gap_grid(self._scorer, **left).rewards[:, 0]
            grid.used[alone, 0] = True
        weights = grid.used.double()
        if self._likelihood is not None:
            grid_of_logs = gap_grid(self._likelihood, **cells, overlong="drop", on_bad_row="skip")
            logs = grid_of_logs.pair_log_likelihoods
            weights, _ = tempered_weights(logs.masked_fill(~grid.used, -torch.inf), self._args.ess_target)
        parts = decompose_gaps(grid.gaps, weights)
        broken = ~parts.prompt_free_gap.isfinite()
        if broken.any():
            row = self._pairs[int(positions[broken][0])]
            raise NonFiniteRewardError(row["row"], math.nan, f"{row['file']}, row {row['row']}, under some prompt,")
        self._sums[4] += parts.effective_sample_size.sum()
        self._sums[5] += len(positions)
        return parts.prompt_free_gap


def pool_selector(
    args: RewardTrainingArguments, pairs: Any, collate: Any, model: Any, tokenizer: Any, **scoring: Any
) -> PoolSelector:
    """The selector of a run; ``scoring`` are further arguments of its `RewardScorer`."""
    likelihood = None
    if args.behavior_model is not None:
        likelihood = load_likelihood(
            args.behavior_model,
            chat_template=args.chat_template,
            device=args.device,
            trust_remote_code=args.trust_remote_code,
            split_over_processes=True,
        )
    scorer = RewardScorer(model, tokenizer, split_over_processes=True, **scoring)
    return PoolSelector(args, pairs, collate, scorer, likelihood)
