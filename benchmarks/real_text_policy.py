"""Responses of a policy and the hidden states of every token, in one pass: what `real_text.py` caches first.

A reward model of N layers whose lower ones stay as they came needs their states only once. Here the policy's own pass
through its layers gives them: a response is written, and the states before some of the layers are kept. Llama models
only. Shapes: B rows, S tokens of a step, H hidden size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

TEMPLATE = Path(__file__).parent / "chatml.jinja"  # without the system message that would come before each prompt


@dataclass
class Rows:
    """Token rows, padded at the end, with the states before the layers in `depths`.

    Attributes:
        ids: ``(N, T)`` token ids, prompt and response; the last one ends the response.
        prompt_lengths: ``(N,)`` tokens of the prompt.
        lengths: ``(N,)`` all tokens.
        states: by depth ``(N, T, H)`` float16.
    """

    ids: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    states: dict[int, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """As they are kept in a file."""
        kept = {"ids": self.ids, "prompt_lengths": self.prompt_lengths, "lengths": self.lengths}
        return kept | {f"states.{depth}": value for depth, value in self.states.items()}


class LlamaWithStates:
    """The layers of a Llama with a cache of keys and values that is not copied at every token.

    Args:
        model: a ``LlamaForCausalLM``; nothing of it is changed. With weights in bfloat16 its products are bfloat16,
            twice as quick on a CPU with AVX512-BF16; states, norms and attention are float32.
        depths: before which layers states are kept.
    """

    def __init__(self, model: Any, depths: Sequence[int]):
        self.model, self.depths, config = model.eval(), tuple(depths), model.config
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.size, self.dtype = config.hidden_size // config.num_attention_heads, model.lm_head.weight.dtype

    def new_cache(self, rows: int, length: int) -> Tensor:
        """``(layers, 2, rows, groups, length, size)``."""
        return torch.empty(len(self.model.model.layers), 2, rows, self.groups, length, self.size)

    @torch.no_grad()
    def step(
        self, ids: Tensor, positions: Tensor, cache: Tensor, start: int, seen: Tensor
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Read ``(B, S)`` ids at the places from `start` on of the cache.

        Args:
            ids: tokens.
            positions: ``(B, S)`` of them in their texts.
            cache: keys and values, written at ``start`` to ``start + S``.
            start: tokens before these in the cache.
            seen: ``(B, S, start + S)`` which places each token may look at.

        Returns:
            ``(B, S, H)`` states after the last layer's norm, and by depth those before a layer.
        """
        body = self.model.model
        hidden, kept = body.embed_tokens(ids).float(), {}
        rotary = body.rotary_emb(hidden, positions)
        for number, layer in enumerate(body.layers):
            if number in self.depths:
                kept[number] = hidden.half()
            own = layer.self_attn
            normed = layer.input_layernorm(hidden)
            attended = self._attend(own, normed.to(self.dtype), rotary, cache[number], start, seen)
            hidden = hidden + own.o_proj(attended.to(self.dtype))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden).to(self.dtype))
        return body.norm(hidden), kept

    def _attend(self, own: Any, normed: Tensor, rotary: Any, cache: Tensor, start: int, seen: Tensor) -> Tensor:
        rows, steps, _ = normed.shape
        query, key, value = (
            part(normed).float().view(rows, steps, -1, self.size).transpose(1, 2)
            for part in (own.q_proj, own.k_proj, own.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        stop = start + steps
        cache[0, :, :, start:stop], cache[1, :, :, start:stop] = key, value
        keys, values = (part[:, :, :stop].flatten(0, 1) for part in cache)  # (B * groups, stop, size): views
        per_group = self.heads // self.groups
        query = query.reshape(rows * self.groups, per_group * steps, self.size)
        scores = torch.bmm(query, keys.transpose(1, 2)).view(rows, self.groups, per_group, steps, stop)
        scores = (scores / math.sqrt(self.size)).masked_fill(~seen[:, None, None], -torch.inf)
        found = torch.bmm(scores.softmax(dim=-1).view(rows * self.groups, per_group * steps, stop), values)
        return found.view(rows, self.heads, steps, self.size).transpose(1, 2).reshape(rows, steps, -1)


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of ids as ``(N, T)``, padded with 0 at the end, and their lengths ``(N,)``."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(list(row))
    return ids, lengths


def read_rows(reader: LlamaWithStates, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Rows:
    """States of given texts: token ids of prompts and of responses, which end with the end token."""
    ids, lengths = padded([[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)])
    steps = torch.arange(ids.shape[1])
    seen = (steps[None, :] <= steps[:, None]).expand(len(ids), -1, -1)
    cache = reader.new_cache(*ids.shape)
    _, states = reader.step(ids, steps.expand_as(ids), cache, 0, seen)
    return Rows(ids, torch.tensor([len(each) for each in prompts]), lengths, states)


def write_rows(
    reader: LlamaWithStates, prompts: Sequence[Sequence[int]], per_prompt: int, new_tokens: int, end: int, seed: int
) -> Rows:
    """`per_prompt` responses to each prompt, drawn at temperature 1 from all tokens, with the states of all tokens.

    A response that has not ended after `new_tokens` is cut there and gets the end token, too. Rows lie in the order of
    the prompts, those of one prompt together. Draws depend on `seed` and on what is written at once.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, lengths = padded(prompts)
    num_prompts, width = ids.shape
    rows = num_prompts * per_prompt
    steps = torch.arange(width)
    first = reader.new_cache(num_prompts, width)
    seen = (steps[None, :] <= steps[:, None]).expand(num_prompts, -1, -1)
    hidden, of_prompts = reader.step(ids, steps.expand_as(ids), first, 0, seen)
    cache = reader.new_cache(rows, width + new_tokens + 1)
    cache[:, :, :, :, :width] = first.repeat_interleave(per_prompt, dim=2)
    lengths = lengths.repeat_interleave(per_prompt)
    last = hidden[torch.arange(num_prompts), lengths[::per_prompt] - 1].repeat_interleave(per_prompt, dim=0)
    drawn, of_tokens, ended = [], [], torch.zeros(rows, dtype=torch.bool)
    for step in range(new_tokens + 1):
        if step < new_tokens:
            token = _draw(reader.model.lm_head(last.to(reader.dtype)).float(), generator).masked_fill(ended, end)
        else:
            token = torch.full((rows,), end)
        ended |= token == end
        places = torch.arange(width + step + 1)
        seen = ((places < lengths[:, None]) | (places >= width))[:, None]
        hidden, states = reader.step(token[:, None], (lengths + step)[:, None], cache, width + step, seen)
        last = hidden[:, 0]
        drawn.append(token)
        of_tokens.append(states)
        if bool(ended.all()):
            break
    states_of_parts = {}
    for depth in reader.depths:
        of_responses = torch.cat([each[depth] for each in of_tokens], dim=1)
        states_of_parts[depth] = of_prompts[depth].repeat_interleave(per_prompt, dim=0), of_responses
    of_rows = ids.repeat_interleave(per_prompt, dim=0)
    return _joined(of_rows, lengths, torch.stack(drawn, dim=1), end, states_of_parts)


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token a row, by inversion of the distribution function."""
    summed = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64) * summed[:, -1:]
    return torch.searchsorted(summed, uniform, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)


def _joined(
    prompt_ids: Tensor, prompt_lengths: Tensor, drawn: Tensor, end: int, states: dict[int, tuple[Tensor, Tensor]]
) -> Rows:
    """Prompt and response of each row side by side, without the padding between them."""
    steps, width = drawn.shape[1], prompt_ids.shape[1]
    response_lengths = (drawn == end).int().argmax(dim=1) + 1
    total = torch.arange(width + steps).expand(len(drawn), -1)
    lengths = prompt_lengths + response_lengths
    # Place t of a row: t in the prompt, or width + (t - prompt length) in the response.
    source = torch.where(total < prompt_lengths[:, None], total, (total - prompt_lengths[:, None] + width)).clamp_max(
        width + steps - 1
    )
    stop = int(lengths.max())
    source = source[:, :stop]
    ids = torch.cat([prompt_ids, drawn], dim=1).gather(1, source)
    return Rows(ids, prompt_lengths, lengths, {
        depth: torch.cat(parts, dim=1).gather(1, source[:, :, None].expand(-1, -1, parts[0].shape[2]))
        for depth, parts in states.items()
    })  # fmt: skip
