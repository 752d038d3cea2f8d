"""The gap grid: both responses of every pair under several prompts, each prompt computed once for all of them."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm

from inform_rm.data.encoding import TokenGroup, encode_each, fit_group
from inform_rm.data.pairs import BadRow
from inform_rm.scoring.scorer import RewardScorer
from inform_rm.util.journal import RewardJournal

_CELLS_IN_MEMORY = 1024


@dataclass(frozen=True)
class GapGrid:
    """Rewards of P pairs under M prompts each.

    Attributes:
        rewards: ``(P, M, 2)`` float32 of the chosen and the rejected response, as the model gave them; NaN where the
            cell is not used.
        used: ``(P, M)`` bool; false where there is no prompt, or it is too long or refused with this response.
        tokens_computed: tokens that went through the model in this call.
        tokens_plain: tokens that one forward pass for every reward would have taken, without padding.
    """

    rewards: Tensor
    used: Tensor
    tokens_computed: int
    tokens_plain: int

    @property
    def gaps(self) -> Tensor:
        """``(P, M)`` float64: reward of the chosen minus that of the rejected response."""
        chosen, rejected = self.rewards.double().unbind(dim=2)
        return chosen - rejected

    @property
    def pair_log_likelihoods(self) -> Tensor:
        """``(P, M)`` float64: of log-likelihoods, both responses together; -inf where the cell is not used."""
        return self.rewards.double().sum(dim=2).masked_fill(~self.used, -torch.inf)


def distinct_prompts(pairs: Dataset) -> tuple[Tensor, Tensor]:
    """The prompts of a dataset without repetition.

    Returns:
        ``(K,)`` the row at which each prompt comes first, and ``(P,)`` the number of each row's prompt among them.
    """
    numbers: dict[bytes, int] = {}
    own: list[int] = []
    for batch in pairs.select_columns("prompt").iter(1000):
        for prompt in batch["prompt"]:
            key = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode("utf-8", "surrogatepass")).digest()
            own.append(numbers.setdefault(key, len(numbers)))
    return torch.from_numpy(np.unique(own, return_index=True)[1]), torch.tensor(own)


def gap_grid(
    scorer: RewardScorer,
    pairs: Dataset,
    choice: Tensor,
    prompt_rows: Tensor,
    *,
    rows: Tensor | None = None,
    overlong: str = "error",
    on_bad_row: str = "error",
    journal: RewardJournal | None = None,
    progress: bool = False,
) -> GapGrid:
    """Score both responses of each pair under each of its prompts.

    Prompt and response are encoded as one text: nothing is spliced at the level of tokens. Cells are computed prompt
    by prompt, so that a prompt goes through the model once for all responses that follow it in a batch, whichever
    pairs they belong to. Memory holds a thousand cells at a time.

    Args:
        scorer: the model; a `ResponseLikelihood` gives log-likelihoods in place of rewards.
        pairs: columns as in `inform_rm.data.preferences.FEATURES`.
        choice: ``(P, M)`` number of each prompt, the pair's own one in column 0, -1 for none (see
            `inform_rm.decomposition.prompt_free_gap.sample_prompts`).
        prompt_rows: ``(K,)`` row of ``pairs`` that holds each prompt (see `distinct_prompts`).
        rows: ``(P,)`` rows of ``pairs`` that the grid is for; ``None`` for all.
        overlong: what becomes of a cell that is longer than the scorer's ``max_length``: it is a bad row
            (``"error"``), is left out (``"drop"``), or loses tokens of its prompt (``"truncate_prompt"``).
        on_bad_row: what becomes of a pair that cannot be encoded or does not fit under its own prompt: ``"error"``, or
            ``"skip"``, which leaves the cell out. Under another prompt, where the data are not at fault, it is always
            left out.
        journal: rewards of an earlier call that was cut off, continued and written to.
        progress: show a progress bar.

    Raises:
        BadRow: a pair that cannot be encoded, or is too long, under its own prompt, with ``on_bad_row="error"``.
    """
    pair_rows = torch.arange(len(choice)) if rows is None else rows
    rewards = torch.full((*choice.shape, 2), float("nan"))
    flat = rewards.view(-1)  # by entry, as the journal numbers them: 2 * (pair * M + column) + side
    used = choice >= 0
    known = set()
    for entry, reward, _ in () if journal is None else journal.finished():
        flat[entry] = reward
        known.add(entry)
    tokens_plain, tokens_before = 0, scorer.tokens_computed
    total = 2 * int(used.sum())
    with tqdm(total=total, initial=len(known), unit="reward", desc="gap grid", disable=not progress) as bar:
        for cells in _chunks_by_prompt(choice):
            left: dict[int, tuple[list[int], int]] = {}  # by entry the token ids and the length of their prompt
            rows_of = pair_rows[[pair for pair, _ in cells]], prompt_rows[[int(choice[cell]) for cell in cells]]
            found = _encoded_cells(scorer, pairs, *rows_of, overlong)
            for (pair, column), both in zip(cells, found, strict=True):
                if isinstance(both, BadRow) and column == 0 and on_bad_row == "error":
                    raise both
                if both is None or isinstance(both, BadRow):
                    used[pair, column] = False
                    bar.update(2)
                    continue
                for side, ids in enumerate(both.ids):
                    tokens_plain += len(ids)
                    entry = 2 * (pair * choice.shape[1] + column) + side
                    if entry not in known:
                        left[entry] = ids, both.prompt_length
            entries = list(left)
            sequences, prompt_lengths = zip(*left.values(), strict=True) if left else ((), ())
            for places, values, _ in scorer.iter_scores(sequences, prompt_lengths, check_finite=False):
                done = [entries[place] for place in places]
                flat[done] = values
                if journal is not None:
                    journal.add(done, values.tolist())
                bar.update(len(places))
    return GapGrid(rewards, used, scorer.tokens_computed - tokens_before, tokens_plain)


def _chunks_by_prompt(choice: Tensor) -> Iterator[list[tuple[int, int]]]:
    """``(pair, column)`` of the cells in order of their prompts, in lists of bounded size."""
    pairs, columns = (choice >= 0).nonzero(as_tuple=True)
    order = choice[pairs, columns].argsort(stable=True)
    cells = list(zip(pairs[order].tolist(), columns[order].tolist(), strict=True))
    for start in range(0, len(cells), _CELLS_IN_MEMORY):
        yield cells[start : start + _CELLS_IN_MEMORY]


def _encoded_cells(
    scorer: RewardScorer, pairs: Dataset, wanted: Tensor, prompts_at: Tensor, overlong: str
) -> Iterator[TokenGroup | BadRow | None]:
    """Each cell within the model's length, or why it is not; ``None`` where it is too long and to be dropped.

    ``wanted`` and ``prompts_at`` are the rows of a cell's responses and of its prompt.
    """
    needed, place = torch.cat([wanted, prompts_at]).unique(return_inverse=True)
    batch = pairs[needed.tolist()]
    of_pair, of_prompt = (part.tolist() for part in place.chunk(2))
    columns = {name: [batch[name][at] for at in of_pair] for name in ("chosen", "rejected", "file", "row")}
    columns["prompt"] = [batch["prompt"][at] for at in of_prompt]
    for at, both in zip(of_pair, encode_each(scorer.tokenizer, columns), strict=True):
        if isinstance(both, BadRow) or scorer.max_length is None or both.longest <= scorer.max_length:
            yield both
        elif overlong == "drop":
            yield None
        else:
            place = batch["file"][at], batch["row"][at]
            try:
                yield fit_group(both, scorer.max_length, overlong, scorer.tokenizer.bos_token_id, *place)
            except BadRow as bad:
                yield bad
