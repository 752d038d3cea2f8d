"""How many tokens of a packed row fit into a GPU's memory, and what becomes of a batch that does not."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inform_rm.scoring.packed_flex import ROW_MULTIPLE, row_layout
from inform_rm.scoring.packing import pack_sequences

logger = logging.getLogger(__name__)

# Tokens of the row that is measured: enough for what does not depend on them to be small beside the rest.
_PROBE = 4096
# Of the free memory: the rest is for what the allocator cannot use and for rows with more responses than the probe.
_USED = 0.85
SMALLEST_ROW = 1024  # also where not even the row that is measured fits
_PLAIN_ROW = 8192  # where it cannot be measured, as in scoring


def tokens_that_fit(token_bytes: float, free: int) -> int:
    """Most tokens of a row, a multiple of `ROW_MULTIPLE`, at least `SMALLEST_ROW`.

    ``token_bytes`` is what a forward and backward pass takes for a token beside weights and gradients, of the
    ``free`` bytes.
    """
    return max(int(_USED * free / max(token_bytes, 1e-9)), SMALLEST_ROW) // ROW_MULTIPLE * ROW_MULTIPLE


def tokens_for_training(
    model: torch.nn.Module,
    run: Callable[[dict[str, Any]], None],
    device: torch.device,
    max_length: int | None = None,
    *,
    in_buckets: bool = False,
) -> int:
    """`tokens_that_fit` beside the model's gradients and the optimizer's state; measured on the GPU, once.

    It never raises: where a row cannot be measured, a log line says why and what is taken instead. ``run`` makes the
    forward and backward pass of a packed row, given as its inputs, whose sequences have at most ``max_length`` tokens;
    ``in_buckets``: gradients are there twice (DDP). Afterwards they are ``None``, and no random state has moved.
    """
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        row = probe_row(_PROBE, max_length)
        token_bytes = _peak_bytes(learnt, lambda: run(row), device) / row["input_ids"].numel()
        # Beside the gradients Adam's two moments and, of half-precision weights, what rounding took from them.
        weights = sum(parameter.numel() * parameter.element_size() for parameter in learnt)
        halves = sum(parameter.numel() * 2 for parameter in learnt if parameter.element_size() == 2)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        free -= torch.cuda.memory_allocated(device) + (4 if in_buckets else 3) * weights + halves
        found, why = tokens_that_fit(token_bytes, free), None
    except torch.OutOfMemoryError:
        found, why = SMALLEST_ROW, f"a row of {_PROBE} tokens does not fit into the memory of {device}"
    except Exception as error:  # a compiler, a driver, a model: whatever it is, a default trains
        found, why = _PLAIN_ROW, f"memory could not be measured ({type(error).__name__}: {str(error)[:200]})"
    if why is not None:
        logger.warning("tokens_per_batch: %d, because %s. Set it to choose another.", found, why)
    torch.cuda.empty_cache()
    return found


def _peak_bytes(learnt: list[torch.nn.Parameter], run: Callable[[], None], device: torch.device) -> int:
    """Peak memory of what ``run`` does, on top of weights and gradients."""
    try:
        for parameter in learnt:
            parameter.grad = torch.zeros_like(parameter)
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        with torch.random.fork_rng(devices=[device]):
            run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    finally:
        for parameter in learnt:
            parameter.grad = None


def probe_row(tokens: int, max_length: int | None = None) -> dict[str, Any]:
    """A row of so many tokens: pairs of a prompt of 128 tokens with two responses of 64; shorter by ``max_length``."""
    response = min(64, max(8, (max_length or 192) // 3))
    pairs = range(tokens // (4 * response))
    sequences = [
        [1 + pair % 9, 1 + pair // 9, *[1] * (2 * response - 2), *[side] * response]
        for side in (1, 2)
        for pair in pairs
    ]
    row = pack_sequences(sequences, [2 * response] * len(sequences))
    return {
        "input_ids": row.input_ids, "position_ids": row.position_ids, "packed_segments": row.segments,
        "pooled_positions": row.pooled_positions,
    }  # fmt: skip


def split_in_two(part: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The inputs of a forward pass over pairs or groups as those of two, whose losses add up to its own.

    ``None`` where there is only one pair or group.
    """
    number = len(part["margin"])
    if number < 2:
        return None
    groups = part["groups"].cpu() if "groups" in part else torch.arange(number).repeat(2)
    halves = []
    for first, last in ((0, number // 2), (number // 2, number)):
        kept = ((groups >= first) & (groups < last)).nonzero().flatten()
        half = part | _rows_of(part, kept)
        half["margin"] = part["margin"][first:last]
        # Pairs that do not count stand at the end.
        counted = part.get("counted", number)
        own = min(max(counted - first, 0), last - first)
        half["share"] = part.get("share", 1.0) * own / max(counted, 1)
        if "counted" in part:
            half["counted"] = own
        if "groups" in part:
            half["groups"] = part["groups"][kept] - first
        for name in {"labels", "latent_noise"} & set(part):
            half[name] = part[name][kept]
        halves.append(half)
    return halves


def parts_within(part: dict[str, Any], most: int | None) -> list[dict[str, Any]]:
    """A forward pass as several, each of at most so many tokens if it has more than one pair or group."""
    halves = None if most is None or part["input_ids"].numel() <= most else split_in_two(part)
    return [part] if halves is None else [small for half in halves for small in parts_within(half, most)]


def _rows_of(part: dict[str, Any], kept: Tensor) -> dict[str, Any]:
    """What the model takes for some of a pass's responses."""
    if "packed_segments" not in part:
        return {name: part[name][kept] for name in ("input_ids", "attention_mask")}
    device = part["input_ids"].device
    trees, branches, _ = row_layout(part["packed_segments"])
    tokens = part["input_ids"][0].cpu()
    sequences, prompt_lengths = [], []
    for place in part["pooled_positions"].cpu()[kept].tolist():
        is_own = (trees == trees[place]) & ((branches == 0) | (branches == branches[place]))
        sequences.append(tokens[is_own].tolist())
        prompt_lengths.append(part["packed_segments"][int(trees[place])][0] if branches[place] else 0)
    row = pack_sequences(sequences, prompt_lengths)
    return {
        "input_ids": row.input_ids.to(device), "position_ids": row.position_ids.to(device),
        "packed_segments": row.segments, "pooled_positions": row.pooled_positions.to(device),
    }  # fmt: skip
