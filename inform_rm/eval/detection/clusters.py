"""Cluster separation (CSI): how far the clusters of a policy's latents lie from a reference's.

The *reference* is a set of latents of responses that the reward model can judge (of the SFT policy, say), the
*candidate* a set of latents of the policy under test. N counts candidate and M reference latents, K latent dimensions;
distances are in the unit of the latents. Latents are arrays or tensors of any real type, one row a response;
everything is computed on the CPU in float64, and nothing carries a gradient.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import DBSCAN
from sklearn.metrics import pairwise_distances_argmin
from sklearn.neighbors import NearestNeighbors

from inform_rm.errors import InputError
from inform_rm.eval.detection.latent_arrays import LatentArray, Measured, check_both, check_latents, subsample
from inform_rm.eval.detection.settings import DetectionSettings

AUTO_EPS_QUANTILE = 0.9
MOST_CLUSTERED = 5000  # DBSCAN may list all pairs of points: 0.7 GB for so many
MOST_RESAMPLED = 2000  # 200 resamples of so many take half a minute


def cluster_separation_index(
    candidate: LatentArray,
    reference: LatentArray,
    *,
    eps: float | str = 0.5,
    min_samples: int = 5,
    noise: str = "cluster",
    normalized: bool = False,
    seed: int = 0,
) -> float:
    """CSI: DBSCAN the candidate latents; ``sum_i |C_i| * min_s ||centroid_i - s||`` over reference latents s.

    Equations 6 to 8 and Algorithm 3 of arXiv:2402.09345. The value is no distance from 0: a cluster as wide as the
    reference has its centroid in the middle, and in many dimensions no point lies near there. Compare it with
    :func:`inform_rm.eval.detection.outliers.split_half_null` or with earlier steps. Nor is it 0 for a candidate equal
    to the reference, unless each cluster's centroid is a reference latent, as with singletons or equal points.

    Of more than 5000 candidates a random part of that size is clustered, and CSI scaled up. A part is less dense:
    with the same ``eps`` more of it is noise.

    Args:
        candidate: ``(N, K)`` latents of the policy under test, at least one.
        reference: ``(M, K)`` latents to compare with, at least one.
        eps: radius of DBSCAN. 0.5 is scikit-learn's default; in 128 dimensions of unit variance it makes every point
            noise. ``"auto"``: :func:`auto_eps` of as many reference latents as candidate ones are clustered.
        min_samples: points within ``eps``, itself among them, that make a core point.
        noise: what becomes of DBSCAN's noise: ``"cluster"``: it is one cluster, as in the pseudocode, where the label
            -1 is a label like the others; ``"singletons"``: each point is one; ``"drop"``: it adds nothing.
        normalized: divide by N (dropped points count).
        seed: of the random part and of the draw for ``"auto"``.

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
    settings = DetectionSettings(eps=eps, min_samples=min_samples, noise=noise, seed=seed)
    values, _ = fit_csi(reference, settings)(candidate, 0)
    return values["csi_normalized" if normalized else "csi"]


def fit_csi(reference: LatentArray, settings: DetectionSettings) -> Callable[[LatentArray, int], Measured]:
    """CSI as a `Statistic`: with the number of each response's cluster (-1: dropped noise; none: not clustered).

    Beside it ``csi_distance``, how far the centroid of that cluster lies from the reference: what the response adds to
    CSI. Which of them are outliers, what comes by chance decides (`inform_rm.eval.detection.detect`).

    Warns where ``noise="drop"`` leaves nothing: the sum over no clusters, 0, then says nothing about the policy.
    """

    def measure(candidate: LatentArray, num_resamples: int) -> Measured:
        points, others = check_both(candidate, reference)
        rows = subsample(points, MOST_CLUSTERED, settings.seed)
        eps = _radius(settings, others, len(rows))
        cluster_of_row, is_noise, sizes, centroids = _cluster(points[rows].astype(np.float64), eps, settings)
        if not len(sizes):
            warnings.warn(
                f"all {len(rows)} points are DBSCAN noise at eps {eps:g}, and noise='drop' leaves a CSI of 0 that "
                "says nothing. Pass a larger eps, eps='auto' or another noise policy.",
                stacklevel=3,
            )
        distances = _nearest(centroids, others)
        normalized = float(sizes @ distances) / len(rows)
        values: dict[str, Any] = {
            "csi": normalized * len(points), "csi_normalized": normalized, "noise_share": float(is_noise.mean()),
            "subsampled": len(rows) < len(points),
        }  # fmt: skip
        if num_resamples:
            values["csi_normalized_interval"] = csi_interval(points, others, settings, num_resamples)
        cluster: list[int | None] = [None] * len(points)
        distance: list[float | None] = [None] * len(points)
        for row, number in zip(rows.tolist(), cluster_of_row.tolist(), strict=True):
            cluster[row] = number
            distance[row] = None if number < 0 else float(distances[number])
        return values, {"cluster": cluster, "csi_distance": distance}

    return measure


