"""Cluster separation (CSI): how far the clusters of a policy's latents lie from a reference's.

The *reference* is a set of latents of responses that the reward model can judge (of the SFT policy, say), the
*candidate* a set of latents of the policy under test. N counts candidate and M reference latents, K latent dimensions;
distances are in the unit of the latents. Latents are arrays or tensors of any real type, one row a response;
everything is computed on the CPU in float64, and nothing carries a gradient.

Memory stays bounded for a million latents: rows are turned to float64 a block at a time, and DBSCAN sees a seeded
subsample of at most ``max_cluster_points`` (it may list all pairs of points: 0.7 GB at the default). Results say how
many points they used.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import DBSCAN
from sklearn.metrics import pairwise_distances_argmin_min
from sklearn.neighbors import NearestNeighbors

from inform_rm.errors import InputError
from inform_rm.eval.detection.latent_arrays import (
    LatentArray,
    Measured,
    check_both,
    check_integer,
    check_latents,
    rows_in_a_block,
    subsample,
)
from inform_rm.eval.detection.settings import NOISE_POLICIES, DetectionSettings
from inform_rm.util.intervals import Interval

AUTO_EPS_QUANTILE = 0.9


@dataclass(frozen=True)
class ClusterSeparation:
    """Clusters of the candidate latents and how far they lie from the reference.

    C counts clusters and n the rows that were clustered: all N, or a subsample.

    Attributes:
        csi: ``sum_c size_c * distance_c``; of a subsample, times N/n.
        num_points: N, candidate latents that were given.
        eps: radius of DBSCAN, the one found if ``"auto"`` was asked for.
        rows: ``(n,)`` rows of the candidate that were clustered, in rising order.
        cluster_of_row: ``(n,)`` number of each one's cluster, 0 to C - 1; -1 for dropped noise.
        is_noise: ``(n,)`` bool, whether DBSCAN called it noise.
        sizes: ``(C,)`` points in each cluster.
        centroid_distances: ``(C,)`` from each cluster's centroid to the nearest reference latent.
        nearest_reference_rows: ``(C,)`` row of that reference latent.
    """

    csi: float
    num_points: int
    eps: float
    rows: NDArray
    cluster_of_row: NDArray
    is_noise: NDArray
    sizes: NDArray
    centroid_distances: NDArray
    nearest_reference_rows: NDArray

    @property
    def normalized_csi(self) -> float:
        """CSI / N: the distance of the average point's cluster, comparable between runs of different size."""
        return self.csi / self.num_points

    @property
    def subsampled(self) -> bool:
        """Whether fewer points were clustered than given."""
        return len(self.rows) < self.num_points

    @property
    def point_distances(self) -> NDArray:
        """``(n,)`` what each clustered row adds to CSI: its cluster's distance; NaN for dropped noise."""
        return np.append(self.centroid_distances, np.nan)[self.cluster_of_row]


def cluster_separation_index(
    candidate: LatentArray,
    reference: LatentArray,
    *,
    eps: float | str = 0.5,
    min_samples: int = 5,
    noise: str = "cluster",
    normalized: bool = False,
    max_cluster_points: int = 5000,
    seed: int = 0,
) -> float:
    """CSI: DBSCAN the candidate latents; ``sum_i |C_i| * min_s ||centroid_i - s||`` over reference latents s.

    Equations 6 to 8 and Algorithm 3 of arXiv:2402.09345. The value is no distance from 0: a cluster as wide as the
    reference has its centroid in the middle, and in many dimensions no point lies near there. Compare it with
    :func:`inform_rm.eval.detection.outliers.split_half_null` or with earlier steps. Nor is it 0 for a candidate equal
    to the reference, unless each cluster's centroid is a reference latent, as with singletons or equal points.

    Args:
        candidate: ``(N, K)`` latents of the policy under test, at least one.
        reference: ``(M, K)`` latents to compare with, at least one.
        eps: radius of DBSCAN. 0.5 is scikit-learn's default; in 128 dimensions of unit variance it makes every point
            noise. ``"auto"``: :func:`auto_eps` of as many reference latents as candidate ones are clustered.
        min_samples: points within ``eps``, itself among them, that make a core point.
        noise: what becomes of DBSCAN's noise: ``"cluster"``: it is one cluster, as in the pseudocode, where the label
            -1 is a label like the others; ``"singletons"``: each point is one; ``"drop"``: it adds nothing.
        normalized: divide by N (dropped points count).
        max_cluster_points: cluster a random subsample above this size and scale up. A subsample is less dense: with
            the same ``eps`` more of it is noise.
        seed: of the subsample and of the draw for ``"auto"``.

    Raises:
        InputError: (a ValueError) for empty sets, NaN or infinite latents, different K, or a wrong argument.

    Example:
        >>> reference = np.array([[0.0, 0.0], [10.0, 0.0]])
        >>> candidate = np.array([[0.0, 3.0], [0.0, 3.0], [10.0, 4.0], [10.0, 4.0], [10.0, 4.0]])
        >>> cluster_separation_index(candidate, reference, min_samples=2)  # 2 * 3 + 3 * 4
        18.0
        >>> cluster_separation_index(candidate, reference, min_samples=2, normalized=True)
        3.6
    """
    settings: dict[str, Any] = {"eps": eps, "min_samples": min_samples, "noise": noise}
    result = separate_clusters(candidate, reference, **settings, max_cluster_points=max_cluster_points, seed=seed)
    return result.normalized_csi if normalized else result.csi


