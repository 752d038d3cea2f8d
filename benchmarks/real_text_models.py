"""Reward models on cached states: of the layers of a Llama the top ones are trained, final norm and head.

The layers below stay as they came, so that their states are computed once for all models. Of the top layer everything
but keys and values is needed at the last token only. While training, products are bfloat16 (autocast); weights are
float32. `tests/benchmarks/test_real_text.py` compares with the whole model. Shapes: B rows, T tokens, H hidden size, P
pairs, G groups of keys, D size of a key.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from inform_rm import InfoRMConfig, InfoRMForSequenceClassification
from inform_rm.configuration_inform import HEAD_SETTINGS
from inform_rm.training.losses import kl_to_standard_normal, kl_weight, reward_model_loss

WARMUP = 0.1  # share of the steps in which the learning rate rises
ROWS_AT_ONCE = 512  # without gradient


@dataclass(frozen=True)
class Variant:
    """One way to train a reward model; what is not named is the package's default.

    ``dropout`` acts on what attention gives and on the pooled state; with ``zero_head`` rewards start at 0.
    """

    architecture: str = "inform"
    beta: float = 0.1
    kl_warmup_steps: float = 0.1
    latent_dim: int = 128
    decoder: str = "mlp"
    weight_decay: float = 0.0
    dropout: float = 0.0
    label_smoothing: float = 0.0
    zero_head: bool = False
    learning_rate: float = 5e-4
    epochs: int = 6
    groups_per_step: int = 4


@dataclass
class Pairs:
    """``(P,)`` rows of the preferred and of the other response, and the group (prompt) of each pair."""

    chosen: Tensor
    rejected: Tensor
    group: Tensor


@dataclass
class Prepared:
    """What a model reads of `Rows`: ``(N, T, H)`` states before its first trained layer, and ``(N,)`` lengths."""

    states: Tensor
    lengths: Tensor

    def __getitem__(self, rows: Tensor | slice) -> "Prepared":
        """Some rows, cut to the longest of them."""
        lengths = self.lengths[rows]
        return Prepared(self.states[rows][:, : int(lengths.max())], lengths)


class TopLayers(nn.Module):
    """A reward model whose lower layers have been computed.

    Args:
        model: the package's model with the top layers alone; its embeddings are not used.
        dropout: see `Variant`.
    """

    def __init__(self, model: InfoRMForSequenceClassification, dropout: float = 0.0):
        super().__init__()
        self.model, self.dropout = model, nn.Dropout(dropout)
        model.model.embed_tokens.requires_grad_(False)

    def pooled(self, rows: Prepared) -> Tensor:
        """``(B, H)`` normed states of the last token after the top layer."""
        body = self.model.model
        hidden = rows.states.float()
        every = torch.arange(hidden.shape[1])[None]
        rotary, seen = body.rotary_emb(hidden, every), every[:, None] <= every[:, :, None]
        ends = torch.arange(len(hidden)), rows.lengths - 1
        for layer in body.layers:
            normed = layer.input_layernorm(hidden)
            key, value = (self._split(part(normed)) for part in (layer.self_attn.k_proj, layer.self_attn.v_proj))
            key = apply_rotary_pos_emb(key, key, *rotary)[0]
            at = rotary
            if layer is body.layers[-1]:
                hidden, normed = hidden[ends][:, None], normed[ends][:, None]
                at = body.rotary_emb(hidden, ends[1][:, None])
                seen = (every < rows.lengths[:, None])[:, None]
            query = self._split(layer.self_attn.q_proj(normed))
            query = apply_rotary_pos_emb(query, query, *at)[0]
            attended = attention(query, key, value, seen)
            hidden = hidden + layer.self_attn.o_proj(self.dropout(attended)).float()
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden)).float()
        return self.dropout(body.norm(hidden[:, 0]))

    def _split(self, projected: Tensor) -> Tensor:
        """``(B, T, heads * D)`` as ``(B, heads, T, D)``."""
        return projected.float().unflatten(-1, (-1, self.model.model.config.head_dim)).transpose(1, 2)

    def forward(self, rows: Prepared) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Rewards ``(B,)``, and for InfoRM latent means and log variances ``(B, K)``."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.training):
            pooled = self.pooled(rows)
        pooled = pooled.float()
        if self.model.config.architecture == "standard":
            return self.model.score(pooled)[:, 0], None, None
        rewards, mean, log_variance, _ = self.model.score(pooled, return_latents=True)
        return rewards[:, 0], mean, log_variance


def attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """``(B, S, heads * D)`` from ``(B, heads, S, D)`` and ``(B, G, T, D)``; ``seen`` is ``(1 or B, S, T)``."""
    grouped = query.unflatten(1, (key.shape[1], -1))  # (B, G, heads / G, S, D)
    scores = grouped @ key[:, :, None].transpose(-1, -2) / math.sqrt(query.shape[-1])
    found = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(dim=-1) @ value[:, :, None]
    return found.flatten(1, 2).transpose(1, 2).flatten(2)


def start_of(model_folder: Path, depths: range, variant: Variant, seed: int) -> TopLayers:
    """The layers `depths` and the final norm of the language model, and a fresh head from `seed`."""
    config = copy.deepcopy(AutoConfig.from_pretrained(model_folder))
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = len(depths), 1, None
    config.bos_token_id = config.eos_token_id = None
    torch.manual_seed(seed)
    model = InfoRMForSequenceClassification(
        InfoRMConfig(config, variant.latent_dim, decoder=variant.decoder, architecture=variant.architecture)
    )
    weights = {}
    with safe_open(model_folder / "model.safetensors", "pt") as file:
        for name in file.keys():
            parts = name.split(".")
            if parts[:2] == ["model", "layers"] and int(parts[2]) in depths:
                parts[2] = str(int(parts[2]) - depths.start)
                weights[".".join(parts)] = file.get_tensor(name).float()
        weights["model.norm.weight"] = file.get_tensor("model.norm.weight").float()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or any(not name.startswith(("score.", "model.embed_tokens.")) for name in missing):
        raise ValueError(f"{model_folder}: {depths} has no weights for {missing} or unknown ones {unexpected}.")
    if variant.zero_head:
        nn.init.zeros_(model.score.weight)
    return TopLayers(model.float(), variant.dropout)


@torch.no_grad()
def rewards_of(model: TopLayers, rows: Prepared) -> tuple[Tensor, Tensor | None]:
    """``(N,)`` rewards and, for InfoRM, ``(N, K)`` latent means of all rows."""
    model.eval()
    starts = range(0, len(rows.lengths), ROWS_AT_ONCE)
    parts = [model(rows[slice(start, start + ROWS_AT_ONCE)])[:2] for start in starts]
    latents = None if parts[0][1] is None else torch.cat([part[1] for part in parts if part[1] is not None])
    return torch.cat([part[0] for part in parts]), latents


def accuracy(rewards: Tensor, pairs: Pairs) -> float:
    """Share of pairs whose chosen response has the higher reward; a tie counts half."""
    gaps = rewards[pairs.chosen] - rewards[pairs.rejected]
    return float((gaps > 0).double().mean() + 0.5 * (gaps == 0).double().mean())


def batches(pairs: Pairs, variant: Variant, generator: torch.Generator) -> Iterator[Tensor]:
    """Places of the pairs of each step of an epoch: all pairs of some groups, groups in random order."""
    groups = pairs.group.unique()
    order = groups[torch.randperm(len(groups), generator=generator)]
    for part in order.split(variant.groups_per_step):
        yield torch.isin(pairs.group, part).nonzero()[:, 0]


def train(
    model: TopLayers,
    variant: Variant,
    rows: Prepared,
    pairs: Pairs,
    seed: int,
    at_epoch: Callable[[float], object],
) -> None:
    """Train in place with AdamW and a cosine; `at_epoch` is told the mean loss of each epoch.

    A response that stands in several pairs of a step is computed once, with one draw of the latent.
    """  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of dropout and latent noise
    optimizer = torch.optim.AdamW(
        [each for each in model.parameters() if each.requires_grad],
        lr=variant.learning_rate,
        weight_decay=variant.weight_decay,
    )
    steps = variant.epochs * -(-len(pairs.group.unique()) // variant.groups_per_step)
    step = 0
    for _ in range(variant.epochs):
        model.train()
        losses = []
        for places in batches(pairs, variant, generator):
            for group in optimizer.param_groups:
                rise = min(1.0, (step + 1) / (WARMUP * steps))
                group["lr"] = variant.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / steps))
            used, own = torch.cat([pairs.chosen[places], pairs.rejected[places]]).unique(return_inverse=True)
            rewards, mean, log_variance = model(rows[used])
            kls: list[Tensor | None] = [None, None]
            if mean is not None and log_variance is not None:
                kl = kl_to_standard_normal(mean, log_variance)
                kls = list(kl[own].chunk(2))
            loss = reward_model_loss(
                *rewards[own].chunk(2), *kls, beta=kl_weight(step, steps, variant.beta, variant.kl_warmup_steps),
                label_smoothing=variant.label_smoothing,
            )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
            step += 1
        at_epoch(sum(losses) / len(losses))


def weights_of(model: nn.Module) -> dict[str, Any]:
    """A copy of all weights."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def averaged(members: list[dict[str, Any]]) -> dict[str, Any]:
    """WARM (arXiv:2401.12187): the mean of weights that were trained from one start."""
    return {name: torch.stack([each[name].double() for each in members]).mean(dim=0).float() for name in members[0]}


def whole_model(
    model_folder: Path, top: InfoRMForSequenceClassification, depths: range
) -> InfoRMForSequenceClassification:
    """The reward model of all layers up to `depths`, float32: the language model's, the trained `top` on them."""
    config = AutoConfig.from_pretrained(model_folder)
    config.num_hidden_layers = depths.stop
    heads = {name: getattr(top.config, name) for name in HEAD_SETTINGS}
    whole = InfoRMForSequenceClassification(InfoRMConfig(config, **heads))
    renamed = {}
    with safe_open(model_folder / "model.safetensors", "pt") as file:
        for name in file.keys():
            parts = name.split(".")
            if parts[:2] != ["model", "layers"] or int(parts[2]) < depths.start:
                renamed[name] = file.get_tensor(name).float()
    for name, value in top.state_dict().items():
        if "embed_tokens" not in name:
            parts = name.split(".")
            if parts[1] == "layers":
                parts[2] = str(int(parts[2]) + depths.start)
            renamed[".".join(parts)] = value
    renamed.pop("lm_head.weight", None)
    whole.float().load_state_dict(renamed)
    return whole.eval()
