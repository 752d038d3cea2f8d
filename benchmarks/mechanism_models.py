"""Many small reward models of the package trained and attacked at once, each as if it were alone.

A model's data, latent noise and the policy's draws come from its world's seed, on the CPU, so that its figures do not
depend on which models are trained beside it, and all models of a seed see the same chance. Shapes: M models.
"""

import copy
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from transformers import LlamaConfig

from inform_rm import InfoRMConfig, InfoRMForSequenceClassification
from inform_rm.training.kl_warmup import KLWarmup
from inform_rm.training.losses import kl_to_standard_normal, reward_model_loss
from mechanism_forward import last_states
from mechanism_world import (
    BIASED,
    CONTENT,
    LENGTH,
    VOCABULARY,
    Dials,
    Pairs,
    World,
    draw,
    draw_responses,
    expected_gold,
    gold,
    make_pairs,
    make_world,
    policy_kl,
)

PAIRS_PER_STEP, LEARNING_RATE, WARMUP_STEPS = 32, 1e-3, 20
VALIDATION_PAIRS, TEST_PAIRS = 200, 2000
BEST_OF, PROMPTS = (1, 16, 256, 1024), 16
POLICY_STEPS, POLICY_RESPONSES, POLICY_RATE, MEASURE_EVERY = 100, 128, 0.05, 5
KL_GRID = (2, 4, 8, 16, 24, 32, 40)  # nats at which gold is read off
# Of one forward pass without gradient, all models together; few on a CPU, so that they stay in its caches.
SEQUENCES_AT_ONCE = {"cpu": 512, "cuda": 2**15}


@dataclass(frozen=True)
class Variant:
    """One way to train a reward model; what is not named is the package's default."""

    architecture: str = "inform"
    beta: float = 0.1
    kl_warmup_steps: float = 0.25
    kl_warmup_nats: float = 0.0
    latent_dim: int = 128
    decoder: str = "mlp"
    weight_decay: float = 0.0
    dropout: float = 0.0
    label_smoothing: float = 0.0
    start: str = ""  # of the head, see `restart`

    def shape(self) -> "Variant":
        """What models that are trained at once have in common, with everything else as it comes."""
        return Variant(self.architecture, latent_dim=self.latent_dim, decoder=self.decoder, dropout=self.dropout)


Parameters = dict[str, Tensor]  # by name, with M in front


@functools.lru_cache(maxsize=512)
def fresh_model(variant: Variant, seed: int) -> InfoRMForSequenceClassification:
    """A small Llama with the package's head; the same for all variants of one shape and seed."""
    torch.manual_seed(seed + 77)
    backbone = LlamaConfig(
        vocab_size=VOCABULARY + 2, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32, pad_token_id=VOCABULARY, bos_token_id=VOCABULARY + 1,
        eos_token_id=None, initializer_range=0.05, attention_dropout=variant.dropout,
    )  # fmt: skip
    model = InfoRMForSequenceClassification(
        InfoRMConfig(backbone, variant.latent_dim, decoder=variant.decoder, architecture=variant.architecture)
    )
    if variant.start:
        restart(model.score, variant.start)
    return model


class LinearPath(nn.Module):
    """A decoder that is one linear layer and beside it an MLP that begins at zero."""

    def __init__(self, mlp: Any, gain: float):
        super().__init__()
        size = mlp[0].in_features
        self.linear, self.mlp = nn.Linear(size, 1), mlp
        nn.init.normal_(self.linear.weight, std=gain / math.sqrt(size))
        nn.init.normal_(mlp[0].weight, std=1 / math.sqrt(size))
        nn.init.zeros_(self.linear.bias)
        nn.init.zeros_(mlp[2].weight)

    def forward(self, latent: Tensor) -> Tensor:
        return self.linear(latent) + self.mlp(latent)


