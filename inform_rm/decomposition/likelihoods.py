"""How likely a language model finds responses under prompts: the weights of ``weights="behavior"`` come from here."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inform_rm.data.tokenizer import fix_date, load_tokenizer, warn_of_no_template
from inform_rm.scoring import packing, reward_models
from inform_rm.scoring.packing import PackedRow
from inform_rm.scoring.scorer import RewardScorer, Scores

logger = logging.getLogger(__name__)

_LOGITS_IN_MEMORY = 1 << 26  # numbers; 256 MiB in float32


class ResponseLikelihood(RewardScorer):
    """Log-likelihoods of responses under a causal language model, in place of rewards.

    The "reward" of a row is ``log p(response tokens | prompt tokens)`` in nats. A prompt is computed once for its
    responses, as in `inform_rm.scoring.packing`; where that gives other likelihoods, found out on a few random tokens,
    rows are computed one at a time, and a log line says so. For the arguments see `RewardScorer`.
    """

    def __init__(
        self, model: Any, tokenizer: Any, tokens_per_batch: int | None = None, split_over_processes: bool = False
    ):
        # Not the initialiser of the base class, which takes reward models: this sets the same attributes.
        self.name, self.model = "likelihood model", model
        self.tokenizer = fix_date(tokenizer, self.name)
        warn_of_no_template(self.tokenizer, self.name)
        self.split_over_processes = split_over_processes
        self.max_length = reward_models.checked_max_length(model, None)
        self.tokens_per_batch = tokens_per_batch or packing.default_tokens_per_batch(model)
        self.tokens_computed = 0
        self._vocabulary_size = model.get_input_embeddings().weight.shape[0]
        self._can_pad = False
        reason = self._why_not_packed()
        self.batching = "packed" if reason is None else "padded"
        if reason is not None:
            logger.warning("Likelihoods are computed one response at a time: %s.", reason)

    def _packed_forward(
        self, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int], uncertainty: int | None
    ) -> Scores:
        values, tokens = self._log_likelihoods(sequences, prompt_lengths)
        return values, None, tokens

    _padded_forward = _packed_forward  # of one row

    @torch.no_grad()
    def _log_likelihoods(
        self, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int]
    ) -> tuple[Tensor, int]:
        """``(N,)`` log-likelihoods of rows in one pass, and the tokens of that pass."""
        packed = packing.pack_sequences(sequences, prompt_lengths)
        predictors: list[list[int]] = [[]] * len(sequences)  # of each response token, the place of the one before it
        start = 0
        groups = packing.rows_by_prompt(sequences, prompt_lengths).items()
        for (prompt, rows), lengths in zip(groups, packed.segments, strict=True):
            for row in rows:
                last = int(packed.pooled_positions[row])
                number = len(sequences[row]) - max(len(prompt), 1)  # nothing could predict a first token
                before = start + len(prompt) - 1 if prompt else last - number
                predictors[row] = [before, *range(last - number + 1, last)][:number]
            start += sum(lengths)
        numbers = [len(places) for places in predictors]
        targets = [token for ids, number in zip(sequences, numbers, strict=True) for token in ids[len(ids) - number :]]
        places = torch.tensor([place for own in predictors for place in own])
        logs = self._log_probabilities(packed, places, torch.tensor(targets))
        return torch.stack([part.sum() for part in logs.split(numbers)]), packed.input_ids.numel()

    def _log_probabilities(self, row: PackedRow, predictors: Tensor, targets: Tensor) -> Tensor:
        """``(N,)`` float32 on the CPU: log-probability of each target after the token at its predictor's place."""
        device = self.model.get_input_embeddings().weight.device
        predictors, targets = predictors.long().to(device), targets.long().to(device)
        if self.batching == "padded":  # one sequence
            logits = self.model(input_ids=row.input_ids.to(device), use_cache=False).logits[0, predictors]
            return logits.float().log_softmax(dim=-1).gather(1, targets[:, None])[:, 0].cpu()
        with packing.packed_attention_of(self.model):
            hidden = getattr(self.model, self.model.base_model_prefix)(
                **packing.packed_inputs(self.model, row), use_cache=False
            ).last_hidden_state[0]
        head = self.model.get_output_embeddings()
        found = [torch.zeros(0)]
        size = max(1, _LOGITS_IN_MEMORY // head.weight.shape[0])
        for states, tokens in zip(hidden[predictors].split(size), targets.split(size), strict=True):
            found.append(head(states).float().log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0].cpu())
        return torch.cat(found)

    def _why_not_packed(self) -> str | None:
        """Why packed rows do not give the model's own likelihoods, tried on a few random tokens; else ``None``."""
        vocabulary = min(self.model.get_input_embeddings().weight.shape[0], 1000)
        drawn = torch.randint(vocabulary, (18,), generator=torch.Generator().manual_seed(0)).tolist()
        sequences = [drawn[:10], drawn[:7] + drawn[10:]]
        try:
            with packing.eval_mode_of(self.model):
                self.batching = "packed"
                together, _ = self._log_likelihoods(sequences, [7, 7])
                self.batching = "padded"
                alone = torch.cat([self._log_likelihoods([ids], [7])[0] for ids in sequences])
            difference = (together - alone).abs().max()
            tolerance = 1e-4 if self.model.dtype == torch.float32 else 0.5
            if not difference <= tolerance * max(1.0, float(alone.abs().max())):
                return f"packed likelihoods differ by {difference:.2g}"
        except Exception as error:  # whatever a foreign model raises, it can still be run plainly
            return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        return None


def load_likelihood(
    model: str | Path,
    *,
    chat_template: str | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> ResponseLikelihood:
    """`ResponseLikelihood` of a causal language model and its tokenizer from a folder or the Hub; see there."""
    loaded = reward_models.load_causal_lm(model, device=device, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(model, chat_template=chat_template, trust_remote_code=trust_remote_code)
    return ResponseLikelihood(loaded, tokenizer, **options)
