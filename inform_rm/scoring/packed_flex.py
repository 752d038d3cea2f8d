"""Attention of packed rows on accelerators: one FlexAttention kernel a layer, whatever the number of segments.

Which token sees which is one rule, `may_attend`; the block masks are made of it once a batch and shared by all layers.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad

# Rows are filled up to a multiple of this, so that kernels are compiled for few lengths; also the mask's block size.
ROW_MULTIPLE = 128
# Kernels that a process may compile: one for each number and size of heads, dtype, kind of mask, and with or without
# gradient. torch's own limit is 8.
_KERNELS = 64


def row_layout(segments: Sequence[Sequence[int]], length: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Tree, branch and position of each token of a packed row, ``(T,)`` each.

    A prompt is branch 0 of its tree, its responses are branches 1, 2, ...; tokens that fill the row up to ``length``
    are a tree of their own, -1.

    Example:
        >>> [values.tolist() for values in row_layout([[2, 1, 2], [2]], length=8)]
        [[0, 0, 0, 0, 0, 1, 1, -1], [0, 0, 1, 2, 2, 0, 0, 0], [0, 1, 2, 2, 3, 0, 1, 0]]
    """
    lengths = torch.tensor([size for tree in segments for size in tree])
    trees = torch.tensor([number for number, tree in enumerate(segments) for _ in tree])
    branches = torch.tensor([number for tree in segments for number in range(len(tree))])
    starts = torch.tensor([0 if number == 0 else tree[0] for tree in segments for number in range(len(tree))])
    begins = lengths.cumsum(0) - lengths - starts
    total = int(lengths.sum())
    positions = torch.arange(total) - begins.repeat_interleave(lengths)
    filled = (0, 0 if length is None else length - total)
    return (
        pad(trees.repeat_interleave(lengths), filled, value=-1),
        pad(branches.repeat_interleave(lengths), filled),
        pad(positions, filled),
    )


def may_attend(
    trees: Tensor, branches: Tensor, positions: Tensor, sliding_window: int | None, query: Tensor, key: Tensor
) -> Tensor:
    """Whether the token at place ``query`` of a packed row sees the one at place ``key``: bool, of their shape.

    A token sees its own prompt and its own response up to itself, and of these the last ``sliding_window``, itself
    among them (``None``: all). ``trees``, ``branches`` and ``positions`` are from `row_layout`.
    """
    sees = (trees[query] == trees[key]) & (key <= query)
    sees = sees & ((branches[key] == 0) | (branches[key] == branches[query]))
    return sees if sliding_window is None else sees & (positions[query] - positions[key] < sliding_window)


def block_mask(trees: Tensor, branches: Tensor, positions: Tensor, sliding_window: int | None) -> BlockMask:
    """The mask of `may_attend` for FlexAttention, without ever holding a value for each pair of tokens.

    The least and the largest tree, branch and position of each block of tokens tell which blocks see nothing of each
    other and which see all; the few others are looked at token by token. Arguments are those of `may_attend`, T a
    multiple of `ROW_MULTIPLE`.
    """

    def rule(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return may_attend(trees, branches, positions, sliding_window, query, key)

    low, high = torch.stack([trees, branches, positions]).view(3, -1, ROW_MULTIPLE).aminmax(dim=2)
    overlap = (low[:, None] <= high[:, :, None]) & (low[:, :, None] <= high[:, None])  # (3, queries, keys)
    tree, branch, position = range(3)
    is_one = low == high
    is_same = is_one[:, :, None] & is_one[:, None] & overlap
    every = is_same[tree] & (is_same[branch] | (high[branch] == 0)) & torch.ones_like(overlap[tree]).tril(-1)
    if sliding_window is not None:
        every &= high[position][:, None] - low[position] < sliding_window
    some = overlap[tree].tril() & ~every
    queries, keys = some.nonzero(as_tuple=True)
    places = torch.arange(ROW_MULTIPLE, device=trees.device)
    tokens = [block[:, None] * ROW_MULTIPLE + places for block in (queries, keys)]
    sees = may_attend(trees, branches, positions, sliding_window, tokens[0][:, :, None], tokens[1][:, None])
    some[queries, keys] = sees.any(2).any(1)
    parts, wholes = _blocks_in_order(some), _blocks_in_order(every)
    return BlockMask.from_kv_blocks(*parts, *wholes, BLOCK_SIZE=ROW_MULTIPLE, mask_mod=rule)


def _blocks_in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """``(1, 1, B)`` number and ``(1, 1, B, B)`` places of the key blocks of each query block, these first."""
    places = blocks.int().argsort(descending=True, stable=True)
    return blocks.sum(dim=1, dtype=torch.int32)[None, None], places.int()[None, None]


def flex_inputs(inputs: dict[str, Any], config: Any, device: torch.device) -> dict[str, Any]:
    """The inputs of a packed row with block masks, one for each sliding window, in place of its segments.

    Inputs beside ``input_ids`` and ``position_ids`` ``(1, T)`` and ``packed_segments`` are passed on; layers have the
    sliding window of ``config`` or none.
    """
    window = getattr(config.get_text_config(), "sliding_window", None)
    length = inputs["input_ids"].shape[1]
    target = -(-length // ROW_MULTIPLE) * ROW_MULTIPLE
    trees, branches, positions = (values.to(device) for values in row_layout(inputs["packed_segments"], target))

    masks = {size: block_mask(trees, branches, positions, size) for size in {None, window}}
    filled = {name: pad(inputs[name].to(device), (0, target - length)) for name in ("input_ids", "position_ids")}
    return {**inputs, **filled, "packed_segments": masks}


def for_device(inputs: dict[str, Any], config: Any, device: torch.device) -> dict[str, Any]:
    """A packed row's inputs as they are or, for a GPU, with block masks (`flex_inputs`)."""
    return flex_inputs(inputs, config, device) if device.type == "cuda" else inputs


def flex_packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scaling: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """``(1, heads, T, size)``: attention under a block mask of `flex_inputs`; key and value may have fewer heads.

    ``softcap`` is c of ``c tanh(score / c)`` (Gemma 2, arXiv:2408.00118); ``sinks`` are ``(heads,)`` logits that take
    part in each softmax and have no value (gpt-oss).
    """
    # A tensor: under dynamic=True a Python float is a symbol, with which the backward pass cannot be traced.
    cap: Any = None if softcap is None else query.new_full((), softcap, dtype=torch.float32)

    def capped(score: Tensor, _batch: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    # On a CPU it is not worth compiling, and inside a compiled model it is compiled already.
    as_it_is = query.device.type == "cpu" or torch.compiler.is_compiling()
    found = (flex_attention if as_it_is else compiled_kernel())(
        query, key, value, score_mod=None if softcap is None else capped, block_mask=mask, scale=scaling,
        enable_gqa=True, return_aux=None if sinks is None else AuxRequest(lse=True),
    )  # fmt: skip
    if sinks is None:
        return found
    # A sink adds exp(sink) to the denominator of each softmax: the share of the rest is sigmoid(lse - sink).
    output, aux = found
    return output * torch.sigmoid(aux.lse - sinks[None, :, None].float()).unsqueeze(-1).to(output.dtype)


@cache
def compiled_kernel() -> Any:
    """FlexAttention compiled for rows of any length; it never falls back to what holds all scores in memory."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _KERNELS)
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)
