"""Distances to nearest neighbours against brute force, and what the statistic made of them finds and does not."""

import numpy as np
import pytest

from inform_rm.errors import InputError
from inform_rm.eval.detection.nearest_neighbours import fit_nearest_neighbours, neighbour_distances
from inform_rm.eval.detection.settings import DetectionSettings


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def by_brute_force(candidate, reference, number, leave_out):
    distances = np.linalg.norm(candidate[:, None] - reference[None], axis=2)
    if leave_out:
        np.fill_diagonal(distances, np.inf)
    return np.sort(distances, axis=1)[:, :number].mean(axis=1)


@pytest.mark.parametrize("offset", (0.0, 1e6))
def test_distances_and_outliers_are_those_of_brute_force(offset):
    reference, candidate = normal(0, 60, 4) + offset, 1.5 * normal(1, 25, 4) + offset
    expected = by_brute_force(candidate, reference, 3, False)
    np.testing.assert_allclose(neighbour_distances(candidate, reference, 3), expected, rtol=1e-7)
    own = by_brute_force(reference, reference, 5, True)
    np.testing.assert_allclose(neighbour_distances(None, reference), own, rtol=1e-7)
    measure = fit_nearest_neighbours(reference, DetectionSettings(alpha=0.1))
    values, columns = measure(candidate, 0)
    expected = by_brute_force(candidate, reference, 5, False)
    np.testing.assert_allclose(columns["knn_distance"], expected, rtol=1e-7)
    # Of 60 sorted distances the 0.9 quantile lies at place 0.9 * 59 = 53.1; the next one that there is, is number 54.
    assert values["knn_outliers"] == np.mean(expected > np.sort(own)[54]) > 0
    assert values["mean_knn_distance"] == pytest.approx(expected.mean())
    # Of itself as much as the quantile leaves, because no point is its own neighbour.
    assert measure(reference, 0)[0]["knn_outliers"] == 5 / 60


def test_false_alarms_are_alpha_also_between_clouds_whose_middle_is_far_from_all():
    clouds = np.array([[-20.0, 0, 0], [20.0, 0, 0]])
    shares, between = [], []
    for seed in range(20):
        reference, candidate = (normal([seed, part], 400, 3) + np.repeat(clouds, 200, axis=0) for part in (0, 1))
        measure = fit_nearest_neighbours(reference, DetectionSettings(alpha=0.05))
        shares.append(measure(candidate, 0)[0]["knn_outliers"])
        between.append(measure(normal([seed, 2], 50, 3), 0)[0]["knn_outliers"])
    # Each share varies by about sqrt(2 * 0.05 * 0.95 / 400) = 0.015, their mean by a twentieth root of that.
    assert np.mean(shares) == pytest.approx(0.05, abs=4.5 * 0.015 / np.sqrt(20))
    assert between == [1.0] * 20


def test_a_candidate_of_other_dimensions_is_refused():
    with pytest.raises(InputError, match="candidate: 3 latent dimensions"):
        neighbour_distances(normal(0, 5, 3), normal(0, 9, 2))
