"""Several reward models that score as one (UWO)."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inform_rm.errors import InputError
from inform_rm.scoring.reward_models import fingerprint_tokenizer
from inform_rm.scoring.scorer import Prompt, RewardScorer, Scores, as_scorer


class EnsembleScorer(RewardScorer):
    """Several reward models that score as one: ``mean - coefficient * variance`` of the members' rewards.

    Uncertainty-weighted optimisation (UWO, Coste et al. 2024, arXiv:2310.02743):
    ``1/M sum_m r_m - lambda * 1/M sum_m (r_m - mean)^2``, with the population variance over the M members. It goes
    wherever a `RewardScorer` goes. Members may be of different kinds (InfoRM, standard, other sequence classifiers)
    but share tokenizer and chat template. All stay in memory, and each computes every row.

    Bradley-Terry training leaves a constant c_m in each member's rewards open, so that without ``offsets`` the
    variance has ``Var(c) + 2 Cov(c, r)`` too much. The usual remedy is to subtract each member's mean reward on one
    reference set: ``offsets=ensemble.member_rewards(prompts, responses).mean(dim=1).tolist()``. A member's scale, and
    a shift that depends on the prompt, are not corrected.

    ``uncertainty`` of the scoring methods: the draws of an ensemble are its M members, the only number accepted.

    Args:
        members: at least two scorers, folders, Hub ids or loaded models.
        coefficient: lambda, at least 0, in units of 1 / reward.
        offsets: one number a member, subtracted from its rewards. By default 0.
        tokenizer: see `RewardScorer`, for loaded models.
        scorer_options: keywords of `RewardScorer` for members that are not scorers yet.

    Attributes:
        members: the members' scorers.
        model: a list of the members' models.
        max_length: the least of the members'.
        tokens_computed: tokens that went through all members together, in scores of the ensemble.

    Raises:
        InputError: fewer than two members, different tokenizers or chat templates, or a bad coefficient or offset.
    """

    def __init__(
        self,
        members: Sequence[str | Path | torch.nn.Module | RewardScorer],
        *,
        coefficient: float,
        offsets: Sequence[float] | None = None,
        tokenizer: Any = None,
        **scorer_options: Any,
    ):
        # Not the initialiser of the base class, which loads one model: this sets the same attributes.
        if isinstance(members, str | Path | torch.nn.Module | RewardScorer) or len(members) < 2:
            raise InputError(f"members: {members!r}; an ensemble needs a list of at least two reward models.")
        self.offsets = [0.0] * len(members) if offsets is None else list(offsets)
        for name, value in (("coefficient", coefficient), *(("offsets", offset) for offset in self.offsets)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InputError(f"{name}: {value!r}; expected a finite number.")
        if coefficient < 0:
            raise InputError(f"coefficient: {coefficient!r}; below 0 it would reward disagreement. Pass 0 or more.")
        self.coefficient, self.offsets = float(coefficient), [float(offset) for offset in self.offsets]
        if len(self.offsets) != len(members):
            raise InputError(f"offsets: {len(self.offsets)} numbers for {len(members)} members; expected one each.")
        self.members = [as_scorer(member, tokenizer, scorer_options) for member in members]
        self.split_over_processes = self.members[0].split_over_processes
        for member in self.members[1:]:
            if fingerprint_tokenizer(member.tokenizer) != fingerprint_tokenizer(self.members[0].tokenizer):
                raise InputError(
                    f"members: {member.name} has another tokenizer or chat template than {self.members[0].name}. An "
                    "ensemble scores the same tokens with every member: choose models that share them."
                )
        names = ", ".join(member.name for member in self.members)
        penalty = f" - {self.coefficient:g} * variance" if self.coefficient else ""
        self.name = f"mean{penalty} of {len(self.members)} reward models ({names})"
        self.model = torch.nn.ModuleList(member.model for member in self.members)
        self.tokenizer = self.members[0].tokenizer
        self.tokens_per_batch = min(member.tokens_per_batch for member in self.members)
        self.max_length = min((x.max_length for x in self.members if x.max_length is not None), default=None)
        self._vocabulary_size = min(member._vocabulary_size for member in self.members)
        self.batching = "packed"  # each member makes batches of its own of these
        self.tokens_computed = 0

    def member_rewards(self, prompts: Sequence[Prompt], responses: Sequence[str], progress: bool = False) -> Tensor:
        """``(M, N)`` float32: rewards of N rows by each member, without offsets; see `RewardScorer.score`."""
        return torch.stack([member.score(prompts, responses, progress=progress) for member in self.members])

    def check_uncertainty(self, uncertainty: int | None) -> None:
        """Raise `InputError` unless ``uncertainty`` is ``None`` or the number of members."""
        if uncertainty is not None and (isinstance(uncertainty, bool) or uncertainty != len(self.members)):
            raise InputError(
                f"uncertainty: {uncertainty!r}; the draws of an ensemble are its {len(self.members)} members. Pass "
                f"{len(self.members)}, or leave it out."
            )

    def identity(self) -> dict[str, Any]:
        """What decides a reward: every member's weights, in order, tokenizer, dtypes, coefficient and offsets."""
        parts = [member.identity() for member in self.members]
        ensemble = {
            "members": [part["model"] for part in parts], "coefficient": self.coefficient, "offsets": self.offsets,
        }  # fmt: skip
        return {
            "model": hashlib.sha256(json.dumps(ensemble, sort_keys=True).encode()).hexdigest(),
            "tokenizer": parts[0]["tokenizer"],
            "dtype": ", ".join(sorted({part["dtype"] for part in parts})),
            **ensemble,
        }

    def _packed_forward(
        self, sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int], uncertainty: int | None
    ) -> Scores:
        """One batch through every member, each in batches of its own kind."""
        rewards = torch.full((len(self.members), len(sequences)), math.nan, dtype=torch.float64)
        tokens = -sum(member.tokens_computed for member in self.members)
        for number, member in enumerate(self.members):
            for rows, values, _ in member.iter_scores(sequences, prompt_lengths, check_finite=False):
                rewards[number, rows] = values.double() - self.offsets[number]
        tokens += sum(member.tokens_computed for member in self.members)
        variance, mean = torch.var_mean(rewards, dim=0, correction=0)
        combined = (mean - self.coefficient * variance).float()
        return combined, None if uncertainty is None else variance.sqrt().float(), tokens
