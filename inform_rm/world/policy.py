"""The embedded world as a policy and as the gold reward of best-of-n."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inform_rm.data.messages import to_messages
from inform_rm.errors import InputError
from inform_rm.eval.best_of_n.policies import is_recorded
from inform_rm.eval.best_of_n.report import BestOfNResult
from inform_rm.eval.best_of_n.simulate import simulate
from inform_rm.scoring.scorer import Prompt
from inform_rm.world.worlds import WorldConfig, gold_reward, sample_prompts, sample_responses

WORLD_PROMPTS = 128


class WorldPolicy:
    """The sampler of the embedded world, `inform_rm.world.worlds.sample_responses`.

    Args:
        word_accuracy: how often a requested word is the one that a response uses; the lower, the further best-of-n
            has to reach.
    """

    name = "world"

    def __init__(self, word_accuracy: float = 0.6) -> None:
        self.word_accuracy = word_accuracy

    def sample(self, prompt: Prompt, num_responses: int, seed: int) -> list[str]:
        """Responses of the world to one of its prompts."""
        return sample_responses(world_text(prompt), num_responses, seed, self.word_accuracy)

    def identity(self) -> dict[str, Any]:
        """The name and how well it does what is asked."""
        return {"name": self.name, "word_accuracy": self.word_accuracy}


class WorldGold:
    """The exact gold reward of the embedded world, with the interface of a scorer."""

    name = "world"

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
        """``(N,)`` float64: ``r1 + r2``."""
        rows = zip(prompts, responses, strict=True)
        return np.array([gold_reward(world_text(prompt), response).total for prompt, response in rows])

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise `InputError` unless all prompts are the world's, before time is spent on responses to them."""
        try:
            self.score(prompts, [""] * len(prompts))
        except InputError as error:
            raise InputError(f"gold: without a gold reward model, prompts must be the world's: {error}") from error

    def identity(self) -> dict[str, Any]:
        """The name: there is nothing to choose."""
        return {"name": self.name}


def world_text(prompt: Prompt) -> str:
    """The text of a prompt that may be one of the world: text, or one message; `InputError` for a conversation."""
    messages = to_messages(prompt)
    if len(messages) != 1:
        raise InputError(
            f"prompt {json.dumps(messages)[:100]} is a conversation; the world's prompts are single texts. Name a "
            "policy and a gold reward model for other prompts."
        )
    return messages[0]["content"]


def world_prompts(num_prompts: int = WORLD_PROMPTS, seed: int = 0) -> list[str]:
    """Distinct prompts of the world, `InputError` if it has fewer; a longer list starts with the shorter one."""
    texts: dict[str, None] = {}
    drawn, before = num_prompts, -1
    while before < len(texts) < num_prompts:  # until a draw of twice the size, which starts alike, finds no new prompt
        before = len(texts)
        texts = dict.fromkeys(sample_prompts(WorldConfig(seed=seed), drawn, seed))
        drawn *= 2
    if len(texts) < num_prompts:
        raise InputError(f"num_prompts: {num_prompts}; there are {len(texts)} distinct prompts in the world.")
    return list(texts)[:num_prompts]


def attack(proxy: Any, output: str | Path | None = None, **options: Any) -> BestOfNResult:
    """`inform_rm.eval.best_of_n.simulate.simulate` where what is not named is the world's: policy, gold and prompts.

    Of its ``options`` ``gold``, ``policy`` and, without ``data``, ``prompts`` may be left out or ``None``;
    ``num_prompts`` (128 by default) says how many prompts then. Others than the world's need a gold reward model.
    """
    if options.get("prompts") is None and options.get("data") is None and not is_recorded(options.get("policy")):
        wanted = options.get("num_prompts")
        options["prompts"] = world_prompts(WORLD_PROMPTS if wanted is None else wanted, options.get("seed", 0))
    for name, default in (("gold", WorldGold), ("policy", WorldPolicy)):
        if options.get(name) is None:
            options[name] = default()
    return simulate(proxy, output, **options)
