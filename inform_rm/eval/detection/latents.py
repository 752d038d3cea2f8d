"""Latents of responses: where a reward model places them before it gives a reward."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from inform_rm.errors import InputError
from inform_rm.scoring.scorer import Prompt, RewardScorer, row_name


@dataclass(frozen=True)
class Latents:
    """Latents of N responses.

    Attributes:
        values: ``(N, K)`` float32: InfoRM's latent means, or the hidden states (K = H) that the reward is read from.
        rewards: ``(N,)`` float32 rewards.
        kind: ``"latent"`` for InfoRM; ``"hidden_state"`` for any other reward model. Appendix F of arXiv:2402.09345
            finds no outliers of overoptimized responses in hidden states: a CSI of them is not sound.
    """

    values: np.ndarray
    rewards: np.ndarray
    kind: Literal["latent", "hidden_state"]


def collect_latents(
    scorer: RewardScorer,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    *,
    places: Sequence[str] | None = None,
    progress: bool = False,
) -> Latents:
    """Latents and rewards of (prompt, response) rows, in input order, by the batches in which they are scored.

    Memory holds what is returned and one batch.

    Args:
        scorer: the model; its head must be its module ``score``, as in all decoders of transformers that classify.
        prompts: N prompts.
        responses: N responses.
        places: what an error calls each row; by default its number, from 0.
        progress: show a progress bar.

    Raises:
        InputError: no rows, rows of different number, a row that cannot be scored, or a model without such a head.
        NonFiniteRewardError: if a reward is NaN or infinite.
    """
    if len(prompts) != len(responses) or len(prompts) == 0:
        raise InputError(
            f"latents: {len(prompts)} prompts and {len(responses)} responses; expected as many of both, at least one."
        )
    head: Any = getattr(getattr(scorer, "model", None), "score", None)
    if not isinstance(head, torch.nn.Module):
        raise InputError(f"latents: {scorer.name} has no head named 'score' from whose input latents could be read.")
    encoded = scorer.encode_all(prompts, responses, places or [row_name(row) for row in range(len(prompts))])
    config = scorer.model.config
    pad_id = None if config.model_type == "inform" else getattr(config.get_text_config(), "pad_token_id", None)
    rewards = np.empty(len(encoded), dtype=np.float32)
    values = np.empty((len(encoded), 0), dtype=np.float32)  # how wide, the first batch says
    seen: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    try:
        batches = scorer.iter_scores([row.input_ids for row in encoded], [len(row.prompt_ids) for row in encoded])
        with tqdm(total=len(encoded), unit="row", desc="latents", disable=not progress) as bar:
            for rows, batch_rewards, _ in batches:
                states = seen.pop()
                if states.dim() == 3:  # a foreign model's padded batch: its reward is that of the last real token
                    last = [_last_real(encoded[row].input_ids, pad_id) for row in rows]
                    states = states[torch.arange(len(rows)), last]
                part, again = _latents_and_rewards(head, states)
                if not torch.allclose(again, batch_rewards, rtol=1e-3, atol=1e-3):
                    raise InputError(
                        f"latents: {scorer.name} does not read its reward from the hidden state of the last token."
                    )
                if not values.size:
                    values = np.empty((len(encoded), part.shape[1]), dtype=np.float32)
                values[rows], rewards[rows] = part.numpy(), batch_rewards.numpy()
                bar.update(len(rows))
    finally:
        hook.remove()
    has_latent = config.model_type == "inform" and config.architecture == "inform"
    return Latents(values, rewards, "latent" if has_latent else "hidden_state")


@torch.no_grad()
def _latents_and_rewards(head: Any, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the head makes its reward from, and that reward, both float32 on the CPU."""
    if hasattr(head, "encode"):
        latents, _ = head.encode(states)
        rewards = head.decode(latents)
    else:
        latents, rewards = states, head.forward(states)  # past its hooks, of which one is ours
    return latents.float().cpu(), rewards.flatten().float().cpu()


def _last_real(ids: Sequence[int], pad_id: int | None) -> int:
    return max((place for place, token in enumerate(ids) if token != pad_id), default=0)
