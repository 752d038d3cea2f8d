"""Sampling in which each row of a batch draws from a seed of its own, so that batch mates change nothing."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, TopPLogitsWarper


class SeededSampler(LogitsProcessor):
    """Leaves each row one token, drawn from ``softmax(logits / temperature)`` cut to the ``top_p`` nucleus.

    Row i draws one uniform number a step from a generator with seed i, and takes the token at which the distribution
    function passes it (inversion). `generate` itself draws all rows of a batch from one generator. There are
    ``max_new_tokens`` steps at most; the temperature is above 0.
    """

    def __init__(self, seeds: Sequence[int], max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0):
        self._uniforms = np.stack([np.random.default_rng(seed).random(max_new_tokens) for seed in seeds])
        self._temperature = temperature
        self._nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``(N, V)`` logits; all but the drawn token of each row become ``-inf``."""
        scaled = scores.float() / self._temperature
        if self._nucleus is not None:
            scaled = self._nucleus(input_ids, scaled)
        precise = torch.float32 if scores.device.type == "mps" else torch.float64
        summed = torch.softmax(scaled, dim=-1).to(precise).cumsum(dim=-1)
        uniforms = torch.as_tensor(self._uniforms[:, self._step], dtype=precise, device=scores.device)[:, None]
        # The first token whose sum exceeds the number: one of probability 0 adds nothing and is never it.
        chosen = torch.searchsorted(summed, uniforms * summed[:, -1:], right=True).clamp_max(scores.shape[-1] - 1)
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)
