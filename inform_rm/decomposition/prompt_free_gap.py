"""What of a reward gap comes from the prompt, and what from the two responses alone (arXiv:2504.06020).

A reward is read as ``r(x, y) = r1(x, y) + r2(y)``. For a pair of responses ``D(x) = r(x, y_w) - r(x, y_l)`` is the gap
under prompt x, and the *prompt-free gap* D2 is the root c of ``sum_k w_k sigmoid(D(x_k) - c) = 1/2`` over prompts x_k
that could have led to these responses. What is left, ``D1 = D(own prompt) - D2``, is the *prompt-related gap*:
averaged over prompts, the preference it stands for is a coin flip for every pair, so it tells nothing about which pair
it was.

This equation is derived from the definitions and theorem 1 in the paper's introduction, the only part that was
available when it was written; it is not copied from the authors' algorithm.

P counts pairs and M the prompts of each. Gaps are in the unit of rewards (logits); everything is computed and returned
in float64, on the device of the input, and nothing here carries a gradient.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from inform_rm.errors import InputError

# Below this slope of the balance, rounding would move its root by more than about 1e-7.
_FLAT = 1e-8
_TOLERANCE = 1e-6  # width of the interval that a root is known to lie in, in the unit of the gaps
_TEMPERING_STEPS = 60


@dataclass(frozen=True)
class Decomposition:
    """Gaps of P pairs taken apart, each field ``(P,)``.

    Attributes:
        own_gap: D under the pair's own prompt.
        prompt_related_gap: D1 = D - D2.
        prompt_free_gap: D2; NaN where a gap that counts is not finite.
        effective_sample_size: ``(sum w)^2 / sum w^2``, from 1 (D2 is the gap of one prompt) to M.
        standard_error: of D2, from the draw of prompts; see :func:`decompose_gaps` for NaN, 0 and inf.
        converged: false where D2 is NaN or known less closely than 1e-6, as for gaps so large that neighbouring floats
            lie further apart.
    """

    own_gap: Tensor
    prompt_related_gap: Tensor
    prompt_free_gap: Tensor
    effective_sample_size: Tensor
    standard_error: Tensor
    converged: Tensor


def prompt_free_gap(gaps: Tensor, weights: Tensor | None = None) -> Tensor:
    """D2: the root c of ``sum_k w_k sigmoid(D_k - c) = 1/2`` with ``sum_k w_k = 1``, for every pair.

    The left side falls strictly in c, and the root lies between the smallest and the largest gap.

    Args:
        gaps: ``(P, M)`` gap of each pair under each of its prompts.
        weights: ``(P, M)``, or ``(M,)`` for all pairs; ``None`` for equal ones. They need not add up to 1. At 0 the
            entry is left out, whatever its gap; entries of weight +inf share the whole mass of their row equally.

    Returns:
        ``(P,)`` float64, known to 1e-6. NaN for a pair with a NaN or infinite gap at positive weight; other pairs do
        not notice.

    Raises:
        InputError: (a ValueError) for wrong shapes, no prompts, weights that are negative or NaN, or a row without a
            positive one; the message names the first such row.

    Example:
        >>> gaps = torch.tensor([[0.0, 1.0, 2.0], [3.0, 3.0, 3.0]])
        >>> [round(value, 4) for value in prompt_free_gap(gaps).tolist()]
        [1.0, 3.0]
        >>> prompt_free_gap(gaps, torch.tensor([0.0, 0.0, 1.0])).tolist()
        [2.0, 3.0]
    """
    return _solve(gaps, weights)[0]


def decompose_gaps(
    gaps: Tensor, weights: Tensor | None = None, *, population: int | Tensor | None = None
) -> Decomposition:
    """Take each pair's gap under its own prompt apart into D1 + D2, with the standard error of D2.

    D2 solves ``sum_k w_k psi(D_k - c) = 0`` with ``psi(z) = sigmoid(z) - 1/2``: an M-estimator of the root that all
    prompts together would give, a sum of independent terms of mean 0 over drawn prompts. Its usual sandwich formula ::

        se = sqrt(sum_k w_k^2 psi(D_k - D2)^2) / sum_k w_k sigmoid'(D_k - D2)

    is too small by a factor of about ``sqrt(1 - 1/m)`` with m prompts of equal weight. Drawing them from
    ``population`` = N prompts without replacement leaves less to chance: se is multiplied by ``sqrt(1 - m/N)``, as if
    the own prompt were drawn like the others, which is right up to 1/(2N). se does not cover that the own prompt
    counts 1/m where it would count 1/N: that pulls D2 towards the own gap by about
    ``(1/m - 1/N) psi(D1) / sum_k w_k sigmoid'``.

    se is NaN where D2 is NaN or one prompt alone has weight, which tells nothing about the others; 0 where all N
    prompts are used; very large or inf where equal halves of the mass lie so far apart that D2 hangs on nothing.

    Args:
        gaps: ``(P, M)`` gap of each pair under each of its prompts, its own one first.
        weights: as in :func:`prompt_free_gap`. The own prompt's may be 0: D1 is then its gap against the others.
        population: how many prompts there were to draw from, one number for all or ``(P,)``; ``None`` for very many.

    Raises:
        InputError: as in :func:`prompt_free_gap`, and for a ``population`` smaller than the prompts with weight.

    Example:
        >>> parts = decompose_gaps(torch.tensor([[2.0, 0.0, 1.0]]))
        >>> round(parts.prompt_free_gap.item(), 4), round(parts.prompt_related_gap.item(), 4)
        (1.0, 1.0)
    """
    root, width, values, shares = _solve(gaps, weights)
    own = gaps.detach()[:, 0].double()
    distance = values - root[:, None]
    influence = shares * torch.tanh(distance / 2) / 2  # psi(z) = sigmoid(z) - 1/2 = tanh(z / 2) / 2
    # Where the slope underflows the numerator is far from 0, since gaps near the root would make a slope: no 0 / 0.
    error = influence.square().sum(1).sqrt() / _slope(distance, shares)
    used = (shares > 0).sum(1)
    error = error.masked_fill(used == 1, math.nan)
    if population is not None:
        total = torch.as_tensor(population, device=used.device).expand(len(used))
        if (total < used).any():
            row = _first(total < used)
            raise InputError(
                f"population of row {row} is {total[row]}, but {used[row]} of its prompts have weight; it must be the "
                "number of prompts that they were drawn from"
            )
        left = 1 - used.double() / total.double()  # as integers they would divide in float32
        error = torch.where(total == used, 0.0, error * left.sqrt())
    return Decomposition(
        own_gap=own,
        prompt_related_gap=own - root,
        prompt_free_gap=root,
        effective_sample_size=_effective_sample_size(shares),
        standard_error=torch.where(root.isnan(), math.nan, error),
        converged=width <= _TOLERANCE,  # false for NaN
    )


def tempered_weights(log_likelihoods: Tensor, target: float = 0.25) -> tuple[Tensor, Tensor]:
    """``softmax(a * log_likelihoods)`` with the largest a in [0, 1] that keeps enough prompts in play.

    The likelihood of a long response differs so much between prompts that the plain softmax puts all weight on one. a
    is the largest exponent with an effective sample size of at least ``target`` times the row's usable prompts.

    Args:
        log_likelihoods: ``(P, M)`` in nats; -inf marks a prompt that cannot be used and gets weight 0.
        target: share of the usable prompts, above 0 and at most 1. At 1 every row gets exponent 0, but 1 where all
            log-likelihoods are equal.

    Returns:
        Weights ``(P, M)`` with rows that add up to 1 and exponents ``(P,)``; both float64.

    Raises:
        InputError: for NaN, +inf, or a row without a usable entry.

    Example:
        >>> weights, exponents = tempered_weights(torch.tensor([[0.0, -1000.0], [0.0, 0.0]]), target=0.75)
        >>> round(1 / weights[0].square().sum().item(), 6), exponents[1].item()
        (1.5, 1.0)
    """
    scores = log_likelihoods.detach().double()
    wrong = (scores.isnan() | (scores == math.inf)).any(1)
    if wrong.any():
        raise InputError(f"log_likelihoods of row {_first(wrong)} hold NaN or +inf; -inf marks an unusable prompt")
    usable = scores != -math.inf
    if not usable.any(1).all():
        row = _first(~usable.any(1))
        raise InputError(f"log_likelihoods of row {row} have no usable (finite) entry; drop this pair")
    # Finite everywhere, because 0 * -inf is NaN; relative to the largest, which therefore never underflows.
    scores = (scores - scores.amax(1, keepdim=True)).masked_fill(~usable, 0.0)

    def tempered(exponents: Tensor) -> Tensor:
        return (exponents[:, None] * scores).exp() * usable

    # ESS falls in a: with the convex K(a) = log sum exp(a s), log ESS = 2 K(a) - K(2a), whose derivative is
    # 2 (K'(a) - K'(2a)) <= 0, because the derivative of a convex function does not fall. So bisection finds the
    # largest a; the lower end is returned, at which the target is met. At a = 0 it is, since ESS = number of usable.
    needed = target * usable.sum(1).double()
    low = torch.zeros_like(needed)
    high = torch.ones_like(low)
    if target < 1:
        untempered = _effective_sample_size(tempered(high)) >= needed
        for _ in range(_TEMPERING_STEPS):
            middle = (low + high) / 2
            enough = _effective_sample_size(tempered(middle)) >= needed
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    else:  # by hand, as rounding decides whether ESS >= 1.0 * M
        untempered = (scores == 0).all(1)
    exponents = torch.where(untempered, 1.0, low)
    weights = tempered(exponents)
    return weights / weights.sum(1, keepdim=True), exponents


def sample_prompts(
    own: Tensor, num_prompts: int, population: int, *, seed: int, strata: Tensor | None = None
) -> Tensor:
    """Draw prompts for each pair: its own one first, then others without replacement, all equally likely.

    A row depends on the seed, on its place in ``own``, on its own prompt, on ``num_prompts`` and on the strata, not on
    the other rows: two pairs of one prompt get different draws, and appending pairs changes nothing.

    Prompts are numbered from 0; ``own`` ``(P,)`` are those of the pairs. With ``strata``, integer labels of all
    prompts, only those with the label of the own one are drawn. The result is ``(P, M)``: M is ``num_prompts``, or the
    largest number of prompts that a pair can get if that is smaller; rows that can get fewer end in -1.

    Example:
        >>> rows = sample_prompts(torch.tensor([0, 3]), 3, 4, seed=0, strata=torch.tensor([7, 8, 8, 8]))
        >>> rows[0].tolist(), rows[1, 0].item(), sorted(rows[1].tolist())
        ([0, -1, -1], 3, [1, 2, 3])
    """
    labels = np.zeros(population) if strata is None else strata.numpy()
    _, label, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    # The prompts sorted by stratum: each stratum is a slice, in which every prompt has a place.
    members = label.argsort(kind="stable")
    starts = sizes.cumsum() - sizes
    place = np.empty_like(members)
    place[members] = np.arange(population) - starts[label[members]]

    own_prompts = own.numpy()
    others = sizes[label[own_prompts]] - 1
    columns = min(num_prompts - 1, int(others.max(initial=0)))
    rows = np.full((len(own), columns + 1), -1)
    for row, (prompt, count) in enumerate(zip(own_prompts.tolist(), others.tolist(), strict=True)):
        generator = np.random.default_rng([seed % 2**64, row, prompt])
        drawn = generator.choice(count, size=min(columns, count), replace=False)
        drawn += drawn >= place[prompt]  # the own prompt is not among the others: step over it
        rows[row, 0] = prompt
        rows[row, 1 : 1 + len(drawn)] = members[starts[label[prompt]] + drawn]
    return torch.from_numpy(rows)


def _solve(gaps: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Root ``(P,)``, width of its interval ``(P,)``, gaps ``(P, M)`` as they were used, normalised weights ``(P, M)``.

    Rows with a non-finite gap at positive weight have NaN in the first two; their gaps come back as 0.
    """
    if gaps.dim() != 2:
        raise InputError(f"gaps have shape {tuple(gaps.shape)}; expected (pairs, prompts)")
    if gaps.shape[1] == 0:
        raise InputError("gaps have no prompts; each pair needs at least one, its own")
    weights = torch.ones_like(gaps) if weights is None else weights
    if weights.shape not in (gaps.shape, gaps.shape[1:]):
        raise InputError(
            f"weights have shape {tuple(weights.shape)}; expected {tuple(gaps.shape)} or {tuple(gaps.shape[1:])}, "
            "as gaps have"
        )
    shares = _normalised(weights.to(gaps.device).expand(gaps.shape))
    used = shares > 0
    values = gaps.detach().double()
    known = (values.isfinite() | ~used).all(1)
    values = values.masked_fill(~known[:, None], 0.0)
    low = values.masked_fill(~used, math.inf).amin(1)
    high = values.masked_fill(~used, -math.inf).amax(1)
    values = torch.where(used, values, low[:, None])  # finite, and without weight

    # Halves of differences, so that gaps near the largest float do not overflow.
    widest = max((high / 2 - low / 2).max().item() if len(low) else 0.0, _TOLERANCE)
    for _ in range(math.ceil(math.log2(widest) - math.log2(_TOLERANCE)) + 2):
        middle = low / 2 + high / 2
        balance = (shares * torch.tanh((values - middle[:, None]) / 2)).sum(1)
        # Both ends at an exact 0: swapping the sides of a pair then changes the sign of the root and nothing else.
        low, high = torch.where(balance >= 0, middle, low), torch.where(balance <= 0, middle, high)
    root = _polish_flat(low / 2 + high / 2, values, shares)
    unknown = ~known
    return root.masked_fill(unknown, math.nan), (high - low).masked_fill(unknown, math.nan), values, shares


