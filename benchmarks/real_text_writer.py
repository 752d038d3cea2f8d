"""Responses of a Llama, many at once: keys and values in one cache, and on a GPU one recorded graph a token.

Shapes: B rows, W width of the prompts, T places of the cache, G groups of keys, D size of a key, V words.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of ids as ``(N, T)``, padded with 0 at the end, and their lengths ``(N,)``."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(list(row))
    return ids, lengths


class Writer:
    """Draws from a ``LlamaForCausalLM`` at temperature 1, no token left out.

    Args:
        model: on its device; its weights may change between two calls of `write`, but not their place.
        new_tokens: longest response. One that has not ended by then is cut, and gets the end token, too.
        end: the token that ends a response.
    """

    def __init__(self, model: Any, new_tokens: int, end: int):
        self.model, self.new_tokens, self.end = model.eval(), new_tokens, end
        config = model.config
        self.groups = config.num_key_value_heads
        self.size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.device, self.dtype = model.device, model.dtype
        self._recorded: dict[tuple[int, int], Any] = {}  # by rows and places: buffers, and on a GPU the graph

    @classmethod
    def of_folder(cls, folder: Path, new_tokens: int, end: int, device: str) -> "Writer":
        from transformers import AutoModelForCausalLM

        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        return cls(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device), new_tokens, end)

    @torch.no_grad()
    def write(self, prompts: Sequence[Sequence[int]], per_prompt: int, seed: int) -> list[list[int]]:
        """`per_prompt` responses to each prompt, those of one prompt together.

        Draws depend on the seed, on what is written at once and on the device.
        """
        ids, lengths = (each.to(self.device) for each in padded(prompts))
        rows, width = len(prompts) * per_prompt, -(-ids.shape[1] // 16) * 16  # few widths: few graphs
        ids = functional.pad(ids, (0, width - ids.shape[1]))
        state = self._state(rows, width)
        torch.manual_seed(seed)  # recording draws, too
        hidden, keys = self._read(ids)
        state["cache"][..., :width, :] = keys.repeat_interleave(per_prompt, dim=2)
        lengths = lengths.repeat_interleave(per_prompt)
        places = torch.arange(state["seen"].shape[1], device=self.device)
        state["seen"].copy_(places < lengths[:, None])
        state["position"].copy_(lengths[:, None])
        state["step"].zero_()
        state["ended"].zero_()
        last = hidden[torch.arange(len(ids), device=self.device), lengths[::per_prompt] - 1]
        self._draw(last.repeat_interleave(per_prompt, dim=0), state)
        for _ in range(self.new_tokens - 1):
            state["advance"]()
        drawn = torch.cat([state["drawn"], torch.full_like(state["drawn"][:, :1], self.end)], dim=1)
        stops = (drawn == self.end).int().argmax(dim=1).tolist()
        return [row[: stop + 1] for row, stop in zip(drawn.tolist(), stops, strict=True)]

    def _read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """``(N, W, H)`` normed states of prompts, and ``(layers, 2, N, G, W, D)`` keys and values."""
        body = self.model.model
        hidden = body.embed_tokens(ids)
        rotary = body.rotary_emb(hidden, torch.arange(ids.shape[1], device=self.device)[None])
        cache = []
        for layer in body.layers:
            query, key, value = self._projected(layer, hidden, rotary)
            cache.append(torch.stack([key, value]))
            attended = functional.scaled_dot_product_attention(
                query, *(each.repeat_interleave(query.shape[1] // self.groups, dim=1) for each in (key, value)),
                is_causal=True,
            )  # fmt: skip
            hidden = self._after(layer, hidden, attended.transpose(1, 2).flatten(2))
        return body.norm(hidden), torch.stack(cache)

    def _projected(self, layer: Any, hidden: Tensor, rotary: Any) -> tuple[Tensor, Tensor, Tensor]:
        normed, own = layer.input_layernorm(hidden), layer.self_attn
        query, key, value = (
            part(normed).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for part in (own.q_proj, own.k_proj, own.v_proj)
        )
        return *apply_rotary_pos_emb(query, key, *rotary), value

    def _after(self, layer: Any, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + layer.self_attn.o_proj(attended)
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def _state(self, rows: int, width: int) -> dict[str, Any]:
        """Buffers for so many rows, and ``advance``, which reads the last token of each and draws the next."""
        found = self._recorded.get((rows, width))
        if found is not None:
            return found
        places, config = width + self.new_tokens, self.model.config
        new = {"device": self.device}
        state: dict[str, Any] = {
            "cache": torch.zeros(
                config.num_hidden_layers, 2, rows, self.groups, places, self.size, dtype=self.dtype, **new
            ),
            "seen": torch.zeros(rows, places, dtype=torch.bool, **new),
            "token": torch.zeros(rows, 1, dtype=torch.long, **new),
            "position": torch.zeros(rows, 1, dtype=torch.long, **new),
            "step": torch.zeros(1, dtype=torch.long, **new),  # tokens that were drawn
            "ended": torch.zeros(rows, dtype=torch.bool, **new),
            "drawn": torch.zeros(rows, self.new_tokens, dtype=torch.long, **new),
            "width": width,
        }  # fmt: skip
        dummy = self.model.model.embed_tokens.weight[:1, None]
        every = torch.arange(places, **new)[None]
        state["rotary"] = [each[0] for each in self.model.model.rotary_emb(dummy, every)]  # (T, D)
        state["advance"] = lambda: self._advance(state)
        if self.device.type == "cuda":
            side = torch.cuda.Stream()  # warm up, as recording asks for
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    state["step"].zero_()
                    self._advance(state)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            state["step"].zero_()
            with torch.cuda.graph(graph):
                self._advance(state)
            state["advance"] = graph.replay
        self._recorded[rows, width] = state
        return state

    def _advance(self, state: dict[str, Any]) -> None:
        """Read the token of each row at the next place of the cache, and draw the one after it."""
        body, place = self.model.model, state["step"] - 1 + state["width"]
        state["seen"].index_fill_(1, place, True)
        hidden = body.embed_tokens(state["token"])
        rotary = [each[state["position"]] for each in state["rotary"]]
        for number, layer in enumerate(body.layers):
            query, key, value = self._projected(layer, hidden, rotary)
            keys, values = state["cache"][number]
            keys.index_copy_(2, place, key)
            values.index_copy_(2, place, value)
            grouped = query.reshape(len(query), self.groups, -1, self.size)  # the heads of a group as its queries
            attended = functional.scaled_dot_product_attention(
                grouped, keys, values, attn_mask=state["seen"][:, None, None].expand(-1, -1, grouped.shape[2], -1)
            )
            hidden = self._after(layer, hidden, attended.reshape(len(query), 1, -1))
        state["position"] += 1
        self._draw(body.norm(hidden)[:, 0], state)

    def _draw(self, normed: Tensor, state: dict[str, Any]) -> None:
        """The next token of each row, ``(B, H)`` states given: the largest of logits with Gumbel noise."""
        token = draw(self.model.lm_head(normed)).masked_fill(state["ended"], self.end)
        state["drawn"].index_copy_(1, state["step"], token[:, None])
        state["token"].copy_(token[:, None])
        state["ended"] |= token == self.end
        state["step"] += 1


def draw(logits: Tensor) -> Tensor:
    """``(B,)`` tokens with the probabilities of ``(B, V)`` logits."""
    noise = torch.empty_like(logits, dtype=torch.float32).exponential_()
    return (logits.float() - noise.log()).argmax(dim=1)