def separate_clusters(
    candidate: LatentArray,
    reference: LatentArray,
    *,
    eps: float | str = 0.5,
    min_samples: int = 5,
    noise: str = "cluster",
    max_cluster_points: int = 5000,
    seed: int = 0,
) -> ClusterSeparation:
    """The clusters behind :func:`cluster_separation_index`, which documents the arguments and errors.

    Warns where ``noise="drop"`` leaves nothing: the sum over no clusters, 0, then says nothing about the policy.
    """
    points, others = check_both(candidate, reference)
    check_integer("max_cluster_points", max_cluster_points)
    rows = subsample(len(points), max_cluster_points, seed)
    radius = _check_clustering(eps, min_samples, noise, others, len(rows), seed)
    part = points[rows].astype(np.float64)
    cluster_of_row, is_noise, sizes, centroids = _cluster(part, radius, min_samples, noise)
    if not len(sizes):
        warnings.warn(
            f"all {len(rows)} points are DBSCAN noise at eps {radius:g}, and noise='drop' leaves a CSI of 0 that says "
            "nothing. Pass a larger eps, eps='auto' or another noise policy.",
            stacklevel=2,
        )
    distances, nearest = _nearest(centroids, others)
    csi = float((sizes * distances).sum()) * (len(points) / len(rows))
    return ClusterSeparation(csi, len(points), radius, rows, cluster_of_row, is_noise, sizes, distances, nearest)


def fit_csi(reference: NDArray, settings: DetectionSettings) -> Callable[[NDArray, int], Measured]:
    """CSI as a `Statistic`: with the clusters behind it, and each response's cluster (-1: dropped noise)."""
    clustering: dict[str, Any] = {name: getattr(settings, name) for name in ("eps", "min_samples", "noise", "seed")}

    def measure(candidate: NDArray, num_resamples: int) -> Measured:
        found = separate_clusters(candidate, reference, **clustering)
        values: dict[str, Any] = {
            "csi": found.csi, "csi_normalized": found.normalized_csi, "noise_share": float(found.is_noise.mean()),
            "subsampled": found.subsampled,
        }  # fmt: skip
        if num_resamples:
            interval = csi_interval(candidate, reference, normalized=True, num_resamples=num_resamples, **clustering)
            values["csi_normalized_interval"] = [interval.low, interval.high]
        cluster: list[int | None] = [None] * len(candidate)  # of a row outside the subsample there is none
        for row, number in zip(found.rows.tolist(), found.cluster_of_row.tolist(), strict=True):
            cluster[row] = number
        return values, {"cluster": cluster}

    return measure


def auto_eps(reference: LatentArray, *, min_samples: int = 5, num_points: int | None = None, seed: int = 0) -> float:
    """A radius for DBSCAN from the reference: the one at which 90 % of its points would be core points.

    That is the 0.9 quantile of the k-distance curve: of the distance of each point to its ``min_samples``-th nearest
    one, itself counted. A candidate from the same policy, of the same size, then has about 10 % of noise and border.

    Args:
        reference: ``(M, K)``, at least ``min_samples`` of them.
        min_samples: as in :func:`cluster_separation_index`.
        num_points: draw this many of them, since distances to neighbours shrink with the number of points; ``None``
            for at most 5000.
        seed: of the draw.

    Raises:
        InputError: for bad latents, fewer than ``min_samples``, or so many equal ones that the radius would be 0.
    """
    check_integer("min_samples", min_samples)
    if num_points is not None:
        check_integer("num_points", num_points)
    points = check_latents("reference", reference)
    # Fewer than min_samples candidates still need a neighbour of that rank.
    part = points[subsample(len(points), max(num_points or 5000, min_samples), seed)].astype(np.float64)
    if len(part) < min_samples:
        raise InputError(
            f"reference: {len(part)} points have no distance to the {min_samples}-th nearest, which eps='auto' needs. "
            "Pass more of them, a smaller min_samples, or eps as a number."
        )
    distances = NearestNeighbors(n_neighbors=min_samples).fit(part).kneighbors(part)[0][:, -1]
    radius = float(np.quantile(distances, AUTO_EPS_QUANTILE, method="higher"))
    if radius == 0:
        raise InputError(
            f"eps: 'auto' would be 0, because most reference points equal {min_samples} others or more, themselves "
            "counted. Pass eps as a number above 0, or a larger min_samples."
        )
    return radius


