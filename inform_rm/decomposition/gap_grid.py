"""The gap grid: both responses of every pair under several prompts, each prompt computed once for all of them."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm

from inform_rm.data.encoding import OVERLONG_POLICIES, TokenPair, encode_each, fit_pair
from inform_rm.data.pairs import BadRow
from inform_rm.decomposition.likelihoods import ResponseLikelihood
from inform_rm.errors import InputError
from inform_rm.scoring.scorer import RewardScorer
from inform_rm.util.journal import RewardJournal

_CELLS_IN_MEMORY = 1024


@dataclass(frozen=True)
class GapGrid:
    """Rewards of P pairs under M prompts each.

    Attributes:
        rewards: ``(P, M, 2)`` float32 of the chosen and the rejected response; NaN where the cell is not used. What
            the model gave as NaN or infinity stands there as it is.
        used: ``(P, M)`` bool; false where there is no prompt, prompt and response are longer than the model takes, or
            the chat template refuses the prompt.
        truncated: cells whose prompt was cut (``overlong="truncate_prompt"``).
        tokens_computed: tokens that went through the model in this call.
        tokens_plain: tokens that one forward pass for every reward would have taken, without padding.
    """

    rewards: Tensor
    used: Tensor
    truncated: int
    tokens_computed: int
    tokens_plain: int

    @property
    def gaps(self) -> Tensor:
        """``(P, M)`` float64: reward of the chosen minus that of the rejected response."""
        chosen, rejected = self.rewards.double().unbind(dim=2)
        return chosen - rejected

    @property
    def pair_log_likelihoods(self) -> Tensor:
        """``(P, M)`` float64: of a `ResponseLikelihood`, both responses together; -inf where the cell is not used."""
        return self.rewards.double().sum(dim=2).masked_fill(~self.used, -torch.inf)


def distinct_prompts(pairs: Dataset) -> tuple[Tensor, Tensor]:
    """The prompts of a dataset without repetition.

    Args:
        pairs: columns as in `inform_rm.data.preferences.FEATURES`.

    Returns:
        ``(K,)`` the row at which each prompt comes first, and ``(P,)`` the number of each row's prompt among them.
    """
    numbers: dict[bytes, int] = {}
    first_rows: list[int] = []
    own: list[int] = []
    for row, prompt in enumerate(
        prompt for batch in pairs.select_columns("prompt").iter(1000) for prompt in batch["prompt"]
    ):
        key = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode("utf-8", "surrogatepass")).digest()
        if key not in numbers:
            numbers[key] = len(first_rows)
            first_rows.append(row)
        own.append(numbers[key])
    return torch.tensor(first_rows), torch.tensor(own)


def gap_grid(
    scorer: RewardScorer | ResponseLikelihood,
    pairs: Dataset,
    choice: Tensor,
    prompt_rows: Tensor,
    *,
    rows: Tensor | None = None,
    encoded: bool = False,
    overlong: str = "error",
    on_bad_row: str = "error",
    journal: RewardJournal | None = None,
    progress: bool = False,
) -> GapGrid:
    """Score both responses of each pair under each of its prompts.

    The text of every prompt and response is encoded together, as `inform_rm.data.encoding` does it: nothing is spliced
    at the level of tokens. Cells are computed prompt by prompt, so that a prompt goes through the model once for all
    responses that follow it in a batch, whichever pairs they belong to. Memory holds a thousand cells at a time.

    Args:
        scorer: the model; with a `ResponseLikelihood`, log-likelihoods take the place of rewards.
        pairs: columns as in `inform_rm.data.preferences.FEATURES`.
        choice: ``(P, M)`` number of each prompt, the pair's own one in column 0, -1 for none (see
            `inform_rm.decomposition.prompt_free_gap.sample_prompts`).
        prompt_rows: ``(K,)`` row of ``pairs`` that holds each prompt (see `distinct_prompts`).
        rows: ``(P,)`` rows of ``pairs`` that the grid is for; ``None`` for all.
        encoded: ``pairs`` hold the token ids of each pair under its own prompt, which are then not made again: the
            columns that `inform_rm.data.encoding.encode_pairs` makes with this scorer's tokenizer and ``keep_text``.
        overlong: what becomes of a cell that is longer than the scorer's ``max_length``: ``"error"`` if it is a pair
            under its own prompt, ``"drop"``, or ``"truncate_prompt"``. Under another prompt ``"error"`` leaves the
            cell out, too: the data are not at fault.
        on_bad_row: what becomes of a pair under its own prompt that cannot be encoded, or is too long as ``overlong``
            does not allow: ``"error"``, or ``"skip"``, which leaves the cell out. Under another prompt it is always
            left out.
        journal: rewards of an earlier call that was cut off, continued and written to.
        progress: show a progress bar.

    Raises:
        InputError: wrong arguments.
        BadRow: a pair that cannot be encoded, or is too long, under its own prompt, with ``on_bad_row="error"``.
    """
    if overlong not in OVERLONG_POLICIES:
        raise InputError(f"overlong: got {overlong!r}; expected one of {', '.join(OVERLONG_POLICIES)}.")
    if scorer.tokenizer is None:
        raise InputError("tokenizer: a loaded model needs its tokenizer here. Pass tokenizer=...")
    num_pairs, num_prompts = choice.shape
    pair_rows = torch.arange(num_pairs) if rows is None else rows
    rewards = torch.full((num_pairs, num_prompts, 2), float("nan"))
    used = choice >= 0
    known = torch.zeros(num_pairs, num_prompts, 2, dtype=torch.bool)
    if journal is not None:
        for entry, reward, _ in journal.finished():
            rewards.view(-1)[entry] = reward
            known.view(-1)[entry] = True
    truncated = tokens_plain = 0
    tokens_before = scorer.tokens_computed
    total, finished = 2 * int(used.sum()), int(known.sum())
    with tqdm(total=total, initial=finished, unit="reward", desc="gap grid", disable=not progress) as bar:
        for cells in _chunks_by_prompt(choice):
            sequences: list[list[int]] = []
            prompt_lengths: list[int] = []
            entries: list[tuple[int, int, int]] = []
            for (pair, column), both, where in _encode_cells(
                scorer, pairs, pair_rows, prompt_rows, choice, cells, encoded
            ):
                try:
                    fitted = _fit(both, scorer, overlong, *where)
                except BadRow:
                    if column == 0 and on_bad_row == "error":
                        raise
                    fitted = None
                if fitted is None:
                    used[pair, column] = False
                    bar.update(2)
                    continue
                truncated += fitted is not both
                tokens_plain += len(fitted.chosen_ids) + len(fitted.rejected_ids)
                for side, ids in enumerate((fitted.chosen_ids, fitted.rejected_ids)):
                    if not known[pair, column, side]:
                        sequences.append(ids)
                        prompt_lengths.append(fitted.prompt_length)
                        entries.append((pair, column, side))
            scores: Iterator[Any] = scorer.iter_scores(sequences, prompt_lengths, check_finite=False)
            for places, values, _ in scores:
                done = [entries[place] for place in places]
                for (pair, column, side), value in zip(done, values.tolist(), strict=True):
                    rewards[pair, column, side] = value
                if journal is not None:
                    numbers = [(pair * num_prompts + column) * 2 + side for pair, column, side in done]
                    journal.add(numbers, values.tolist())
                bar.update(len(places))
    return GapGrid(rewards, used, truncated, scorer.tokens_computed - tokens_before, tokens_plain)


def _chunks_by_prompt(choice: Tensor) -> Iterator[list[tuple[int, int]]]:
    """``(pair, column)`` of the cells in order of their prompts, in lists of bounded size."""
    pairs, columns = (choice >= 0).nonzero(as_tuple=True)
    order = choice[pairs, columns].argsort(stable=True)
    cells = list(zip(pairs[order].tolist(), columns[order].tolist(), strict=True))
    for start in range(0, len(cells), _CELLS_IN_MEMORY):
        yield cells[start : start + _CELLS_IN_MEMORY]


def _encode_cells(
    scorer: RewardScorer | ResponseLikelihood,
    pairs: Dataset,
    pair_rows: Tensor,
    prompt_rows: Tensor,
    choice: Tensor,
    cells: list[tuple[int, int]],
    encoded: bool,
) -> Iterator[tuple[tuple[int, int], TokenPair | BadRow, tuple[str, int]]]:
    """The cells with their token ids, or why they have none, and the file and row of their pair."""
    wanted = pair_rows[[pair for pair, _ in cells]]
    prompts_at = prompt_rows[[int(choice[pair, column]) for pair, column in cells]]
    needed, place = torch.cat([wanted, prompts_at]).unique(return_inverse=True)
    batch = pairs[needed.tolist()]
    of_pair, of_prompt = place.chunk(2)
    places = list(zip(*([batch[name][at] for at in of_pair] for name in ("file", "row")), strict=True))
    known = {
        number: TokenPair(*(batch[name][at] for name in ("chosen_input_ids", "rejected_input_ids", "prompt_length")))
        for number, ((_, column), at) in enumerate(zip(cells, of_pair, strict=True))
        if encoded and column == 0
    }
    others = [number for number in range(len(cells)) if number not in known]
    columns = {name: [batch[name][of_pair[at]] for at in others] for name in ("chosen", "rejected", "file", "row")}
    columns["prompt"] = [batch["prompt"][of_prompt[at]] for at in others]
    found = known | dict(zip(others, encode_each(scorer.tokenizer, columns), strict=True))
    return zip(cells, (found[number] for number in range(len(cells))), places, strict=True)


def _fit(
    both: TokenPair | BadRow, scorer: RewardScorer | ResponseLikelihood, overlong: str, file: str, row: int
) -> TokenPair | None:
    """A cell within the model's length, or ``None`` under ``overlong="drop"``."""
    if isinstance(both, BadRow):
        raise both
    if scorer.max_length is None or both.longest <= scorer.max_length:
        return both
    if overlong == "drop":
        return None
    return fit_pair(both, scorer.max_length, overlong, scorer.tokenizer.bos_token_id, file, row)
