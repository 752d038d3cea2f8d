"""Attention of a packed row by flash attention on variable lengths: segments alone, responses on their prompts.

Both parts are joined by their log-sum-exp; the backward pass runs each with the joined output and log-sum-exp. That is
exact: the softmax of a part under the joined normaliser is the part of the whole softmax.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Lengths(NamedTuple):
    """Where sequences of queries and keys begin, ``(N + 1,)`` each, and the longest of each."""

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int


class JoinedLayout:
    """What both parts of a packed row need; ``segments`` are those of `inform_rm.scoring.packing.PackedRow`."""

    def __init__(self, segments: Sequence[Sequence[int]], device: torch.device):
        def starts(sizes: list[int]) -> Tensor:
            return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32).to(device)

        sizes = [size for tree in segments for size in tree if size]
        self.own = Lengths(starts(sizes), starts(sizes), max(sizes), max(sizes))
        trees = [tree for tree in segments if len(tree) > 1 and tree[0]]
        replies, prompts = [sum(tree[1:]) for tree in trees], [tree[0] for tree in trees]
        self.shared = Lengths(starts(replies), starts(prompts), max(replies), max(prompts)) if trees else None
        queries, keys, place = [], [], 0
        for tree in segments:
            if len(tree) > 1 and tree[0]:
                keys.append(torch.arange(place, place + tree[0]))
                queries.append(torch.arange(place + tree[0], place + sum(tree)))
            place += sum(tree)
        self.queries, self.keys = (torch.cat(rows).to(device) if rows else None for rows in (queries, keys))


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: JoinedLayout, kernels: Any) -> Tensor:
        forward, _ = kernels
        output, lse, state = forward(query, key, value, layout.own, True)
        shared_state = None
        if layout.shared is not None:
            rows, places = layout.queries, layout.keys
            other, other_lse, shared_state = forward(query[rows], key[places], value[places], layout.shared, False)
            own_lse = lse[:, rows]
            joined = torch.logaddexp(own_lse, other_lse)
            weights = [(part - joined).exp().T.unsqueeze(-1).to(output.dtype) for part in (own_lse, other_lse)]
            output = output.index_copy(0, rows, output[rows] * weights[0] + other * weights[1])
            lse = lse.index_copy(1, rows, joined)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.rest = layout, kernels, state, shared_state
        return output

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        layout, (_, backward), state, shared_state = ctx.rest
        slope = slope.contiguous()
        found = backward(slope, query, key, value, output, lse, layout.own, True, state)
        if layout.shared is not None:
            rows, places = layout.queries, layout.keys
            more = backward(slope[rows], query[rows], key[places], value[places], output[rows],
                            lse[:, rows].contiguous(), layout.shared, False, shared_state)  # fmt: skip
            for total, part, where in zip(found, more, (rows, places, places), strict=True):
                total.index_add_(0, where, part)
        return (*found, None, None)


def joined_attention(query: Tensor, key: Tensor, value: Tensor, layout: JoinedLayout, kernels: Any) -> Tensor:
    """``(T, heads, size)`` of query, key and value ``(T, heads, size)``; key and value may have fewer heads."""
    return _Joined.apply(query.contiguous(), key.contiguous(), value.contiguous(), layout, kernels)


def _flash_forward(query: Tensor, key: Tensor, value: Tensor, of: Lengths, causal: bool) -> tuple[Tensor, Tensor, Any]:
    output, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
        query, key, value, of.queries, of.keys, of.most_queries, of.most_keys, 0.0, causal, False
    )
    return output, lse, (state, unused)


def _flash_backward(
    slope: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, of: Lengths, causal: bool,
    state: Any,
) -> list[Tensor]:  # fmt: skip
    return list(
        torch.ops.aten._flash_attention_backward(
            slope, query, key, value, output, lse, of.queries, of.keys, of.most_queries, of.most_keys, 0.0, causal,
            *state
        )
    )  # fmt: skip


def _pieces(of: Lengths) -> list[tuple[slice, slice]]:
    queries, keys = of.queries.tolist(), of.keys.tolist()
    return [(slice(*pair[:2]), slice(*pair[2:])) for pair in zip(queries, queries[1:], keys, keys[1:], strict=False)]


def _scores(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(query.shape[1] // key.shape[1], 1))
    scores = scores / query.shape[2] ** 0.5
    return scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf) if causal else scores


def _plain_forward(query: Tensor, key: Tensor, value: Tensor, of: Lengths, causal: bool) -> tuple[Tensor, Tensor, Any]:
    """What the kernel does, in plain PyTorch: to try the joining on a CPU."""
    outputs, sums = [], []
    for rows, places in _pieces(of):
        scores = _scores(query[rows], key[places], causal)
        sums.append(scores.logsumexp(dim=-1))
        repeated = value[places].repeat_interleave(query.shape[1] // value.shape[1], 1)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), repeated))
    return torch.cat(outputs), torch.cat(sums, dim=1), None


def _plain_backward(
    slope: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, of: Lengths, causal: bool,
    _state: Any,
) -> list[Tensor]:  # fmt: skip
    found = [torch.zeros_like(tensor) for tensor in (query, key, value)]
    group = query.shape[1] // key.shape[1]
    for rows, places in _pieces(of):
        share = (_scores(query[rows], key[places], causal) - lse[:, rows, None]).exp()
        keys, values = (tensor[places].repeat_interleave(group, 1) for tensor in (key, value))
        rate = torch.einsum("qhd,khd->hqk", slope[rows], values) - (slope[rows] * output[rows]).sum(-1).T.unsqueeze(-1)
        rate = share * rate / query.shape[2] ** 0.5
        found[0][rows] += torch.einsum("hqk,khd->qhd", rate, keys)
        for place, part in (
            (1, torch.einsum("hqk,qhd->khd", rate, query[rows])),
            (2, torch.einsum("hqk,qhd->khd", share, slope[rows])),
        ):
            found[place][places] += part.unflatten(1, (-1, group)).sum(dim=2)
    return found


flash_kernels: tuple[Callable[..., Any], Callable[..., Any]] = (_flash_forward, _flash_backward)
plain_kernels: tuple[Callable[..., Any], Callable[..., Any]] = (_plain_forward, _plain_backward)
