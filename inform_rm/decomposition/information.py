"""How much the responses alone tell about a model's preference, and how much the prompt adds: mutual information.

Variables of arXiv:2504.06020 (theorems 1 and 2; their definitions as a public review gives them). A pair is drawn, all
equally likely and in either order, then a prompt by the pair's weights. Preferences are coins:

- ``W`` = Ber(sigmoid(D)): the model's preference under that prompt;
- ``W~`` = Ber(E_x sigmoid(D(x))): its mean over the pair's prompts, what the responses alone decide;
- ``Z~`` = Ber(sigmoid(D2)) and ``Z`` = Ber(sigmoid(D1)): those of the prompt-free and of the prompt-related gap.

By the two orders each is 1 half of the time, so that every information is ``ln 2`` minus a conditional entropy. All in
nats. P counts pairs, M the prompts of each.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from inform_rm.decomposition.prompt_free_gap import prompt_free_gap

NAMES = ("preference", "responses", "prompt", "prompt_free", "prompt_related")
TERMS = ("preference", "responses", "free_agrees", "related_agrees")
_RESAMPLES = 400


def information_terms(gaps: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """What of each pair goes into the informations, `TERMS`, each ``(P,)`` float64.

    ``preference`` is ``ln 2`` minus the mean entropy of W under the pair's prompts, ``responses`` ``ln 2`` minus the
    entropy of W~; ``free_agrees`` and ``related_agrees`` are the probabilities that Z~, or Z, is the same as W~.

    Args:
        gaps: ``(P, M)`` gap of each pair under each of its prompts; where the weight is 0 it does not count.
        weights: ``(P, M)``, at least 0, a positive one in each row.
    """
    free = prompt_free_gap(gaps, weights)
    shares = weights.double() / weights.double().sum(dim=1, keepdim=True)
    gaps = gaps.double().masked_fill(shares == 0, 0.0)
    of_prompts, of_free = gaps.sigmoid(), free.sigmoid()
    of_responses = (shares * of_prompts).sum(dim=1)
    of_related = (shares * (gaps - free[:, None]).sigmoid()).sum(dim=1)
    return {
        "preference": math.log(2) - (shares * _entropy(of_prompts)).sum(dim=1),
        "responses": math.log(2) - _entropy(of_responses),
        "free_agrees": of_free * of_responses + (1 - of_free) * (1 - of_responses),
        "related_agrees": of_related * of_responses + (1 - of_related) * (1 - of_responses),
    }


def mutual_information(
    terms: dict[str, NDArray], *, num_resamples: int = _RESAMPLES, seed: int = 0
) -> dict[str, dict[str, float | list[float]]]:
    """The informations over all pairs, each with a 95 % bootstrap interval over pairs.

    - ``preference``: I(pair, prompt; W), all that a preference tells: how decided the model is;
    - ``responses``: I(pair; W) = I(pair; W~), what the responses alone tell;
    - ``prompt``: I(prompt; W | pair), the difference: what the prompt adds;
    - ``prompt_free``: I(Z~; W~);
    - ``prompt_related``: I(Z; W~), 0 by the choice of D2 (theorem 1).

    The mean over a pair's prompts is taken over those that were drawn, its own among them: ``responses`` is too large
    by that, and ``prompt`` too small, the more so the fewer they are. ``terms`` are those of `information_terms`.
    """
    columns = np.stack([terms[name] for name in TERMS])  # (4, P)
    rng = np.random.default_rng(seed)
    number = columns.shape[1]
    drawn = np.array([_informations(columns[:, rng.integers(number, size=number)]) for _ in range(num_resamples)])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    found = _informations(columns)
    return {
        name: {"nats": float(found[at]), "interval": [float(low[at]), float(high[at])]}
        for at, name in enumerate(NAMES)
    }


def _informations(columns: NDArray) -> NDArray:
    preference, responses, free, related = columns.mean(axis=1)
    pairs = [math.log(2) - _entropy(torch.tensor(agrees)).item() for agrees in (free, related)]
    return np.array([preference, responses, preference - responses, *pairs])


def _entropy(probability: Tensor) -> Tensor:
    return torch.special.entr(probability) + torch.special.entr(1 - probability)
