"""Outliers among latents: Mahalanobis distances (MOP), and what a statistic is by chance.

Terms, units and types as in `inform_rm.eval.detection.clusters`. Memory stays bounded for a million latents: distances
are taken a block at a time, and the covariance is fitted to at most 100,000 rows.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2
from sklearn.covariance import ledoit_wolf
from tqdm import tqdm

from inform_rm.errors import InputError
from inform_rm.eval.detection.latent_arrays import LatentArray, Measured, blocks, check_latents, subsample
from inform_rm.eval.detection.settings import DetectionSettings
from inform_rm.util.intervals import wilson_interval

MOST_FITTED, MOST_SPLIT = 100_000, 10_000
_FEW_POINTS = 10  # a dimension; with fewer the chi-square tail is far off (see mahalanobis_outlier_probability)
_SMALLEST_REFERENCE = 10


@dataclass(frozen=True)
class MahalanobisReference:
    """Mean and covariance of reference latents, to measure many candidates by; made by :func:`fit_mahalanobis`.

    Attributes:
        mean: ``(K,)``.
        whitening: ``(K, K)`` W with ``W W^T`` the inverse of the covariance.
        shrinkage: weight of the multiple of the identity in the Ledoit-Wolf covariance, 0 to 1.
        left_out_distances: ``(num_points,)`` sorted squared distance of each point from the others, as if it had not
            been fitted (see :func:`fit_mahalanobis`).
    """

    mean: NDArray
    whitening: NDArray
    shrinkage: float
    left_out_distances: NDArray

    @property
    def num_points(self) -> int:
        """Reference latents that were fitted."""
        return len(self.left_out_distances)

    def squared_distances(self, candidate: LatentArray) -> NDArray:
        """``(N,)`` float64 squared Mahalanobis distances."""
        points = check_latents("candidate", candidate)
        if points.shape[1] != len(self.mean):
            raise InputError(f"candidate: {points.shape[1]} latent dimensions; the reference has {len(self.mean)}.")
        return np.concatenate([_squares(block - self.mean, self.whitening) for block in blocks(points)])

    def tail_probabilities(self, squared_distances: NDArray, tail: str = "chi2") -> NDArray:
        """``(N,)`` how likely so large a distance is for a latent of the reference; small for an outlier.

        Args:
            squared_distances: ``(N,)`` from :meth:`squared_distances`.
            tail: ``"chi2"``: of the chi-square distribution with K degrees of freedom, as in arXiv:2510.13694;
                ``"reference"``: rank among the reference's own distances, ``(1 + #{left out >= d}) / (points + 1)``,
                which needs neither a Gaussian nor many points (see :func:`mahalanobis_outlier_probability`).

        Raises:
            InputError: for ``"chi2"`` with no more points than dimensions.
        """
        if tail == "reference":
            smaller = np.searchsorted(self.left_out_distances, squared_distances)
            return (1 + self.num_points - smaller) / (self.num_points + 1)
        latent_dim = len(self.mean)
        if self.num_points <= latent_dim:
            raise InputError(
                f"reference: {self.num_points} points in {latent_dim} dimensions do not show their covariance, and "
                "squared distances from them are far from chi-square: up to 7 in 10 latents of the same policy would "
                f"be called outliers at 0.01. Pass more than {latent_dim} (better {_FEW_POINTS} times as many), or "
                "tail='reference'."
            )
        if self.num_points < _FEW_POINTS * latent_dim:
            warnings.warn(
                f"{self.num_points} reference points in {latent_dim} dimensions: unless all dimensions vary alike, "
                "the chi-square tail calls too many latents outliers. Pass more, or tail='reference'.",
                stacklevel=2,
            )
        return chi2.sf(squared_distances, latent_dim)

    def check_alpha(self, alpha: float, tail: str) -> None:
        """Raise `InputError` for a wrong alpha or tail, or an alpha below the smallest rank that there is."""
        DetectionSettings(alpha=alpha, tail=tail)
        if tail == "reference" and alpha * (self.num_points + 1) <= 1:
            raise InputError(
                f"alpha: {alpha!r}; the smallest rank among {self.num_points} reference points is "
                f"{1 / (self.num_points + 1):.3g}: nothing could be an outlier. Pass a larger alpha or more points."
            )


def fit_mahalanobis(reference: LatentArray, *, seed: int = 0) -> MahalanobisReference:
    """Mean and Ledoit-Wolf covariance of the reference, and the distance that each of its points has when left out.

    A fitted point lies too near: it pulls mean and covariance towards itself. Removing it from m points with
    ``q = u^T Sigma^-1 u``, ``u = x - mean``, changes the covariance by a term of rank one, and by Sherman and Morrison
    ``d^2 = q m / (m - 1) / (1 - (1 - shrinkage) q / (m - 1))``. Shrinkage and the size of its target stay as they are.

    Fewer points than dimensions will do for distances, because the covariance is shrunk, but fewer than 10 or all
    equal ones are an `InputError`. Of more than 100,000 a random part of that size is fitted.
    """
    points = check_latents("reference", reference)
    if len(points) < _SMALLEST_REFERENCE:
        raise InputError(
            f"reference: {len(points)} points; a covariance needs at least {_SMALLEST_REFERENCE}. Pass more."
        )
    part = points[subsample(points, MOST_FITTED, seed)].astype(np.float64)
    mean = part.mean(axis=0)
    covariance, shrinkage = ledoit_wolf(part)
    variances, axes = np.linalg.eigh(covariance)
    if variances[0] <= len(mean) * np.finfo(np.float64).eps * variances[-1]:
        raise InputError(
            f"reference: {len(part)} points whose covariance cannot be inverted (smallest eigenvalue "
            f"{variances[0]:.3g}, largest {variances[-1]:.3g}): they are all equal, or lie on a line. Pass others."
        )
    whitening = axes / np.sqrt(variances)
    squares, others = _squares(part - mean, whitening), len(part) - 1
    left_out = squares * (len(part) / others) / (1 - (1 - shrinkage) * squares / others)
    return MahalanobisReference(mean, whitening, float(shrinkage), np.sort(left_out))


def _squares(centered: NDArray, whitening: NDArray) -> NDArray:
    return np.square(centered @ whitening).sum(axis=1)


def fit_mop(reference: LatentArray, settings: DetectionSettings) -> Callable[[LatentArray, int], Measured]:
    """MOP as a `Statistic`: with each response's squared distance and its tail probability."""
    fitted = fit_mahalanobis(reference, seed=settings.seed)
    fitted.check_alpha(settings.alpha, settings.tail)

    def measure(candidate: LatentArray, num_resamples: int) -> Measured:
        squares = fitted.squared_distances(candidate)
        tails = fitted.tail_probabilities(squares, settings.tail)
        outliers = tails < settings.alpha
        interval = list(wilson_interval(int(outliers.sum()), len(outliers)))
        values = {"mop": float(outliers.mean()), "mop_interval": interval}
        columns = {"squared_mahalanobis": squares, "tail_probability": tails, "mop_outlier": outliers}
        return values, {name: column.tolist() for name, column in columns.items()}

    return measure


