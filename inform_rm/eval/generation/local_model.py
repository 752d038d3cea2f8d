"""Responses of a causal language model on this machine, in batches of about equal length."""

import copy
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TopPLogitsWarper,
)

from inform_rm.eval.best_of_n.policies import TOKENS_PER_BATCH, CausalLMPolicy
from inform_rm.eval.generation.settings import GenerationSettings
from inform_rm.scoring.packing import eval_mode_of
from inform_rm.util.endpoint import Reply

CPU_TOKENS_PER_BATCH = 4096  # a batch is what a kill loses, and there more of them at once gain little


class Task(NamedTuple):
    """One response to be written: its name, the prompt's tokens and the seed of its sampling."""

    name: str
    prompt_ids: list[int]
    seed: int


def write_locally(
    policy: CausalLMPolicy,
    settings: GenerationSettings,
    tasks: Sequence[Task],
    finished: Container[str] = (),
    on_step: Callable[[int], object] = int,
) -> Iterator[dict[str, Reply]]:
    """Replies by the names of their tasks, a batch at a time.

    The batches depend on all tasks alone, and one that is not finished as a whole is written anew: rounding depends on
    the batch, and a continued run shall give what an uninterrupted one gives. ``on_step`` is told the tokens that each
    row of the batch has by now.
    """
    on_cpu = policy.model.get_input_embeddings().weight.device.type == "cpu"
    room = CPU_TOKENS_PER_BATCH if on_cpu else TOKENS_PER_BATCH
    for batch in _batches(tasks, settings.max_new_tokens, room):
        if not all(task.name in finished for task in batch):
            replies = _replies(policy, settings, batch, on_step)
            yield dict(zip([task.name for task in batch], replies, strict=True))


@torch.no_grad()
def _replies(
    policy: CausalLMPolicy, settings: GenerationSettings, tasks: Sequence[Task], on_step: Callable[[int], object]
) -> list[Reply]:
    width = max(len(task.prompt_ids) for task in tasks)
    pad = policy.tokenizer.pad_token_id or 0
    device = policy.model.get_input_embeddings().weight.device
    ids = torch.tensor([[pad] * (width - len(task.prompt_ids)) + task.prompt_ids for task in tasks], device=device)
    mask = torch.tensor(
        [[0] * (width - len(task.prompt_ids)) + [1] * len(task.prompt_ids) for task in tasks], device=device
    )
    processors = LogitsProcessorList()
    if settings.temperature > 0:
        seeds = [task.seed for task in tasks]
        sampler = SeededSampler(seeds, settings.max_new_tokens, settings.temperature, settings.top_p)
        processors.append(sampler)
    # Nothing of the model's own generation config but how a text ends: penalties and cuts are not asked for.
    generation = GenerationConfig(
        do_sample=False, max_new_tokens=settings.max_new_tokens, eos_token_id=policy.end_ids or None,
        pad_token_id=policy.tokenizer.pad_token_id,
    )  # fmt: skip
    own = policy.model.generation_config
    policy.model.generation_config = copy.deepcopy(generation)  # which generate would fill gaps from
    try:
        with eval_mode_of(policy.model):
            output = policy.model.generate(
                input_ids=ids, attention_mask=mask, generation_config=generation,
                logits_processor=processors, stopping_criteria=StoppingCriteriaList([_Watch(width, on_step)]),
            )  # fmt: skip
    finally:
        policy.model.generation_config = own
    new = output[:, width:].cpu()
    is_end = torch.isin(new, torch.tensor(policy.end_ids, dtype=new.dtype))
    # Up to the first end token and with it; after it come pads.
    lengths = torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1) + 1, new.shape[1]).tolist()
    ended = is_end.any(dim=1).tolist()
    texts = [policy.decode(row[None, :length])[0] for row, length in zip(new, lengths, strict=True)]
    return [
        Reply(text, "stop" if has_end else "length", len(task.prompt_ids), length)
        for text, has_end, task, length in zip(texts, ended, tasks, lengths, strict=True)
    ]


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


class _Watch(StoppingCriteria):
    """Stops nothing; tells how many tokens there are after a prompt of this width."""

    def __init__(self, width: int, on_step: Callable[[int], object]):
        self._width, self._on_step = width, on_step

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._on_step(input_ids.shape[1] - self._width)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _batches(tasks: Sequence[Task], max_new_tokens: int, room: int) -> Iterator[list[Task]]:
    """The tasks by length, in batches of at most so many tokens."""
    batch: list[Task] = []
    for task in sorted(tasks, key=lambda task: len(task.prompt_ids)):
        if batch and (len(batch) + 1) * (len(task.prompt_ids) + max_new_tokens) > room:
            yield batch
            batch = []
        batch.append(task)
    if batch:
        yield batch
