"""Reward models of `real_text.py`: all layers, final norm and head are trained, on rows of tokens.

Weights are float32; products are bfloat16 (autocast) while training and float32 on a CPU otherwise. A model of fewer
layers is the first of the policy's. Shapes: N rows, T tokens, P pairs.
"""

import contextlib
import copy
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inform_rm import InfoRMForSequenceClassification
from inform_rm.training.kl_warmup import KLWarmup
from inform_rm.training.losses import kl_to_standard_normal, reward_model_loss
from real_text_texts import Rows

WARMUP = 0.1  # share of the steps in which the learning rate rises
GROUPED = 16  # steps whose pairs are sorted by length among them
TOKENS_AT_ONCE = 1 << 17  # without gradient


@dataclass(frozen=True)
class Variant:
    """One way to train a reward model; what is not named is the package's default."""

    architecture: str = "inform"
    beta: float = 0.1
    kl_warmup_steps: float = 0.1
    kl_warmup_nats: float = 0.03
    latent_dim: int = 128
    weight_decay: float = 0.0
    attention_dropout: float = 0.0
    label_smoothing: float = 0.0
    learning_rate: float = 1e-4
    epochs: int = 3
    pairs_per_step: int = 64


@dataclass
class Pairs:
    """``(P,)`` rows of the preferred and of the other response."""

    chosen: Tensor
    rejected: Tensor

    def __getitem__(self, kept: Tensor) -> "Pairs":
        return Pairs(self.chosen[kept], self.rejected[kept])

    def __len__(self) -> int:
        return len(self.chosen)


def start_of(model_folder: Path, layers: int, variant: Variant, seed: int, device: str) -> Any:
    """The first `layers` layers and the final norm of the language model, and a fresh head from `seed`."""
    torch.manual_seed(seed)
    model = InfoRMForSequenceClassification.from_backbone(
        str(folder_of_layers(model_folder, layers)), architecture=variant.architecture, beta=variant.beta,
        latent_dim=variant.latent_dim, dtype=torch.float32,
    )  # fmt: skip
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = variant.attention_dropout
    return model.to(device)


def folder_of_layers(model_folder: Path, layers: int) -> Path:
    """A folder beside the model's with its first layers only, written once; the model's own for all of them."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_folder)
    if layers == config.num_hidden_layers:
        return model_folder
    target = model_folder.with_name(f"{model_folder.name}-first{layers}")
    if not (target / "model.safetensors").exists():
        config = copy.deepcopy(config)
        config.num_hidden_layers = layers
        config.save_pretrained(target)
        weights = load_file(model_folder / "model.safetensors")
        kept = {name: value for name, value in weights.items()
                if ".layers." not in name or int(name.split(".layers.")[1].split(".")[0]) < layers}  # fmt: skip
        part = target / f"{os.getpid()}.part"  # of several processes each writes its own
        save_file(kept, part, {"format": "pt"})
        part.rename(target / "model.safetensors")
    return target


def batch(rows: Rows, places: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """Ids and mask of some rows, cut to the longest of them."""
    lengths = rows.lengths[places]
    width = int(lengths.max())
    mask = torch.arange(width) < lengths[:, None]
    return rows.ids[places, :width].to(device, non_blocking=True), mask.long().to(device, non_blocking=True)


def half_products(device: str, training: bool = True) -> Any:
    """Autocast to bfloat16, where it is quicker."""
    if device.startswith("cuda") or training:
        return torch.autocast(device.split(":")[0], torch.bfloat16)
    return contextlib.nullcontext()


@torch.no_grad()
def rewards_of(model: Any, rows: Rows, device: str, latents: bool = False) -> tuple[Tensor, Tensor | None]:
    """``(N,)`` rewards and, if asked for, ``(N, K)`` latent means of all rows, on the CPU."""
    model.eval()
    order = rows.lengths.argsort()
    rewards, means = torch.empty(len(order)), None
    at_once = max(1, TOKENS_AT_ONCE // rows.ids.shape[1])
    for places in order.split(at_once):
        with half_products(device, training=False):
            output = model(*batch(rows, places, device))
        rewards[places] = output.logits[:, 0].float().cpu()
        if latents and output.latent_mean is not None:
            if means is None:
                means = torch.empty(len(order), output.latent_mean.shape[1])
            means[places] = output.latent_mean.float().cpu()
    return rewards, means


def accuracy(rewards: Tensor, pairs: Pairs) -> float:
    """Share of pairs whose chosen response has the higher reward; a tie counts half."""
    gaps = rewards[pairs.chosen] - rewards[pairs.rejected]
    return float((gaps > 0).double().mean() + 0.5 * (gaps == 0).double().mean())


def batches(pairs: Pairs, lengths: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Places of the pairs of each step of an epoch, in random order; those of a step are of about equal length."""
    longer = torch.maximum(lengths[pairs.chosen], lengths[pairs.rejected])
    for some in torch.randperm(len(pairs), generator=generator).split(GROUPED * size):
        parts = some[longer[some].argsort()].split(size)
        for number in torch.randperm(len(parts), generator=generator).tolist():
            yield parts[number]


def train(
    model: Any, variant: Variant, rows: Rows, pairs: Pairs, seed: int, device: str,
) -> float:  # fmt: skip
    """Train in place; gives the mean loss of the last epoch."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    decayed = [each for each in model.parameters() if each.dim() > 1]
    others = [each for each in model.parameters() if each.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": variant.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=variant.learning_rate, fused=device.startswith("cuda"),
    )  # fmt: skip
    warmup = KLWarmup(variant.beta, variant.kl_warmup_steps, variant.kl_warmup_nats)
    steps, step, losses = variant.epochs * -(-len(pairs) // variant.pairs_per_step), 0, []
    for _ in range(variant.epochs):
        model.train()
        losses = []
        for places in batches(pairs, rows.lengths, variant.pairs_per_step, generator):
            for group in optimizer.param_groups:
                rise = min(1.0, (step + 1) / (WARMUP * steps))
                group["lr"] = variant.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / steps))
            both = torch.cat([pairs.chosen[places], pairs.rejected[places]])
            with half_products(device):
                output = model(*batch(rows, both, device))
            kls: list[Tensor | None] = [None, None]
            if output.latent_mean is not None:
                kls = list(kl_to_standard_normal(output.latent_mean, output.latent_log_variance).chunk(2))
            loss = reward_model_loss(
                *output.logits[:, 0].chunk(2), *kls, label_smoothing=variant.label_smoothing,
                beta=warmup.weight(step, steps),
            )  # fmt: skip
            if warmup.waits:
                warmup.add(len(places), float(reward_model_loss(*output.logits.detach()[:, 0].chunk(2))) * len(places))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
            step += 1
    return float(torch.stack(losses).mean())


def averaged(members: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """WARM (arXiv:2401.12187): the mean of weights that were trained from one start."""
    return {name: torch.stack([each[name].float() for each in members]).mean(dim=0) for name in members[0]}