def _polish_flat(root: Tensor, values: Tensor, shares: Tensor) -> Tensor:
    """Find the root of rows whose mass lies in equal halves, further apart than float64 can see the balance tilt.

    Bisection stops anywhere between the halves, where all sigmoids are 0 or 1 up to rounding. What decides are the
    tails: ``sum_below w sigmoid(D - c) = sum_above w sigmoid(c - D)``. In logs both sides are nearly lines in c, of
    slopes -1 and 1, so one Newton step reaches the root, and a second removes what their bend left.
    """
    distance = values - root[:, None]
    tilt = (shares * distance.sign()).sum(1)
    rounding = shares.shape[1] * torch.finfo(torch.float64).eps
    rows = ((_slope(distance, shares) < _FLAT) & (tilt.abs() <= rounding)).nonzero()[:, 0]
    if len(rows) == 0:
        return root
    center, values, logs = root[rows], values[rows], shares[rows].log()
    above = values > center[:, None]
    for _ in range(2):
        tails = logs + torch.nn.functional.logsigmoid(-(values - center[:, None]).abs())
        below_tail = tails.masked_fill(above, -math.inf).logsumexp(1)
        above_tail = tails.masked_fill(~above, -math.inf).logsumexp(1)
        center = center + (below_tail - above_tail) / 2
    return root.index_copy(0, rows, center)


