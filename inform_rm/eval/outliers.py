"""The outlier statistics under the names by which other code imports them; they live in `inform_rm.eval.detection`."""

from inform_rm.eval.detection.clusters import cluster_separation_index
from inform_rm.eval.detection.outliers import mahalanobis_outlier_probability

__all__ = ["cluster_separation_index", "mahalanobis_outlier_probability"]
