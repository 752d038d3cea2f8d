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
SMALLEST_ROW = 1024  # where not even the row that is measured fits


def tokens_that_fit(bytes_of: Callable[[int], int], free: int) -> int:
    """Most tokens of a row, a multiple of `ROW_MULTIPLE`, at least as many as the one row that is measured has.

    Args:
        bytes_of: memory that a forward and backward pass of so many tokens takes on top of weights and gradients.
        free: memory for it in bytes.
    """
    per_token = max(bytes_of(_PROBE) / _PROBE, 1e-9)
    return max(int(_USED * free / per_token), _PROBE) // ROW_MULTIPLE * ROW_MULTIPLE


def tokens_for_training(model: torch.nn.Module, run: Callable[[dict[str, Any]], None], device: torch.device) -> int:
    """`tokens_that_fit` beside the model's gradients and Adam's two moments; measured on the GPU, once.

    Args:
        model: as it is trained; its gradients are ``None`` afterwards, and no random state has moved.
        run: forward and backward pass of a packed row, given as its inputs.
        device: a GPU.
    """
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def bytes_of(tokens: int) -> int:
        for parameter in learnt:
            parameter.grad = torch.zeros_like(parameter)
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        try:
            with torch.random.fork_rng(devices=[device]):
                run(probe_row(tokens))
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        finally:
            for parameter in learnt:
                parameter.grad = None

    weights = sum(parameter.numel() * parameter.element_size() for parameter in learnt)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free -= torch.cuda.memory_allocated(device) + 3 * weights
    tokens = tokens_that_fit(bytes_of, free)
    torch.cuda.empty_cache()
    return tokens


def probe_row(tokens: int) -> dict[str, Any]:
    """A row of so many tokens: pairs of a prompt of 128 tokens with two responses of 64."""
    pairs = range(tokens // 256)
    sequences = [[1 + pair % 9, 1 + pair // 9, *[1] * 126, *[side] * 64] for side in (1, 2) for pair in pairs]
    row = pack_sequences(sequences, [128] * len(sequences))
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
        half["share"] = part.get("share", 1.0) * (last - first) / number
        if "groups" in part:
            half["groups"] = part["groups"][kept] - first
        for name in {"labels", "latent_noise"} & set(part):
            half[name] = part[name][kept]
        halves.append(half)
    return halves


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