def _slope(distance: Tensor, shares: Tensor) -> Tensor:
    """``(P,)`` ``sum_k w_k sigmoid'(z_k)``, to full relative precision in the tails."""
    return (shares * torch.sigmoid(distance) * torch.sigmoid(-distance)).sum(1)


def _normalised(weights: Tensor) -> Tensor:
    """``(P, M)`` float64 weights whose rows add up to 1; refuses rows for which there are none."""
    weights = weights.detach().double()
    wrong = (weights.isnan() | (weights < 0)).any(1)
    if wrong.any():
        raise InputError(f"weights of row {_first(wrong)} hold a negative number or NaN; they must be 0 or above")
    empty = ~(weights > 0).any(1)
    if empty.any():
        raise InputError(f"weights of row {_first(empty)} have no positive entry; at least one prompt must count")
    infinite = weights.isinf()
    weights = torch.where(infinite.any(1, keepdim=True), infinite.double(), weights)
    weights = weights / weights.amax(1, keepdim=True)  # so that the sum of large weights does not overflow
    return weights / weights.sum(1, keepdim=True)


def _effective_sample_size(weights: Tensor) -> Tensor:
    """``(P,)`` ``(sum w)^2 / sum w^2``: how many equal weights would be worth as much (Kish)."""
    return weights.sum(1).square() / weights.square().sum(1)


def _first(mask: Tensor) -> int:
    return int(mask.nonzero()[0, 0])