def csi_interval(
    candidate: NDArray, reference: NDArray, settings: DetectionSettings, num_resamples: int
) -> list[float]:
    """``[low, high]``: 95 % bootstrap interval of CSI / N; candidates are drawn again and clustered anew.

    The reference and the radius stay. Of more than 2000 candidates the interval is that of a random part of that
    size: wider than all points would give by about ``sqrt(N / 2000)``. Percentiles of the resamples: a point drawn
    twice makes its neighbourhood denser, so that near an ``eps`` at which clusters fall apart the interval may miss
    the estimate.
    """
    part = candidate[subsample(candidate, MOST_RESAMPLED, settings.seed)].astype(np.float64)
    eps = _radius(settings, reference, len(part))
    rng = np.random.default_rng([settings.seed, 1])
    values = []
    for _ in range(num_resamples):
        counts = np.bincount(rng.integers(len(part), size=len(part)), minlength=len(part))
        drawn = counts > 0
        # A point drawn twice is two points: DBSCAN and the centroids take the count as a weight.
        _, _, sizes, centroids = _cluster(part[drawn], eps, settings, counts[drawn])
        values.append(float(sizes @ _nearest(centroids, reference)) / len(part))
    return np.quantile(values, [0.025, 0.975]).tolist()


def auto_eps(reference: LatentArray, *, min_samples: int = 5, num_points: int | None = None, seed: int = 0) -> float:
    """A radius for DBSCAN from the reference: the one at which 90 % of its points would be core points.

    That is the 0.9 quantile of the distance of each point to its ``min_samples``-th nearest one, itself counted. A
    candidate from the same policy, of the same size, then has about 10 % of noise and border. ``num_points`` are
    drawn, since distances shrink with their number; ``None``: at most 5000. `InputError` for fewer than
    ``min_samples``, or so many equal ones that the radius would be 0.
    """
    points = check_latents("reference", reference)
    # Fewer than min_samples candidates still need a neighbour of that rank.
    part = points[subsample(points, max(num_points or MOST_CLUSTERED, min_samples), seed)].astype(np.float64)
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


def _radius(settings: DetectionSettings, reference: NDArray, num_points: int) -> float:
    if settings.eps == "auto":
        return auto_eps(reference, min_samples=settings.min_samples, num_points=num_points, seed=settings.seed)
    return float(settings.eps)


def _nearest(points: NDArray, reference: NDArray) -> NDArray:
    """Distance ``(P,)`` of each point to its nearest reference latent, 0 if it is one."""
    if not len(points):
        return np.empty(0)
    # scikit-learn takes ||a||^2 - 2 a.b + ||b||^2, which cancels badly far from the origin.
    center = reference.mean(axis=0, dtype=np.float64)
    rows = pairwise_distances_argmin(points - center, reference - center)
    return np.linalg.norm(points - reference[rows], axis=1)


def _cluster(
    points: NDArray, eps: float, settings: DetectionSettings, weights: NDArray | None = None
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Cluster of each point (-1: none), whether it is noise, and sizes ``(C,)`` and centroids ``(C, K)``."""
    weights = np.ones(len(points)) if weights is None else weights
    dbscan = DBSCAN(eps=eps, min_samples=settings.min_samples)
    clusters = dbscan.fit(points, sample_weight=weights).labels_.astype(np.int64)
    is_noise = clusters == -1
    found = int(clusters.max()) + 1
    if settings.noise == "cluster":
        clusters[is_noise] = found
    elif settings.noise == "singletons":
        clusters[is_noise] = found + np.arange(is_noise.sum())
    kept = clusters >= 0
    sizes = np.bincount(clusters[kept], weights=weights[kept])
    sums = np.zeros((len(sizes), points.shape[1]))
    np.add.at(sums, clusters[kept], points[kept] * weights[kept, None])
    return clusters, is_noise, sizes, sums / sizes[:, None]