@torch.no_grad()
def restart(head: Any, start: str) -> None:
    """Another start of a head: ``"KIND GAIN LOG_VARIANCE"``.

    GAIN is the root mean square of the reward of latents of size 1, LOG_VARIANCE that of the latents. Kinds of MLP:
    ``random``, the start of earlier versions (gain 1: a first layer of 0.1, a last one of 10); ``mirrored``, units in
    pairs of opposite sign, which add up to a linear function, ``gelu(x) - gelu(-x) = x``; ``path``, `LinearPath`.
    ``linear`` is for a linear decoder.
    """
    kind, gain, log_variance = start.split()
    size, decoder = head.encoder.out_features // 2, head.decoder
    head.encoder.bias[size:] = float(log_variance)
    if kind == "linear":
        nn.init.normal_(decoder.weight, std=float(gain) / math.sqrt(size))
    elif kind == "path":
        head.decoder = LinearPath(decoder, float(gain))
    elif kind == "random":
        nn.init.normal_(decoder[0].weight, std=0.1 / math.sqrt(size))
        nn.init.normal_(decoder[2].weight, std=10.0 * float(gain) / math.sqrt(size))
    else:
        half = size // 2
        nn.init.normal_(decoder[0].weight, std=1 / math.sqrt(size))
        nn.init.normal_(decoder[2].weight, std=float(gain) / math.sqrt(half))
        decoder[0].weight[half:] = -decoder[0].weight[:half]
        decoder[2].weight[:, half:] = -decoder[2].weight[:, :half]


