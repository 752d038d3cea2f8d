"""The small Llama of `mechanism_models.py` for many models at once, with no more work than the last state needs.

The same figures as the package's forward pass (``tests/benchmarks/test_mechanism.py``), quicker on a CPU: on a machine
shared with others 19 rather than 25 ms a model and step of training, 1.8 rather than 5.1 s for the 16,384 responses of
best-of-n. Products are batched over models; the first layer's queries, keys and values are computed once for each word
of the vocabulary, since they do not depend on its place; in the last layer only the last place has a query and goes
through the MLP. Shapes: M models, N responses, T tokens, H hidden size.
"""

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig


def last_states(weights: dict[str, Tensor], ids: Tensor, config: LlamaConfig, dropout: float = 0.0) -> Tensor:
    """Hidden states ``(M, N, H)`` of the last token of ``ids (M, N, T)``, after the final norm.

    Args:
        weights: of the backbone by the package's names (``model....``), with M in front.
        ids: token ids; every response has T.
        config: of the backbone; as many heads for keys and values as for queries.
        dropout: of the attention.
    """
    models, number, length = ids.shape
    size, heads = config.hidden_size, config.num_attention_heads
    turn = _turns(config, length, weights["model.norm.weight"])
    embedding = weights["model.embed_tokens.weight"]
    places = (ids + torch.arange(models, device=ids.device)[:, None, None] * embedding.shape[1]).flatten()
    states = functional.embedding(places, embedding.flatten(0, 1)).view(models, number * length, size)
    last = config.num_hidden_layers - 1
    for layer in range(last + 1):
        own = {name.removeprefix(f"model.layers.{layer}."): value for name, value in weights.items()
               if name.startswith(f"model.layers.{layer}.")}  # fmt: skip
        packed_weight = torch.cat([own[f"self_attn.{name}_proj.weight"] for name in "qkv"], dim=1)
        inputs = _normed(embedding if layer == 0 else states, config)
        packed = _product(inputs, packed_weight * own["input_layernorm.weight"][:, None])
        if layer == 0:  # one row a word of the vocabulary
            packed = functional.embedding(places, packed.flatten(0, 1))
        query, key, value = packed.view(models * number, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        query, key = _turned(query, *turn), _turned(key, *turn)
        if layer == last:
            query, states, length = query[:, :, -1:], states.view(models, number, length, size)[:, :, -1], 1
        mixed = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=layer != last)
        mixed = mixed.transpose(1, 2).reshape(models, number * length, size)
        states = states + _product(mixed, own["self_attn.o_proj.weight"])
        inputs, scale = _normed(states, config), own["post_attention_layernorm.weight"][:, None]
        gate, up = (_product(inputs, own[f"mlp.{name}_proj.weight"] * scale) for name in ("gate", "up"))
        states = states + _product(functional.silu(gate) * up, own["mlp.down_proj.weight"])
    return _normed(states, config) * weights["model.norm.weight"][:, None]


def _product(states: Tensor, weight: Tensor) -> Tensor:
    """``(M, R, I)`` by ``(M, O, I)`` to ``(M, R, O)``."""
    return torch.bmm(states, weight.transpose(1, 2))


def _normed(states: Tensor, config: LlamaConfig) -> Tensor:
    """Root-mean-square norm of ``(..., H)`` without its weight, which the next product takes."""
    return states * (states.square().mean(dim=-1, keepdim=True) + config.rms_norm_eps).rsqrt()


def _turns(config: LlamaConfig, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``(T, D)`` of the rotary positions."""
    size = config.hidden_size // config.num_attention_heads
    rates = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2, device=like.device) / size)
    angles = (torch.arange(length, device=like.device)[:, None] * rates).repeat(1, 2)
    return angles.cos().to(like), angles.sin().to(like)


def _turned(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cosine + torch.cat([-second, first], dim=-1) * sine
