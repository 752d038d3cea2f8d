"""Outliers by nearest neighbours, which need neither clusters nor a covariance: separate clouds are no harder."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from inform_rm.eval.detection.latent_arrays import LatentArray, Measured, check_both, check_latents
from inform_rm.eval.detection.settings import DetectionSettings
from inform_rm.util.intervals import wilson_interval

NUM_NEIGHBOURS = 5


def neighbour_distances(
    candidate: LatentArray | None, reference: LatentArray, num_neighbours: int = NUM_NEIGHBOURS
) -> NDArray:
    """``(N,)`` mean Euclidean distance of each candidate latent to its k nearest reference latents.

    Ramaswamy et al. 2000 and Sun et al. 2022 (arXiv:2204.06507) take the distance to the k-th; their mean moves less
    with the draw of the reference. Nothing is normalized: the unit is that of the latents, as for CSI.

    A candidate of ``None`` is the reference itself, each point left out of its own neighbours. `InputError` for bad
    latents.

    Example:
        >>> neighbour_distances(np.array([[0.0], [9.0]]), np.array([[1.0], [2.0], [4.0]]), 2).tolist()
        [1.5, 6.0]
    """
    others = check_latents("reference", reference)
    points = None if candidate is None else check_both(candidate, others)[0]
    center = others.mean(axis=0, dtype=np.float64)  # far from the origin, scikit-learn's squares cancel
    model = NearestNeighbors(n_neighbors=num_neighbours).fit(others - center)
    found: NDArray = model.kneighbors(None if points is None else points - center)[0].mean(axis=1)
    return found


def fit_nearest_neighbours(reference: NDArray, settings: DetectionSettings) -> Callable[[NDArray, int], Measured]:
    """A `Statistic`: the share of candidates farther from the reference than nearly all of it is from itself.

    An outlier's `neighbour_distances` is above the 1 - alpha quantile of the reference's own; of fewer than 1/alpha
    reference latents that is the largest.
    """
    own = neighbour_distances(None, reference)
    limit = np.quantile(own, 1 - settings.alpha, method="higher")

    def measure(candidate: NDArray, num_resamples: int) -> Measured:
        # Against itself, a reference latent is not its own neighbour.
        distances = own if candidate is reference else neighbour_distances(candidate, reference)
        is_far = distances > limit
        values = {
            "knn_outliers": float(is_far.mean()),
            "knn_outliers_interval": list(wilson_interval(int(is_far.sum()), len(is_far))),
            "mean_knn_distance": float(distances.mean()),
        }
        return values, {"knn_distance": distances.tolist(), "knn_outlier": is_far.tolist()}

    return measure