def _nearest(points: NDArray, reference: NDArray) -> tuple[NDArray, NDArray]:
    """Distance ``(P,)`` of each point to its nearest reference latent, 0 if it is one, and that one's row ``(P,)``."""
    block_rows = rows_in_a_block(reference)
    distances, rows = np.full(len(points), np.inf), np.zeros(len(points), dtype=np.int64)
    # scikit-learn takes ||a||^2 - 2 a.b + ||b||^2, which cancels badly far from the origin.
    center = reference[:block_rows].mean(axis=0, dtype=np.float64)
    for first in range(0, len(points), block_rows):
        part = slice(first, first + block_rows)
        shifted = points[part] - center
        for start in range(0, len(reference), block_rows):
            block = reference[start : start + block_rows] - center
            places, found = pairwise_distances_argmin_min(shifted, block)
            closer = found < distances[part]
            distances[part][closer], rows[part][closer] = found[closer], start + places[closer]
        difference = points[part].astype(np.float64) - reference[rows[part]]
        distances[part] = np.sqrt(np.square(difference).sum(axis=1))
    return distances, rows


def csi_interval(
    candidate: LatentArray,
    reference: LatentArray,
    *,
    eps: float | str = 0.5,
    min_samples: int = 5,
    noise: str = "cluster",
    normalized: bool = False,
    num_resamples: int = 200,
    max_points: int = 2000,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of CSI: candidate latents are drawn again with replacement and clustered anew.

    The reference and the radius stay. Above ``max_points`` candidates the estimate and its interval are those of a
    random subsample of that size (CSI scaled to all N): wider than all points would give by about
    ``sqrt(N / max_points)``. Percentiles of the resamples: a point drawn twice makes its neighbourhood denser, so that
    near an ``eps`` at which clusters fall apart the interval may miss the estimate.

    Args:
        candidate: ``(N, K)``; with one point the interval has width 0.
        reference: ``(M, K)``.
        eps: as in :func:`cluster_separation_index`, like the next three.
        min_samples: of DBSCAN.
        noise: policy.
        normalized: divide by N.
        num_resamples: how often to draw; 200 of 2000 points take half a minute.
        max_points: most points to draw from.
        seed: of the subsample and of all draws.
    """
    points, others = check_both(candidate, reference)
    check_integer("num_resamples", num_resamples)
    check_integer("max_points", max_points)
    rows = subsample(len(points), max_points, seed)
    radius = _check_clustering(eps, min_samples, noise, others, len(rows), seed)
    part = points[rows].astype(np.float64)
    own = _nearest(part, others)[0] if noise == "singletons" else np.zeros(len(part))
    rng = np.random.default_rng([seed % 2**64, 1])
    counts = [np.ones(len(part), dtype=np.int64)]
    counts += [np.bincount(rng.integers(len(part), size=len(part)), minlength=len(part)) for _ in range(num_resamples)]
    alone, sizes, centroids = [], [], []
    for count in counts:
        drawn = count > 0
        # A point drawn twice is two points: DBSCAN and the centroids take the count as a weight. Singletons have the
        # same distance in each resample; only the clusters' centroids are searched for.
        _, is_noise, size, centroid = _cluster(
            part[drawn], radius, min_samples, "cluster" if noise == "cluster" else "drop", count[drawn]
        )
        alone.append(float((own[drawn] * count[drawn])[is_noise].sum()))
        sizes.append(size)
        centroids.append(centroid)
    distances = np.concatenate(sizes) * _nearest(np.concatenate(centroids), others)[0]
    sums = [part.sum() for part in np.split(distances, np.cumsum([len(size) for size in sizes])[:-1])]
    values = (np.array(alone) + sums) / len(part) * (1 if normalized else len(points))
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Interval(float(values[0]), float(low), float(high), len(part), num_resamples)


def _cluster(
    points: NDArray, eps: float, min_samples: int, noise: str, weights: NDArray | None = None
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Cluster of each point (-1: none), whether it is noise, and sizes ``(C,)`` and centroids ``(C, K)``."""
    weights = np.ones(len(points), dtype=np.int64) if weights is None else weights
    clusters = DBSCAN(eps=eps, min_samples=min_samples).fit(points, sample_weight=weights).labels_.astype(np.int64)
    is_noise = clusters == -1
    found = int(clusters.max()) + 1
    if noise == "cluster":
        clusters[is_noise] = found
    elif noise == "singletons":
        clusters[is_noise] = found + np.arange(is_noise.sum())
    number = int(clusters.max()) + 1
    kept = clusters >= 0
    sizes = np.bincount(clusters[kept], weights=weights[kept], minlength=number).astype(np.int64)
    sums = np.zeros((number, points.shape[1]))
    np.add.at(sums, clusters[kept], points[kept] * weights[kept, None])
    return clusters, is_noise, sizes, sums / sizes[:, None]


def _check_clustering(
    eps: float | str, min_samples: int, noise: str, reference: NDArray, num_points: int, seed: int
) -> float:
    """The radius; refuses wrong arguments."""
    check_integer("min_samples", min_samples)
    if noise not in NOISE_POLICIES:
        raise InputError(f"noise: {noise!r}; expected one of {', '.join(NOISE_POLICIES)}.")
    if eps == "auto":
        return auto_eps(reference, min_samples=min_samples, num_points=num_points, seed=seed)
    if isinstance(eps, bool | str) or not 0 < eps < math.inf:
        raise InputError(f"eps: {eps!r}; expected a distance above 0, or 'auto'.")
    return float(eps)
