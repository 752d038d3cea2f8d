"""A world of words in which few carry worth: gold reward, and KL and gold of a policy, are exact.

A response is 16 words. 24 *content* words have a worth drawn from N(0, 1), the *neutral* ones none; repeating a word
costs 0.3 each time. In the base policy words are independent, a content word twice as likely as a neutral one. Labels
follow the gold reward, a share of them is flipped; with ``bias`` they also like four neutral words that gold does not.
With many neutral words and few pairs some neutral words occur with preferred responses by chance: a reward model that
learns this by heart is exploited by a policy that can vary every word. Shapes: V words, L places of a response.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

CONTENT, LENGTH = 24, 16
BIASED = slice(CONTENT, CONTENT + 4)  # the words that biased labels like
VOCABULARY = CONTENT + 488  # of every world, so that models of different worlds have one shape
REPETITION_COST = 0.3


@dataclass(frozen=True)
class Dials:
    """What a training is like: pairs, share of flipped labels, neutral words, bias for a biased word, passes."""

    pairs: int = 3000
    noise: float = 0.25
    neutral: int = 232
    bias: float = 0.0
    epochs: int = 6


class Pairs(NamedTuple):
    """Chosen and rejected responses ``(N, L)``, and which labels were flipped ``(N,)``."""

    chosen: Tensor
    rejected: Tensor
    flipped: Tensor


class World(NamedTuple):
    """Worth and probability of every word ``(V,)``; all chance of this world comes from the generator."""

    worth: Tensor
    probabilities: Tensor
    generator: torch.Generator


def make_world(seed: int, dials: Dials) -> World:
    generator = torch.Generator().manual_seed(seed)
    worth, probabilities = torch.zeros(VOCABULARY), torch.zeros(VOCABULARY)
    worth[:CONTENT] = torch.randn(CONTENT, generator=generator)
    probabilities[: CONTENT + dials.neutral] = 1.0
    probabilities[:CONTENT] = 2.0
    return World(worth, probabilities / probabilities.sum(), generator)


def gold(words: Tensor, worth: Tensor) -> Tensor:
    """Gold reward of responses ``(..., L)``: worth of the words, less a cost for each that repeats an earlier one."""
    ordered = words.sort(dim=-1).values
    repeated = (ordered[..., 1:] == ordered[..., :-1]).sum(dim=-1)
    return worth[words].sum(dim=-1) - REPETITION_COST * repeated


def expected_gold(policy: Tensor, worth: Tensor) -> Tensor:
    """Mean gold reward of independent words from ``policy (..., V)``, exactly.

    The words that repeat are L less the number of different ones, whose mean is the sum of ``1 - (1 - q)^L``.
    """
    different = (1 - (1 - policy) ** LENGTH).sum(dim=-1)
    return LENGTH * (policy * worth).sum(dim=-1) - REPETITION_COST * (LENGTH - different)


def policy_kl(policy: Tensor, base: Tensor) -> Tensor:
    """KL of responses of independent words, in nats: L times that of one word. ``(..., V)`` each, to ``(...)``."""
    ratio = (policy.clamp(min=1e-38) / base.clamp(min=1e-38)).log()
    return LENGTH * torch.where(policy > 0, policy * ratio, 0.0).sum(dim=-1)


def draw(policy: Tensor, uniform: Tensor) -> Tensor:
    """Words ``(..., n)`` from ``policy (..., V)`` by the inverse of its distribution, one a number in [0, 1)."""
    sums = policy.cumsum(dim=-1)
    places = torch.searchsorted(sums.contiguous(), (uniform * sums[..., -1:]).contiguous(), right=True)
    return places.clamp(max=policy.shape[-1] - 1)


def draw_responses(world: World, number: int) -> Tensor:
    """``(number, L)`` responses of the base policy."""
    uniform = torch.rand(number * LENGTH, generator=world.generator)
    return draw(world.probabilities, uniform).view(number, LENGTH)


def make_pairs(world: World, number: int, noise: float, bias: float = 0.0) -> Pairs:
    """Two responses of the base policy, the better one chosen; a share ``noise`` of the labels is flipped."""
    first, second = draw_responses(world, number), draw_responses(world, number)
    liked = functional.one_hot(torch.arange(VOCABULARY))[BIASED].sum(dim=0)
    better, worse = (gold(x, world.worth) + bias * liked[x].sum(dim=-1) for x in (first, second))
    flipped = torch.rand(number, generator=world.generator) < noise
    is_first = ((better > worse) ^ flipped)[:, None]
    return Pairs(torch.where(is_first, first, second), torch.where(is_first, second, first), flipped)