def mahalanobis_outlier_probability(
    candidate: LatentArray, reference: LatentArray, *, alpha: float = 0.01, tail: str = "chi2"
) -> float:
    """MOP: share of candidate latents whose tail probability, given the reference, is below alpha (arXiv:2510.13694).

    For a candidate from the same Gaussian as the reference it should be alpha. With the paper's chi-square tail it is
    if all dimensions have the same variance or the reference is very large. For K = 128, alpha = 0.01 and variances 1,
    1/2, ... 1/128 it was 0.68 at M = 110 (refused), 0.41 at 256 (warned of), 0.074 at 1024, 0.012 at 8192; with most
    variances near 0 it was 0 at any M: shrinkage widens the narrow dimensions, and outliers hide there.
    ``tail="reference"`` gave 0.005 to 0.016 in all of these; it does not ask for a Gaussian, either.

    Args:
        candidate: ``(N, K)``.
        reference: ``(M, K)``, more than K for ``"chi2"``, at least ``1 / alpha`` of them for ``"reference"``.
        alpha: between 0 and 1.
        tail: see :meth:`MahalanobisReference.tail_probabilities`.

    Raises:
        InputError: for bad latents, different K, a reference that is too small, or a wrong argument.
    """
    values, _ = fit_mop(reference, DetectionSettings(alpha=alpha, tail=tail))(candidate, 0)
    return values["mop"]


def split_half_null(
    reference: NDArray,
    statistic: Callable[[NDArray, NDArray], float],
    *,
    num_splits: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> NDArray:
    """``(num_splits,)`` values of a statistic of candidate and reference where both come from the same policy.

    Each time the reference ``(M, K)`` is shuffled, and one half of it (of a random 10,000, if it has more) plays the
    candidate, the other the reference. CSI and MOP depend on the sizes of the sets; with fewer reference latents than
    the real call has both tend to be larger, and so the test is on the safe side. CSI must be ``normalized`` and have
    a number for ``eps``, the one of the real call.

    Example:
        >>> latents = np.random.default_rng(0).normal(size=(400, 3))
        >>> null = split_half_null(latents, mahalanobis_outlier_probability, num_splits=20)
        >>> null_rank(0.5, null)  # 1 of 21: no split came near
        0.047619047619047616
    """
    used = min(len(reference), MOST_SPLIT)
    rng = np.random.default_rng(seed)
    values = np.empty(num_splits)
    for split in tqdm(range(num_splits), desc="null", unit="split", disable=not progress):
        order = rng.choice(len(reference), used, replace=False)
        values[split] = statistic(reference[order[: used // 2]], reference[order[used // 2 :]])
    return values


def null_rank(observed: float, null: NDArray) -> float:
    """``(1 + #{null >= observed}) / (1 + splits)``: how often chance gives as much; small for a real change.

    Like a p-value, and no smaller than 1 / (1 + splits). The splits share their points, so it is an approximate one.
    """
    return float(1 + (null >= observed).sum()) / (1 + len(null))