class Proxies:
    """M reward models of one shape: their weights, and how they are called."""

    def __init__(self, variants: list[Variant], seeds: list[int], device: torch.device):
        models = [
            fresh_model(replace(each.shape(), start=each.start), seed)
            for each, seed in zip(variants, seeds, strict=True)
        ]
        self.model, self.device = copy.deepcopy(models[0]).to(device), device
        self.weights: Parameters = {
            name: torch.stack([dict(model.named_parameters())[name].detach() for model in models]).to(device)
            for name, _ in self.model.named_parameters()
        }
        self.is_inform, self.dropout = variants[0].architecture == "inform", variants[0].dropout

    def states(self, weights: Parameters, words: Tensor) -> Tensor:
        """Last hidden states ``(M, N, H)`` of words ``(M, N, L)``: an end token follows, whose state is read."""
        end = words.new_full((*words.shape[:2], 1), VOCABULARY + 1)
        dropout = self.dropout if self.model.training else 0.0
        return last_states(weights, torch.cat([words, end], dim=2), self.model.config.text_config, dropout)

    def rewards(self, weights: Parameters, words: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rewards and KL of the posteriors, ``(M, N)`` each, by the package's head; KL 0 of a standard model.

        Args:
            weights: of the models, with M in front.
            words: ``(M, N, L)``.
            noise: ``(M, N, K)`` latent noise while training.
        """
        head = {name.removeprefix("score."): value for name, value in weights.items() if name.startswith("score.")}

        def one(own: Parameters, states: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            if not self.is_inform:
                rewards = functional_call(self.model.score, own, (states,))
                return rewards[:, 0], torch.zeros_like(rewards[:, 0])
            asked = {"return_latents": True} | ({"latent_noise": noise} if self.model.training else {})
            rewards, mean, log_variance, _ = functional_call(self.model.score, own, (states,), asked)
            return rewards[:, 0], kl_to_standard_normal(mean, log_variance)

        states = self.states(weights, words)
        return vmap(one)(head, states, states[..., :0] if noise is None else noise)

    @torch.no_grad()
    def score(self, words: Tensor, kl: bool = False) -> Tensor:
        """Rewards ``(M, N)`` of words ``(M, N, L)``, or KL in nats of their posteriors."""
        self.model.eval()
        step = max(1, SEQUENCES_AT_ONCE[self.device.type] // len(words))
        return torch.cat([self.rewards(self.weights, part.to(self.device))[kl] for part in words.split(step, 1)], 1)


@dataclass
class TrainingSet:
    """What a world gives its models: training, validation and clean test pairs, and its further chance."""

    world: World
    epochs: int
    train: Pairs
    validation: Pairs
    test: Pairs


@functools.lru_cache(maxsize=512)
def training_set(seed: int, dials: Dials) -> TrainingSet:
    world = make_world(seed, dials)
    made = (make_pairs(world, size, noise, dials.bias) for size, noise in
            ((dials.pairs, dials.noise), (VALIDATION_PAIRS, dials.noise)))  # fmt: skip
    return TrainingSet(world, dials.epochs, *made, make_pairs(world, TEST_PAIRS, 0.0))


def batches(
    sets: list[TrainingSet], seeds: list[int], latent_dim: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Words ``(M, 2 B, L)``, chosen before rejected, and latent noise ``(M, 2 B, K)``, for every step of a training.

    Models of one world share both; ``latent_dim`` 0 draws no noise.
    """
    size, names = PAIRS_PER_STEP, {(seed, id(each)): each for seed, each in zip(seeds, sets, strict=True)}
    generators = {key: torch.Generator().manual_seed(key[0] + 500_000) for key in names}
    places = {key: place for place, key in enumerate(names)}
    where = torch.tensor([places[seed, id(each)] for seed, each in zip(seeds, sets, strict=True)], device=device)
    number = len(sets[0].train.chosen)
    for _ in range(sets[0].epochs):
        orders = {key: torch.randperm(number, generator=generators[key]) for key in names}
        for start in range(0, number - size + 1, size):
            words, noise = [], []
            for key, each in names.items():
                rows = orders[key][start : start + size]
                words.append(torch.cat([each.train.chosen[rows], each.train.rejected[rows]]))
                noise.append(torch.randn(2 * size, max(latent_dim, 1), generator=generators[key]))
            yield torch.stack(words).to(device)[where], torch.stack(noise).to(device)[where]


def train(proxies: Proxies, variants: list[Variant], seeds: list[int], sets: list[TrainingSet]) -> dict[str, Any]:
    """AdamW with a cosine after a short warm-up.

    Returns:
        ``losses (steps, M)``: the pair loss of every step; ``best``: the weights of the epoch that was right about
        most validation pairs, the first of equals (early stopping); ``epochs (M,)``: which one that was.
    """
    steps_an_epoch = len(sets[0].train.chosen) // PAIRS_PER_STEP
    total, device = sets[0].epochs * steps_an_epoch, proxies.device
    decay, smoothing = (
        torch.tensor([getattr(variant, name) for variant in variants], device=device)
        for name in ("weight_decay", "label_smoothing")
    )

    def loss(rewards: Tensor, kl: Tensor, beta: Tensor, smoothing: Tensor) -> tuple[Tensor, Tensor]:
        chosen, rejected = rewards.chunk(2)
        pair = reward_model_loss(chosen, rejected)
        whole = (1 - smoothing) * pair + smoothing * reward_model_loss(rejected, chosen)
        if proxies.is_inform:
            whole = whole + reward_model_loss(chosen, rejected, *kl.chunk(2), beta=beta) - pair
        return whole, pair

    leaves = {name: value.detach().clone().requires_grad_() for name, value in proxies.weights.items()}
    proxies.weights = {name: value.detach() for name, value in leaves.items()}  # the same memory
    optimizer = torch.optim.AdamW(leaves.values(), weight_decay=0.0, fused=True)
    best = {name: value.clone() for name, value in proxies.weights.items()}
    best_accuracy, epochs = (torch.full((len(variants),), start, device=device) for start in (-1.0, 0.0))
    warmups = [KLWarmup(each.beta, each.kl_warmup_steps, each.kl_warmup_nats) for each in variants]
    losses, latent_dim = [], variants[0].latent_dim if proxies.is_inform else 0
    validation = [torch.stack([each.validation[side] for each in sets]) for side in (0, 1)]
    for step, (words, noise) in enumerate(batches(sets, seeds, latent_dim, device)):
        proxies.model.train()
        beta = torch.tensor([each.weight(step, total) for each in warmups])
        whole, pair = vmap(loss)(*proxies.rewards(leaves, words, noise), beta.to(device), smoothing)
        # No model's loss depends on another's weights: the gradient of the sum is that of each.
        optimizer.zero_grad()
        whole.sum().backward()
        losses.append(pair.detach())
        if any(warmup.waits for warmup in warmups):  # a GPU is waited for where somebody asks
            for warmup, mean in zip(warmups, pair.tolist(), strict=True):
                warmup.add(PAIRS_PER_STEP, PAIRS_PER_STEP * mean)
        rate = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / total))
        prepare(leaves, rate * decay)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        if (step + 1) % steps_an_epoch == 0:
            accuracy = (proxies.score(validation[0]) > proxies.score(validation[1])).float().mean(dim=1)
            is_better = accuracy > best_accuracy
            best_accuracy = torch.where(is_better, accuracy, best_accuracy)
            epochs = torch.where(is_better, (step + 1) // steps_an_epoch, epochs)
            best = {
                name: torch.where(_wide(is_better, value), value, best[name])
                for name, value in proxies.weights.items()
            }
    return {"losses": torch.stack(losses).cpu(), "best": best, "epochs": epochs.int().tolist()}


@torch.no_grad()
def prepare(leaves: Parameters, shrink: Tensor) -> None:
    """Cut each model's gradient to norm 1, and shrink its weights by ``shrink (M,)``, AdamW's decay of a model."""
    slopes = [leaf.grad for leaf in leaves.values() if leaf.grad is not None]
    norm = torch.stack([slope.flatten(1).square().sum(dim=1) for slope in slopes]).sum(dim=0).sqrt()
    cut = (1.0 / (norm + 1e-6)).clamp(max=1.0)
    for slope in slopes:
        slope *= _wide(cut, slope)
    if shrink.any():
        for leaf in leaves.values():
            leaf *= _wide(1 - shrink, leaf)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """``(M,)`` as ``(M, 1, ...)`` beside a tensor with M in front."""
    return values.view(-1, *[1] * (like.dim() - 1))


def judge(proxies: Proxies, seeds: list[int], sets: list[TrainingSet]) -> list[dict[str, Any]]:
    """Accuracy on test, validation and training pairs, flips learnt by heart, nats, and what a word is worth to it."""

    def right(name: str) -> Tensor:
        chosen, rejected = (torch.stack([getattr(each, name)[side] for each in sets]) for side in (0, 1))
        return (proxies.score(chosen) > proxies.score(rejected)).float().cpu()

    test, validation, fit = right("test"), right("validation"), right("train")
    nats = (
        proxies.score(torch.stack([each.test.chosen[:512] for each in sets]), kl=True).mean(dim=1).tolist()
        if proxies.is_inform
        else None
    )
    effects = word_effects(proxies, seeds, sets)
    found = []
    for place, each in enumerate(sets):
        flipped, effect, worth = each.train.flipped, effects[place], each.world.worth[:CONTENT]
        centred = worth - worth.mean()
        slope = float((effect[:CONTENT] * centred).sum() / centred.square().sum())
        neutral = effect[(each.world.probabilities > 0) & (torch.arange(VOCABULARY) >= BIASED.stop)]
        row = {
            "accuracy": float(test[place].mean()), "validation_accuracy": float(validation[place].mean()),
            "train_accuracy": float(fit[place].mean()), "slope": slope,
            "flips_learnt": float(fit[place][flipped].mean()) if flipped.any() else None,
            "neutral_effect": float(neutral.std()) / abs(slope),
            "bias_effect": float(effect[BIASED].mean() - neutral.mean()) / slope,
        }  # fmt: skip
        found.append(row | ({} if nats is None else {"kl_nats": nats[place]}))
    return found


def word_effects(proxies: Proxies, seeds: list[int], sets: list[TrainingSet], contexts: int = 8) -> Tensor:
    """How much a word in the middle of a response moves the reward, mean over contexts: ``(M, V)``."""
    changed = []
    for seed, each in zip(seeds, sets, strict=True):
        words = draw_responses(_again(each.world, seed, 1), contexts).repeat(VOCABULARY, 1)
        words[:, LENGTH // 2] = torch.arange(VOCABULARY).repeat_interleave(contexts)
        changed.append(words)
    return proxies.score(torch.stack(changed)).view(len(sets), VOCABULARY, contexts).mean(dim=-1).cpu()


def best_of_n(proxies: Proxies, seeds: list[int], sets: list[TrainingSet]) -> list[dict[str, Any]]:
    """Mean gold reward of the best of n by the proxy, and by the gold reward itself; unbiased."""
    worlds = [_again(each.world, seed, 2) for seed, each in zip(seeds, sets, strict=True)]
    drawn = torch.stack([draw_responses(world, PROMPTS * BEST_OF[-1]) for world in worlds])
    true = torch.stack([gold(words, each.world.worth) for words, each in zip(drawn, sets, strict=True)])
    rewards, true = (each.view(len(sets), PROMPTS, -1).double() for each in (proxies.score(drawn).cpu(), true))
    by_proxy, by_gold = (expected_best(each, true, BEST_OF).mean(dim=1).tolist() for each in (rewards, true))
    return [{"best_of_n": own, "best_of_n_by_gold": ideal} for own, ideal in zip(by_proxy, by_gold, strict=True)]


def expected_best(rewards: Tensor, values: Tensor, numbers: tuple[int, ...]) -> Tensor:
    """Mean value of the response with the largest reward over all sets of n of N: ``(..., N)`` to ``(..., numbers)``.

    As `inform_rm.eval.best_of_n.simulate.best_of_n_expectation`, with torch alone, and ties in any order.
    """
    size = rewards.shape[-1]
    ordered = values.gather(-1, rewards.argsort(dim=-1))
    rank = torch.arange(1, size + 1, dtype=torch.float64)

    def log_choose(many: Tensor, few: int) -> Tensor:
        return torch.lgamma(many + 1) - math.lgamma(few + 1) - torch.lgamma((many - few).clamp(min=0) + 1)

    shares = [
        torch.where(rank >= n, (log_choose(rank - 1, n - 1) - log_choose(rank[-1], n)).exp(), 0.0) for n in numbers
    ]
    return torch.stack([(ordered * share).sum(dim=-1) for share in shares], dim=-1)


def optimize(proxies: Proxies, seeds: list[int], sets: list[TrainingSet]) -> tuple[list[dict[str, Any]], Tensor]:
    """A policy of independent words optimised against each proxy, without KL penalty; its KL and gold are exact.

    REINFORCE with rewards in standard deviations of the group, as GRPO without clipping.

    Returns:
        The curves, one a model; log probabilities ``(M, points, V)`` of the policies at the measured steps.
    """
    device = proxies.device
    base = torch.stack([each.world.probabilities for each in sets]).to(device)
    worth = torch.stack([each.world.worth for each in sets]).to(device)
    logits = torch.where(base > 0, base.clamp(min=1e-30).log(), -1e4)
    first, second = torch.zeros_like(logits), torch.zeros_like(logits)
    different = sorted(set(seeds))
    generators, where = (
        {s: torch.Generator().manual_seed(s + 900_000) for s in different},
        [different.index(s) for s in seeds],
    )
    points: list[dict[str, Tensor]] = []
    for step in range(POLICY_STEPS + 1):
        uniform = torch.stack([torch.rand(POLICY_RESPONSES * LENGTH, generator=generators[s]) for s in different])[
            where
        ]
        policy = logits.softmax(dim=-1)
        words = draw(policy, uniform.to(device)).view(len(sets), POLICY_RESPONSES, LENGTH)
        rewards = proxies.score(words)
        if step % MEASURE_EVERY == 0:
            points.append({
                "kl": policy_kl(policy, base), "gold": expected_gold(policy, worth), "proxy": rewards.mean(dim=1),
                "neutral": policy[:, CONTENT:].sum(dim=-1), "biased": policy[:, BIASED].sum(dim=-1),
                "log_policy": logits.log_softmax(dim=-1),
            })  # fmt: skip
        advantage = (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, keepdim=True) + 1e-6)
        slope = policy_slope(policy, words, advantage)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope.square()
        size = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
        logits = logits - POLICY_RATE / (1 - 0.9 ** (step + 1)) * first / size
    curves = {name: torch.stack([point[name] for point in points], dim=1).cpu() for name in points[0]}
    return [curve_of(*(curves[name][place].tolist() for name in ("kl", "gold", "proxy", "neutral", "biased")))
            for place in range(len(sets))], curves["log_policy"]  # fmt: skip


def policy_slope(policy: Tensor, words: Tensor, advantage: Tensor) -> Tensor:
    """Gradient of ``-mean(advantage * log probability)`` with respect to the logits: ``(M, V)``.

    Args:
        policy: ``(M, V)`` probabilities, the softmax of the logits.
        words: ``(M, N, L)`` responses.
        advantage: ``(M, N)``.
    """
    places = advantage.repeat_interleave(words.shape[-1], dim=1) / words.shape[1]
    counts = torch.zeros_like(policy).scatter_add_(1, words.flatten(1), places)
    return policy * counts.sum(dim=-1, keepdim=True) - counts


def curve_of(
    kl: list[float], true: list[float], proxy: list[float], neutral: list[float], biased: list[float]
) -> dict[str, Any]:
    """The curve, its gold at the KLs of the grid (absent beyond its end), its peak and its end."""
    peak = int(np.argmax(true))
    # Where KL falls back for a while the first point of each KL counts.
    rising = [place for place in range(len(kl)) if kl[place] >= max(kl[: place + 1])]
    grid = np.interp(KL_GRID, [kl[place] for place in rising], [true[place] for place in rising])
    return {
        "kl": kl, "gold": true, "proxy": proxy, "neutral": neutral, "biased": biased,
        "gold_at_kl": [
            float(value) if nats <= kl[rising[-1]] else None for nats, value in zip(KL_GRID, grid, strict=True)
        ],
        "peak": true[peak], "peak_kl": kl[peak], "end": true[-1], "end_kl": kl[-1], "neutral_end": neutral[-1],
    }  # fmt: skip


def run_group(
    runs: list[tuple[Variant, int, Dials]],
    device: torch.device,
    states: tuple[str, ...] = ("end", "best"),
    attack: bool = True,
) -> Iterator[tuple[str, list[dict[str, Any]], Parameters, Tensor | None]]:
    """Train the models of one shape and number of pairs, and judge them as they are at the end and at the best epoch.

    Args:
        runs: the models: variant, seed, dials.
        device: where.
        states: which of the two.
        attack: also choose the best of n by them and optimise a policy against them.

    Yields:
        The state; a row of figures each model; their weights; log probabilities of the policies.
    """
    variants, seeds, dials = (list(part) for part in zip(*runs, strict=True))
    sets = [training_set(seed, each) for seed, each in zip(seeds, dials, strict=True)]
    proxies = Proxies(variants, seeds, device)
    trained = train(proxies, variants, seeds, sets)
    weights = {"end": proxies.weights, "best": trained["best"]}
    for state in states:
        proxies.weights = weights[state]
        rows, policies = judge(proxies, seeds, sets), None
        if attack:
            curves, policies = optimize(proxies, seeds, sets)
            for row, chosen, curve in zip(rows, best_of_n(proxies, seeds, sets), curves, strict=True):
                row |= chosen | {"policy": curve}
        for place, row in enumerate(rows):
            row["epoch"] = trained["epochs"][place] if state == "best" else dials[place].epochs
            if state == "end":  # means of ten steps
                row["losses"] = [float(part.mean()) for part in trained["losses"][:, place].split(10)]
        yield state, rows, proxies.weights, policies


def _again(world: World, seed: int, number: int) -> World:
    """The world with chance of its own for one purpose."""
    return world._replace(generator=torch.Generator().manual_seed(1_000_000 * number + seed))
