"""Settings of `inform_rm.detect`; the command line makes its flags of them. Imports nothing heavy."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from inform_rm.errors import InputError
from inform_rm.eval.detection.early_stopping import CSIEarlyStopping, RewardFallStopping
from inform_rm.util.settings import check_settings, setting

NOISE_POLICIES = ("cluster", "singletons", "drop")
TAILS = ("reference", "chi2")


@dataclass(frozen=True)
class DetectionSettings:
    """How latents of candidates are compared with those of a reference.

    Attributes:
        columns: which columns are prompt, response, system and history: see `inform_rm.data.columns.Columns.of`.
        eps: see `inform_rm.eval.detection.clusters.cluster_separation_index`, like the next two; ``"auto"`` takes one
            radius from the reference, for all candidates and the null.
        min_samples: of DBSCAN.
        noise: of DBSCAN.
        alpha: tail probability below which a response is an outlier.
        tail: see `inform_rm.eval.detection.outliers.MahalanobisReference.tail_probabilities`.
        max_change_ratio: of `inform_rm.eval.detection.early_stopping.CSIEarlyStopping`, applied to the normalized CSI
            over the candidates in order.
        max_reward_fall: of `inform_rm.eval.detection.early_stopping.RewardFallStopping`, applied to the mean reward of
            the reference and the candidates in order.
        max_responses: use a random subset of this many responses of each set.
        on_bad_row: ``"error"`` or ``"skip"``. All rows in use are checked before the first is scored.
        num_outliers: outliers of each candidate that the result names, the farthest first.
        num_splits: splits of the reference that show what comes by chance.
        num_resamples: bootstrap resamples for intervals that have no closed form.
        map_points: most points of each set on the map.
        seed: of subsets, splits, resamples and the map.
    """

    columns: Mapping[str, str] | None = setting(None)
    eps: float | str = setting("auto", "radius of DBSCAN, or 'auto'")
    min_samples: int = setting(5, "of DBSCAN", least=1)
    noise: str = setting("cluster", "what DBSCAN's noise counts as", choices=NOISE_POLICIES)
    alpha: float = setting(0.01, "tail probability below which a response is an outlier")
    tail: str = setting(
        "reference", "distribution of distances: the reference's own, or the paper's chi-square", choices=TAILS
    )
    max_change_ratio: float = setting(10.0, "of the paper's stopping rule for CSI, for several files")
    max_reward_fall: float = setting(0.05, "share of its gain that the mean reward may lose, for several files")
    max_responses: int | None = setting(None, "use a seeded random subset of each file", least=1)
    on_bad_row: str = setting(
        "error", "stop at a row that cannot be scored, or leave it out, count and list it", choices=("error", "skip")
    )
    num_outliers: int = setting(20, least=0)
    num_splits: int = setting(100, least=1)
    num_resamples: int = setting(100, least=1)
    map_points: int = setting(600, least=10)
    seed: int = setting(0, "seed of all random choices", least=0)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.eps != "auto" and (isinstance(self.eps, bool | str) or not 0 < self.eps < math.inf):
            raise InputError(f"eps: {self.eps!r}; expected a distance above 0, or 'auto'.")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 < self.alpha < 1:
            raise InputError(f"alpha: {self.alpha!r}; it is a probability, above 0 and below 1 (default 0.01).")
        CSIEarlyStopping(self.max_change_ratio)  # refuses a wrong ratio
        RewardFallStopping(self.max_reward_fall)
