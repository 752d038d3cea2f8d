"""Prioritized training (arXiv:2504.06020): of a pool of pairs, learn from those with the smallest prompt-free gap.

Pairs whose preference the model already draws from the responses alone teach it to ignore the prompt even more. So
every step draws a pool of ``pool_factor`` batches, estimates the prompt-free gap D2 of its pairs without gradient, and
updates on the batch with the smallest *signed* D2 ("left half", Fig. 3).
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inform_rm.decomposition.gap_grid import distinct_prompts, gap_grid
from inform_rm.decomposition.likelihoods import ResponseLikelihood
from inform_rm.decomposition.prompt_free_gap import decompose_gaps, tempered_weights
from inform_rm.scoring.scorer import NonFiniteRewardError, RewardScorer
from inform_rm.training.trainer import RewardTrainer
from inform_rm.util.files import atomic_write_text

_GAPS_FILE = "prompt_free_gaps.json"


@dataclass(frozen=True)
class Selection:
    """How pairs are chosen from a pool; the settings of the same names in `TrainingConfig` say more."""

    pool_factor: int
    num_prompts: int
    warmup_fraction: float
    refresh: int
    selection: str
    ess_target: float
    seed: int
    overlong: str


class PoolCollator:
    """Training rows -> ``{"positions": (N,)}``, places in the dataset; evaluation rows -> batches of ``collate``.

    Args:
        collate: what makes a batch of encoded pairs.
    """

    def __init__(self, collate: Any):
        self.collate = collate

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        """See the class."""
        if "position" in pairs[0]:
            return {"positions": torch.tensor([pair["position"] for pair in pairs])}
        return self.collate(pairs)


class PrioritizedRewardTrainer(RewardTrainer):
    """`RewardTrainer` that updates on a part of each pool.

    With several processes the pools of all are one: every process estimates a part of its gaps, all select the same
    pairs, and each learns from its share of them, as one process with such a pool would.

    Logs beside the usual metrics: ``prompt_free_gap_selected`` and ``prompt_free_gap_left_out`` (means of D2),
    ``effective_sample_size`` (prompts behind a D2) and ``selection_time_share`` (of the time spent in steps).

    Args:
        selection: how pairs are chosen.
        scorer: scores the model that is trained; nothing but its tokenizer and batching may differ. With several
            processes it splits its work over them, and so does ``likelihood``.
        likelihood: weighs the prompts of a gap by how likely it finds both responses under them; ``None`` weighs all
            the same.
        kwargs: arguments of `RewardTrainer`. ``train_dataset`` holds the text of the pairs (``keep_text``) and their
            ``position``, ``data_collator`` is a `PoolCollator`, and the batch size of the arguments is the pool's.
    """

    def __init__(
        self,
        *,
        selection: Selection,
        scorer: RewardScorer,
        likelihood: ResponseLikelihood | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self._selection, self._scorer, self._likelihood = selection, scorer, likelihood
        self._pairs: Any = self.train_dataset
        self._collate: Any = kwargs["data_collator"].collate
        self._prompt_rows, self._own_prompts = distinct_prompts(self._pairs)
        # Position of a pair -> step and value of its latest D2; only where it may be used again.
        self._known_gaps: dict[int, tuple[int, float]] = {}
        # D2 of selected and of left-out pairs, ESS: sum and number of each; seconds of selection and of steps.
        self._selection_sums = torch.zeros(8, dtype=torch.float64)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; a resumed run takes up the gaps that may still be used."""
        checkpoint = kwargs.get("resume_from_checkpoint", args[0] if args else None)
        if checkpoint:
            path = Path(checkpoint) / _GAPS_FILE
            if path.exists():
                self._known_gaps = {row: (step, gap) for row, step, gap in json.loads(path.read_text())}
        return super().train(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Select from the pool, then forward and backward pass of what was selected."""
        start = time.perf_counter()
        positions = self.accelerator.gather(inputs["positions"]).cpu()
        if pairs_left := inputs.get("pairs_left", 0):  # the rest are repetitions
            positions = positions[:pairs_left]
        wanted = math.ceil(len(positions) / self._selection.pool_factor)
        if self.state.global_step < self._selection.warmup_fraction * self.state.max_steps:
            selected = torch.arange(wanted)  # the pool's order is random
        else:
            selected = self._select(positions, wanted)
        seconds = time.perf_counter() - start
        own = selected.tensor_split(self.accelerator.num_processes)[self.accelerator.process_index]
        # A process without a pair takes part in the passes with one that does not count.
        rows = self._pairs[positions[own if len(own) else selected[:1]].tolist()]
        pairs = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        batch = self._collate(pairs)
        if self.accelerator.num_processes > 1:
            batch |= self._counted(len(own), wanted)
        loss = super().training_step(model, batch, num_items_in_batch)
        self._selection_sums[6:] += torch.tensor([seconds, time.perf_counter() - start], dtype=torch.float64)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the metrics of the selection since the last line."""
        if "loss" in logs:
            sums = self._selection_sums.to(self.args.device, torch.float32)
            sums = self.accelerator.reduce(sums, reduction="sum").tolist()
            self._selection_sums.zero_()
            names = ("prompt_free_gap_selected", "prompt_free_gap_left_out", "effective_sample_size")
            logs |= {name: sums[2 * at] / sums[2 * at + 1] for at, name in enumerate(names) if sums[2 * at + 1]}
            if sums[7]:
                logs["selection_time_share"] = sums[6] / sums[7]
        super().log(logs, *args, **kwargs)

    def _select(self, positions: Tensor, wanted: int) -> Tensor:
        """Places in the pool of the pairs to learn from, in the pool's order."""
        gaps = self._prompt_free_gaps(positions)
        scores = -gaps
        if self._selection.selection == "soft":
            # Adding Gumbel noise to log-probabilities and taking the largest draws without replacement.
            generator = np.random.default_rng([self._selection.seed, 1, *positions.tolist()])
            scores = torch.nn.functional.logsigmoid(-gaps) + torch.from_numpy(generator.gumbel(size=len(gaps)))
        selected = scores.argsort(descending=True, stable=True)[:wanted].sort().values
        is_selected = torch.zeros(len(gaps), dtype=torch.bool)
        is_selected[selected] = True
        for at, part in ((0, gaps[is_selected]), (2, gaps[~is_selected])):
            self._selection_sums[at] += part.sum()
            self._selection_sums[at + 1] += len(part)
        return selected

    def _prompt_free_gaps(self, positions: Tensor) -> Tensor:
        """``(N,)`` float64: D2 of the pairs, from their own prompt and others that are drawn for the whole pool."""
        step = self.state.global_step
        known = {
            row: gap for row in positions.tolist()
            if (found := self._known_gaps.get(row)) is not None
            for since, gap in [found] if step - since < self._selection.refresh
        }  # fmt: skip
        missing = torch.tensor([row for row in positions.tolist() if row not in known], dtype=torch.long)
        if len(missing):
            fresh = self._estimate(missing)
            known |= dict(zip(missing.tolist(), fresh.tolist(), strict=True))
            if self._selection.refresh > 1:
                self._known_gaps |= {row: (step, known[row]) for row in missing.tolist()}
        return torch.tensor([known[row] for row in positions.tolist()], dtype=torch.float64)

    def _estimate(self, positions: Tensor) -> Tensor:
        own = self._own_prompts[positions]
        # Of the pool alone, so that a resumed run draws the same; one draw for all, so that each prompt is computed
        # once for the whole pool.
        generator = np.random.default_rng([self._selection.seed, 0, *positions.tolist()])
        num_others = min(self._selection.num_prompts - 1, len(self._prompt_rows))
        others = torch.from_numpy(generator.choice(len(self._prompt_rows), num_others, replace=False))
        others = others.expand(len(positions), -1)
        choice = torch.cat([own[:, None], others.masked_fill(others == own[:, None], -1)], dim=1)
        cells: dict[str, Any] = {
            "pairs": self._pairs, "choice": choice, "prompt_rows": self._prompt_rows, "rows": positions
        }  # fmt: skip
        grid = gap_grid(self._scorer, **cells, overlong=self._selection.overlong)
        weights = grid.used.double()
        if self._likelihood is not None:
            grid_of_logs = gap_grid(self._likelihood, **cells, overlong="drop", on_bad_row="skip")
            logs = grid_of_logs.pair_log_likelihoods
            weights, _ = tempered_weights(logs.masked_fill(~grid.used, -torch.inf), self._selection.ess_target)
        parts = decompose_gaps(grid.gaps, weights)
        broken = ~parts.prompt_free_gap.isfinite()
        if broken.any():
            row = self._pairs[int(positions[broken][0])]
            raise NonFiniteRewardError(row["row"], math.nan, f"{row['file']}, row {row['row']}, under some prompt,")
        self._selection_sums[4] += parts.effective_sample_size.sum()
        self._selection_sums[5] += len(positions)
        return parts.prompt_free_gap

    def _add_to_checkpoint(self, folder: Path) -> None:
        if self._selection.refresh > 1 and self.args.should_save:
            usable = [
                [row, since, gap] for row, (since, gap) in self._known_gaps.items()
                if self.state.global_step - since < self._selection.refresh
            ]  # fmt: skip
            atomic_write_text(folder / _GAPS_FILE, json.dumps(usable))
