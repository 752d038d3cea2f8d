"""How likely a language model finds responses under prompts: the weights of ``weights="behavior"`` come from here."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inform_rm.data.tokenizer import fix_date, load_tokenizer, warn_of_no_template
from inform_rm.errors import InputError
from inform_rm.scoring import packing, reward_models
from inform_rm.scoring.packing import PackedRow
from inform_rm.util.processes import computed_in_turn

logger = logging.getLogger(__name__)

_LOGITS_IN_MEMORY = 1 << 26  # numbers; 256 MiB in float32


class ResponseLikelihood:
    """Log-likelihoods of responses under a causal language model, with the interface that `gap_grid` asks of a scorer.

    The "reward" of a row is ``log p(response tokens | prompt tokens)`` in nats, or with ``length_normalized`` its mean
    over the response tokens. A prompt is computed once for its responses, as in `inform_rm.scoring.packing`; where
    that gives other likelihoods, found out on a few random tokens, rows are computed one at a time, and a log line
    says so. For the other arguments see `inform_rm.scoring.scorer.RewardScorer`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        length_normalized: bool = False,
        tokens_per_batch: int | None = None,
        split_over_processes: bool = False,
    ):
        self.split_over_processes = split_over_processes
        self.model, self.length_normalized = model, length_normalized
        self.tokenizer = fix_date(tokenizer, "likelihood model")
        warn_of_no_template(self.tokenizer, "likelihood model")
        self.max_length = reward_models.checked_max_length(model, None)
        self.tokens_per_batch = tokens_per_batch or packing.default_tokens_per_batch(model)
        self.tokens_computed = 0
        reason = self._why_not_packed()
        self.is_packed = reason is None
        if reason is not None:
            logger.warning("Likelihoods are computed one response at a time: %s.", reason)

    def identity(self) -> dict[str, Any]:
        """What decides a likelihood; equal on every machine."""
        return {
            "model": reward_models.fingerprint_model(self.model),
            "tokenizer": reward_models.fingerprint_tokenizer(self.tokenizer),
            "length_normalized": self.length_normalized,
        }

    def iter_scores(
        self, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int], *, check_finite: bool = True
    ) -> Iterator[tuple[list[int], Tensor, None]]:
        """Yield ``(rows, log_likelihoods, None)`` by batches, as `RewardScorer.iter_scores` does."""
        largest = self.model.get_input_embeddings().weight.shape[0]
        for ids in sequences:
            if max(ids) >= largest:
                raise InputError(
                    f"likelihood model: no token id {max(ids)} among its {largest}. Use its own tokenizer."
                )
        batches = [[row] for row in range(len(sequences))]
        if self.is_packed:
            batches = packing.packed_batches(*packing.split_at(sequences, prompt_lengths), self.tokens_per_batch)

        def compute(rows: list[int]) -> tuple[Tensor, int]:
            return self._log_likelihoods([sequences[row] for row in rows], [prompt_lengths[row] for row in rows])

        with packing.eval_mode_of(self.model):
            turns = computed_in_turn(batches, compute) if self.split_over_processes else (
                (rows, compute(rows)) for rows in batches
            )  # fmt: skip
            for rows, (values, tokens) in turns:
                self.tokens_computed += tokens
                if check_finite and not values.isfinite().all():
                    raise RuntimeError("The likelihood model gave NaN or infinity; its weights are broken.")
                yield rows, values, None

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
        sums = torch.stack([part.sum() for part in logs.split(numbers)])
        values = sums / torch.tensor(numbers).clamp(min=1) if self.length_normalized else sums
        return values, packed.input_ids.numel()

    def _log_probabilities(self, row: PackedRow, predictors: Tensor, targets: Tensor) -> Tensor:
        """``(N,)`` float32 on the CPU: log-probability of each target after the token at its predictor's place."""
        device = self.model.get_input_embeddings().weight.device
        predictors, targets = predictors.long().to(device), targets.long().to(device)
        if not self.is_packed:  # one sequence
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
                self.is_packed = True
                together, _ = self._log_likelihoods(sequences, [7, 7])
                self.is_packed = False
                alone = torch.cat([self._log_likelihoods([ids], [7])[0] for ids in sequences])
            difference = (together - alone).abs().max()
            tolerance = 1e-4 if self.model.dtype == torch.float32 else 0.5
            if not difference <= tolerance * max(1.0, float(alone.abs().max())):
                return f"packed likelihoods differ by {difference:.2g}"
        except Exception as error:  # whatever a foreign model raises, it can still be run plainly
            return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        finally:
            self.is_packed = False
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
