"""Reward models on cached states: of one Llama layer query, output and MLP, final norm and head are trained.

The layers below stay as they came, and so do the keys and values of this one, so that they are computed once for all
models. Everything else is needed at the last token only: a response costs a few million operations, not gigabytes.
`tests/benchmarks/test_real_text.py` compares with the whole model. Shapes: B rows, T tokens, H hidden size, P pairs,
G groups of keys, D size of a key.
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
from real_text_policy import Rows

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
    learning_rate: float = 3e-4
    epochs: int = 8
    groups_per_step: int = 16


@dataclass
class Pairs:
    """``(P,)`` rows of the preferred and of the other response, and the group (prompt) of each pair."""

    chosen: Tensor
    rejected: Tensor
    group: Tensor


@dataclass
class Prepared:
    """What a model reads of `Rows`, the same for all models of a depth.

    Attributes:
        last: ``(N, H)`` states of the last tokens before the layer.
        keys: ``(N, G, T, D)`` float16, with their rotary angles.
        values: likewise, without.
        lengths: ``(N,)``.
    """

    last: Tensor
    keys: Tensor
    values: Tensor
    lengths: Tensor

    def __getitem__(self, rows: Tensor | slice) -> "Prepared":
        """Some rows, cut to the longest of them."""
        lengths = self.lengths[rows]
        stop = int(lengths.max())
        return Prepared(self.last[rows], self.keys[rows][:, :, :stop], self.values[rows][:, :, :stop], lengths)


class TopLayer(nn.Module):
    """A reward model whose lower layers have been computed.

    Args:
        model: the package's model with one layer; its embeddings are not used.
        dropout: see `Variant`.
    """

    def __init__(self, model: InfoRMForSequenceClassification, dropout: float = 0.0):
        super().__init__()
        self.model, self.dropout = model, nn.Dropout(dropout)
        layer = model.model.layers[0]
        for part in (layer.input_layernorm, layer.self_attn.k_proj, layer.self_attn.v_proj, model.model.embed_tokens):
            part.requires_grad_(False)

    @torch.no_grad()
    def prepare(self, rows: Rows, depth: int) -> Prepared:
        """Keys and values of all rows."""
        body = self.model.model
        layer, size, own = body.layers[0], body.config.head_dim, body.layers[0].self_attn
        keys, values = [], []
        for states in rows.states[depth].split(ROWS_AT_ONCE):
            normed = layer.input_layernorm(states.float())
            key, value = (part(normed).unflatten(-1, (-1, size)).transpose(1, 2) for part in (own.k_proj, own.v_proj))
            rotary = body.rotary_emb(key, torch.arange(states.shape[1])[None])
            keys.append(apply_rotary_pos_emb(key, key, *rotary)[0].half())
            values.append(value.half())
        last = rows.states[depth][torch.arange(len(rows.lengths)), rows.lengths - 1].float()
        return Prepared(last, torch.cat(keys), torch.cat(values), rows.lengths)

    def pooled(self, rows: Prepared) -> Tensor:
        """``(B, H)`` normed states of the last token after the layer."""
        body = self.model.model
        layer, size = body.layers[0], body.config.head_dim
        query = layer.self_attn.q_proj(layer.input_layernorm(rows.last)).unflatten(-1, (-1, 1, size))
        cosine, sine = body.rotary_emb(rows.last, (rows.lengths - 1)[:, None])
        query = apply_rotary_pos_emb(query, query, cosine, sine)[0].view(len(rows.last), rows.keys.shape[1], -1, size)
        scores = query @ rows.keys.float().transpose(-1, -2) / math.sqrt(size)
        seen = torch.arange(rows.keys.shape[2]) < rows.lengths[:, None]
        attended = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(dim=-1) @ rows.values.float()
        hidden = rows.last + layer.self_attn.o_proj(self.dropout(attended.flatten(1)))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.dropout(body.norm(hidden))

    def forward(self, rows: Prepared) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Rewards ``(B,)``, and for InfoRM latent means and log variances ``(B, K)``."""
        pooled = self.pooled(rows)
        if self.model.config.architecture == "standard":
            return self.model.score(pooled)[:, 0], None, None
        rewards, mean, log_variance, _ = self.model.score(pooled, return_latents=True)
        return rewards[:, 0], mean, log_variance


def start_of(model_folder: Path, depth: int, variant: Variant, seed: int) -> TopLayer:
    """Layer `depth` and the final norm of the language model, and a fresh head from `seed`."""
    config = copy.deepcopy(AutoConfig.from_pretrained(model_folder))
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 1, None
    config.bos_token_id = config.eos_token_id = None
    torch.manual_seed(seed)
    model = InfoRMForSequenceClassification(
        InfoRMConfig(config, variant.latent_dim, decoder=variant.decoder, architecture=variant.architecture)
    )
    weights = {}
    with safe_open(model_folder / "model.safetensors", "pt") as file:
        for name in file.keys():
            if name.startswith(f"model.layers.{depth}."):
                weights[name.replace(f".{depth}.", ".0.", 1)] = file.get_tensor(name).float()
        weights["model.norm.weight"] = file.get_tensor("model.norm.weight").float()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or any(not name.startswith(("score.", "model.embed_tokens.")) for name in missing):
        raise ValueError(f"{model_folder}: layer {depth} has no weights for {missing} or unknown ones {unexpected}.")
    if variant.zero_head:
        nn.init.zeros_(model.score.weight)
    return TopLayer(model.float(), variant.dropout)


@torch.no_grad()
def rewards_of(model: TopLayer, rows: Prepared) -> tuple[Tensor, Tensor | None]:
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
    model: TopLayer,
    variant: Variant,
    rows: Prepared,
    pairs: Pairs,
    seed: int,
    at_epoch: Callable[[int, float], object],
) -> None:
    """Train in place with AdamW and a cosine; `at_epoch` is told the epoch and its mean loss.

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
    for epoch in range(variant.epochs):
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
        at_epoch(epoch, sum(losses) / len(losses))


def weights_of(model: nn.Module) -> dict[str, Any]:
    """A copy of all weights."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def averaged(members: list[dict[str, Any]]) -> dict[str, Any]:
    """WARM (arXiv:2401.12187): the mean of weights that were trained from one start."""
    return {name: torch.stack([each[name].double() for each in members]).mean(dim=0).float() for name in members[0]}


def whole_model(
    model_folder: Path, top: InfoRMForSequenceClassification, depth: int
) -> InfoRMForSequenceClassification:
    """The reward model of ``depth + 1`` layers, float32: those of the language model, the trained `top` on them."""
    config = AutoConfig.from_pretrained(model_folder)
    config.num_hidden_layers = depth + 1
    heads = {name: getattr(top.config, name) for name in HEAD_SETTINGS}
    whole = InfoRMForSequenceClassification(InfoRMConfig(config, **heads))
    renamed = {}
    with safe_open(model_folder / "model.safetensors", "pt") as file:
        for name in file.keys():
            parts = name.split(".")
            if parts[:2] != ["model", "layers"] or int(parts[2]) < depth:
                renamed[name] = file.get_tensor(name).float()
    for name, value in top.state_dict().items():
        if "embed_tokens" not in name:
            renamed[name.replace("layers.0.", f"layers.{depth}.", 1)] = value
    renamed.pop("lm_head.weight", None)
    whole.float().load_state_dict(renamed)
    return whole.eval()
