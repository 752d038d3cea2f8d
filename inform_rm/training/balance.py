"""Which process learns from which pairs of an update, so that none waits long for another.

An update's pairs are those of one process with as large a batch; only who computes which of them changes. Each process
gets equally many in every forward pass, so gradients are averaged as before and all make the same number of steps.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyarrow import compute
from torch.utils.data import Sampler

from inform_rm.training.collators import RESPONSES

# Operations of a decoder layer: about 32 hidden_size^2 a token in its linear layers (4 of attention, 12 of the MLP,
# multiplied and added) and 4 hidden_size for each pair of tokens of which one sees the other.
_LINEAR_PER_ATTENTION = 8
_SIDES = ("chosen_input_ids", "rejected_input_ids")


def pair_costs(prompts: Any, responses: Sequence[Any], hidden_size: int) -> NDArray[np.float64]:
    """``(N,)`` cost of each pair or group in a packed row, in tokens: its own, and what attention adds.

    ``prompts`` are ``(N,)`` tokens of the prompts, computed once each; so is each of the ``responses`` of a pair. The
    smaller the model's ``hidden_size``, the more attention weighs.
    """
    prompts = np.asarray(prompts, dtype=np.float64)
    parts = [np.asarray(part, dtype=np.float64) for part in responses]
    tokens = prompts + sum(parts)
    seen = prompts**2 / 2 + sum(part * (prompts + part / 2) for part in parts)
    return tokens + seen / (_LINEAR_PER_ATTENTION * hidden_size)


def costs_of(rows: Any, hidden_size: int) -> NDArray[np.float64]:
    """`pair_costs` of encoded pairs or groups."""
    if RESPONSES in rows.column_names:
        plain = rows.select_columns(["prompt_length", RESPONSES]).with_format(None)
        lengths = [(row["prompt_length"], [len(ids) for ids in row[RESPONSES]]) for row in plain]
        return np.array(
            [pair_costs(prompt, [total - prompt for total in totals], hidden_size) for prompt, totals in lengths]
        )
    parts = []
    for batch in rows.select_columns(["prompt_length", *_SIDES]).with_format("arrow").iter(10_000):
        prompts = batch["prompt_length"].to_numpy()
        sides = [compute.list_value_length(batch[name]).to_numpy() - prompts for name in _SIDES]
        parts.append(pair_costs(prompts, sides, hidden_size))
    return np.concatenate(parts)


def balanced(costs: Any, parts: int) -> list[list[int]]:
    """Places of ``costs`` in ``parts`` lists of equal length with about equal sums; the same for the same costs.

    The most costly comes first, to the list with the least so far that has room (longest processing time first).

    Example:
        >>> balanced([9, 1, 1, 7], parts=2)
        [[0, 2], [1, 3]]
    """
    room = len(costs) // parts
    found: list[list[int]] = [[] for _ in range(parts)]
    sums = np.zeros(parts)
    for place in np.argsort(-np.asarray(costs, dtype=np.float64), kind="stable").tolist():
        chosen = int(sums.argmin())
        found[chosen].append(place)
        sums[chosen] = sums[chosen] + costs[place] if len(found[chosen]) < room else np.inf
    return [sorted(part) for part in found]


class BalancedSampler(Sampler[int]):
    """The rows of another sampler, an update's among themselves in another order.

    Every ``batch_size`` rows go to one process for a forward pass, which is how Accelerate deals them out; an update
    has ``accumulated`` of these. All processes must get the same rows from the sampler; costs are those of
    `pair_costs`. What is left at the end for less than a batch for every process stays as it is: rows are then
    repeated, and the loop counts which.
    """

    def __init__(
        self, sampler: Any, costs: NDArray[np.float64], batch_size: int, processes: int, accumulated: int = 1
    ):
        self.sampler, self.costs = sampler, costs
        self.batch_size, self.processes, self.accumulated = batch_size, processes, accumulated

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives; the data loader calls it."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        """Rows; of every ``batch_size * processes * accumulated`` each ``batch_size`` cost about the same."""
        a_pass = self.batch_size * self.processes
        chunk: list[int] = []
        for row in self.sampler:
            chunk.append(row)
            if len(chunk) == a_pass * self.accumulated:
                yield from self._ordered(chunk)
                chunk = []
        full = len(chunk) - len(chunk) % a_pass
        yield from self._ordered(chunk[:full])
        yield from chunk[full:]

    def _ordered(self, rows: list[int]) -> Iterator[int]:
        for part in balanced(self.costs[rows], len(rows) // self.batch_size) if rows else ():
            yield from (rows[place] for place in part)
