"""What is measured of candidate latents: the list that `detect`, its report and the check for TRL loop over."""

from collections.abc import Callable
from dataclasses import dataclass

from numpy.typing import NDArray

from inform_rm.eval.detection.clusters import fit_csi
from inform_rm.eval.detection.latent_arrays import Measured
from inform_rm.eval.detection.nearest_neighbours import fit_nearest_neighbours
from inform_rm.eval.detection.outliers import fit_mop
from inform_rm.eval.detection.settings import DetectionSettings


@dataclass(frozen=True)
class Statistic:
    """One number that says how far candidate latents lie from a reference; large for an exploited reward model.

    Attributes:
        name: its key in a result, beside which stand ``NAME_interval`` and ``NAME_null_rank``.
        title: what tables and plots call it.
        meaning: what it is, for readers of the page.
        outlier: its column that says of each response whether it is one of the outliers (``None``: not measured).
        fit: of reference ``(M, K)`` and settings; gives a function of candidate ``(N, K)`` and a number of bootstrap
            resamples (0: without an interval that would need them). That gives the values by their keys, the
            statistic's own and its interval among them, and columns with one entry a response.
    """

    name: str
    title: str
    meaning: str
    outlier: str
    fit: Callable[[NDArray, DetectionSettings], Callable[[NDArray, int], Measured]]


STATISTICS = (
    Statistic(
        "csi_normalized",
        "CSI per response",
        "distance of a response's cluster from the reference",
        "csi_outlier",
        fit_csi,
    ),
    Statistic("mop", "MOP", "share of responses beyond chance by Mahalanobis distance", "mop_outlier", fit_mop),
    Statistic(
        "knn_outliers",
        "kNN outliers",
        "share beyond chance by distance to neighbours",
        "knn_outlier",
        fit_nearest_neighbours,
    ),
)
