"""CSI against the pseudocode, Mahalanobis distances against numpy, and how often both raise a false alarm."""

import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, chi2, kstest
from sklearn.covariance import LedoitWolf

from inform_rm.errors import InputError
from inform_rm.eval.detection import clusters, latent_arrays
from inform_rm.eval.detection.outliers import (
    auto_eps,
    csi_interval,
    fit_mahalanobis,
    null_rank,
    separate_clusters,
    split_half_null,
    squared_mahalanobis,
)
from inform_rm.eval.outliers import (  # where they are promised
    cluster_separation_index,
    mahalanobis_outlier_probability,
)

quick = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**32 - 1)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def distance(a, b):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def naive_dbscan(points, eps, min_samples):
    """Ester et al. 1996: clusters grow from core points in order; -1 for noise."""
    near = [[j for j, b in enumerate(points) if distance(a, b) <= eps] for a in points]
    labels, cluster = [-1] * len(points), -1
    for start in range(len(points)):
        if labels[start] != -1 or len(near[start]) < min_samples:
            continue
        cluster += 1
        labels[start], queue = cluster, [start]
        while queue:
            point = queue.pop()
            if len(near[point]) >= min_samples:
                fresh = [j for j in near[point] if labels[j] == -1]
                for j in fresh:
                    labels[j] = cluster
                queue += fresh
    return labels


def naive_csi(candidate, reference, eps, min_samples, noise):
    """Algorithm 3 of arXiv:2402.09345, with the three treatments of the label -1."""
    labels = naive_dbscan(candidate, eps, min_samples)
    groups = [[p for p, label in zip(candidate, labels, strict=True) if label == c] for c in range(max(labels) + 1)]
    left = [p for p, label in zip(candidate, labels, strict=True) if label == -1]
    if noise == "cluster" and left:
        groups.append(left)
    elif noise == "singletons":
        groups += [[p] for p in left]
    total = 0.0
    for group in groups:
        centroid = [sum(column) / len(group) for column in zip(*group, strict=True)]
        total += len(group) * min(distance(centroid, s) for s in reference)
    return total


@st.composite
def latent_sets(draw):
    """Blobs, a grid with many equal points, or scattered ones; from one candidate and one reference point on."""
    rng = np.random.default_rng(draw(seeds))
    sizes = draw(st.integers(1, 40)), draw(st.integers(1, 20))
    latent_dim = draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["blobs", "grid", "scattered"]))
    if kind == "grid":
        return tuple(rng.integers(0, 3, size=(size, latent_dim)).astype(float) for size in sizes)
    if kind == "scattered":
        return tuple(100 * rng.normal(size=(size, latent_dim)) for size in sizes)
    centers = 4 * rng.normal(size=(3, latent_dim))
    return tuple(centers[rng.integers(3, size=size)] + 0.3 * rng.normal(size=(size, latent_dim)) for size in sizes)


# ---- CSI -----------------------------------------------------------------------------------------------------------


@quick
@given(
    sets=latent_sets(),
    eps=st.sampled_from([0.3, 0.5, 1.2, 8.0]),
    min_samples=st.integers(1, 6),
    noise=st.sampled_from(clusters.NOISE_POLICIES),
)
@pytest.mark.filterwarnings("ignore:all .* points are DBSCAN noise")
def test_csi_is_that_of_the_pseudocode(sets, eps, min_samples, noise):
    candidate, reference = sets
    expected = naive_csi(candidate.tolist(), reference.tolist(), eps, min_samples, noise)
    call = partial(cluster_separation_index, eps=eps, min_samples=min_samples, noise=noise)
    assert call(candidate, reference) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert call(candidate, reference, normalized=True) == pytest.approx(expected / len(candidate), rel=1e-9, abs=1e-9)
    assert call(torch.from_numpy(candidate), torch.from_numpy(reference)) == call(candidate, reference)


def test_noise_is_one_cluster_singletons_or_nothing():
    reference = np.array([[0.0], [10.0]])
    candidate = np.array([[0.0], [0.1], [0.2], [4.0], [8.0]])  # one cluster of three; 4 and 8 are noise
    csi = {
        noise: cluster_separation_index(candidate, reference, min_samples=3, noise=noise)
        for noise in clusters.NOISE_POLICIES
    }
    assert csi["drop"] == pytest.approx(3 * 0.1)
    assert csi["singletons"] == pytest.approx(3 * 0.1 + 4 + 2)
    assert csi["cluster"] == pytest.approx(3 * 0.1 + 2 * 4)  # the centroid, 6, lies 4 from 10


def test_one_point_alone_is_noise():
    for noise, expected in (("cluster", 5.0), ("singletons", 5.0)):
        assert cluster_separation_index([[3.0, 4.0]], np.zeros((1, 2)), noise=noise) == 5.0 == expected
    assert cluster_separation_index([[3.0, 4.0]], np.zeros((1, 2)), noise="cluster", min_samples=1) == 5.0
    with pytest.warns(UserWarning, match="all 1 points are DBSCAN noise at eps 0.5"):
        assert cluster_separation_index([[3.0, 4.0]], np.zeros((1, 2)), noise="drop") == 0.0


def test_a_candidate_equal_to_the_reference_has_csi_0_where_centroids_are_reference_points():
    spread = 100 * normal(0, 30, 3)
    assert cluster_separation_index(spread, spread, noise="singletons") == 0.0
    equal = np.repeat(spread, 8, axis=0)  # 30 clusters of equal points
    assert cluster_separation_index(equal, equal) == pytest.approx(0.0, abs=1e-9)
    # Not in general: the centroid of a square is none of its corners.
    square = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    assert cluster_separation_index(square, square) == pytest.approx(4 * math.sqrt(0.5))


@quick
@given(sets=latent_sets(), noise=st.sampled_from(("cluster", "singletons")))
def test_clusters_name_the_points_behind_the_value(sets, noise):
    candidate, reference = sets
    result = separate_clusters(candidate, reference, noise=noise, min_samples=3)
    assert not result.subsampled
    assert result.rows.tolist() == list(range(len(candidate)))
    assert np.bincount(result.cluster_of_row, minlength=len(result.sizes)).tolist() == result.sizes.tolist()
    assert result.is_noise.tolist() == [label == -1 for label in naive_dbscan(candidate.tolist(), 0.5, 3)]
    assert result.point_distances.sum() == pytest.approx(result.csi)
    for cluster, (found, row) in enumerate(zip(result.centroid_distances, result.nearest_reference_rows, strict=True)):
        centroid = candidate[result.cluster_of_row == cluster].mean(axis=0)
        distances = np.linalg.norm(reference - centroid, axis=1)
        assert found == pytest.approx(distances.min(), abs=1e-9) == pytest.approx(distances[row], abs=1e-9)


@pytest.mark.filterwarnings("ignore:all .* points are DBSCAN noise")
def test_dropped_noise_is_in_no_cluster():
    result = separate_clusters(100 * normal(0, 20, 2), normal(1, 20, 2), noise="drop")
    assert len(result.sizes) == 0 and result.csi == result.normalized_csi == 0
    assert result.is_noise.all() and (result.cluster_of_row == -1).all() and np.isnan(result.point_distances).all()


@pytest.mark.parametrize("offset", (0.0, 1e6))
def test_blocks_do_not_change_the_result(monkeypatch, offset):
    candidate, reference = 100 * normal(0, 15, 4) + offset, 100 * normal(1, 24, 4) + offset
    candidate[7] = reference[20]
    plain = np.linalg.norm(candidate[:, None] - reference[None], axis=2)
    for elements in (4, 28, 2**23):
        monkeypatch.setattr(latent_arrays, "_BLOCK_ELEMENTS", elements)  # blocks of 1, 7 and all rows
        result = separate_clusters(candidate, reference, noise="singletons")
        np.testing.assert_allclose(result.centroid_distances, plain.min(axis=1), rtol=1e-9)
        assert result.nearest_reference_rows.tolist() == plain.argmin(axis=1).tolist()
        assert result.centroid_distances[7] == 0
        squares = squared_mahalanobis(candidate, reference)
        np.testing.assert_allclose(squares, LedoitWolf().fit(reference).mahalanobis(candidate), rtol=1e-6)


def test_a_subsample_is_reported_seeded_and_scaled_up():
    candidate, reference = normal(0, 600, 3), normal(1, 50, 3) + 5
    call = partial(separate_clusters, candidate, reference, eps=2.0)
    whole, part = call(), call(max_cluster_points=200)
    assert part.subsampled and not whole.subsampled
    assert part.num_points == 600 and len(part.rows) == part.sizes.sum() == 200
    assert np.array_equal(part.rows, call(max_cluster_points=200).rows)
    assert not np.array_equal(part.rows, call(max_cluster_points=200, seed=1).rows)
    chosen = separate_clusters(candidate[part.rows], reference, eps=2.0)
    assert part.csi == pytest.approx(3 * chosen.csi)
    assert part.normalized_csi == pytest.approx(chosen.normalized_csi)
    assert part.csi == pytest.approx(whole.csi, rel=0.1)


def test_auto_eps_makes_nine_in_ten_reference_points_core_points():
    reference = normal(0, 300, 16)
    eps = auto_eps(reference, min_samples=5)
    plain = np.linalg.norm(reference[:, None] - reference[None], axis=2)
    core = (plain <= eps * (1 + 1e-9)).sum(axis=1) >= 5
    assert core.mean() == pytest.approx(0.9, abs=0.005)
    assert np.isclose(np.sort(plain, axis=1)[:, 4], eps, rtol=1e-9).any()  # the distance of one of them
    assert auto_eps(7 * reference) == pytest.approx(7 * eps)
    # The candidate's size decides how many reference points the curve is made of.
    result = separate_clusters(normal(1, 100, 16), reference, eps="auto", seed=3)
    assert result.eps == auto_eps(reference, num_points=100, seed=3) > eps
    assert 0 < result.is_noise.mean() < 0.25
    assert separate_clusters(normal(1, 300, 16), reference, eps="auto").eps == eps


def test_bootstrap_interval_of_csi():
    candidate, reference = normal(0, 80, 8), normal(1, 80, 8) + 2
    for noise in clusters.NOISE_POLICIES:
        call = partial(csi_interval, candidate, reference, eps=3.0, noise=noise, num_resamples=25)
        result = call()
        assert result.estimate == pytest.approx(cluster_separation_index(candidate, reference, eps=3.0, noise=noise))
        assert result.low < result.estimate < result.high
        assert call() == result != call(seed=1)
        each = call(normalized=True)
        assert each.low * 80 == pytest.approx(result.low) and each.high * 80 == pytest.approx(result.high)
        part = call(max_points=15)
        assert (part.num_points, part.num_resamples) == (15, 25)
        assert part.high - part.low > result.high - result.low


def test_bootstrap_counts_a_point_drawn_twice_as_two():
    # Far from each other and from all else, each place is a cluster of equal points: the resampled CSI is
    # the sum of counts times distances, 0 at one place and 1 at the other. Binomial(40, 1/2) has quantiles 14 and 26.
    candidate = np.repeat([[0.0, 0.0], [9.0, 1.0]], 20, axis=0)
    result = csi_interval(candidate, np.array([[0.0, 0.0], [9.0, 0.0]]), num_resamples=150)
    assert result.estimate == pytest.approx(20)
    assert result.low == pytest.approx(binom.ppf(0.025, 40, 0.5), abs=1.5)
    assert result.high == pytest.approx(binom.ppf(0.975, 40, 0.5), abs=1.5)
    one = csi_interval([[3.0, 4.0]], np.zeros((1, 2)), num_resamples=5)
    assert (one.low, one.estimate, one.high) == (5.0, 5.0, 5.0)


# ---- Mahalanobis ---------------------------------------------------------------------------------------------------


def correlated(seed, number, latent_dim=6):
    return normal(seed, number, latent_dim) @ normal(99, latent_dim, latent_dim) + 3


@pytest.mark.parametrize("number", (4, 200))
def test_distances_are_those_of_numpy_with_the_same_covariance(number):
    reference, candidate = correlated(0, max(number, 10), 20), correlated(1, 30, 20)
    model = LedoitWolf().fit(reference)
    difference = candidate - reference.mean(axis=0)
    expected = np.einsum("ni,ij,nj->n", difference, np.linalg.inv(model.covariance_), difference)
    fitted = fit_mahalanobis(reference)
    np.testing.assert_allclose(fitted.squared_distances(candidate), expected, rtol=1e-8)
    np.testing.assert_allclose(squared_mahalanobis(candidate, reference), expected, rtol=1e-8)
    np.testing.assert_allclose(fitted.distances(candidate) ** 2, expected, rtol=1e-8)
    assert fitted.shrinkage == pytest.approx(model.shrinkage_)
    if len(reference) > 20:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_allclose(fitted.tail_probabilities(expected), chi2.sf(expected, 20))


def test_tensors_in_give_tensors_and_the_same_numbers():
    reference, candidate = correlated(0, 100).astype(np.float32), correlated(1, 7).astype(np.float32)
    fitted = fit_mahalanobis(torch.from_numpy(reference))
    assert fitted.whitening.tolist() == fit_mahalanobis(reference).whitening.tolist()
    tensor = torch.from_numpy(candidate).requires_grad_()
    root = fitted.distances(tensor)
    assert isinstance(fitted.squared_distances(candidate), np.ndarray)
    assert isinstance(root, torch.Tensor) and root.dtype == torch.float64 and not root.requires_grad
    np.testing.assert_allclose(root, fitted.distances(candidate), rtol=1e-12)
    rounded = tensor.bfloat16()
    assert fitted.distances(rounded).tolist() == fitted.distances(rounded.float()).tolist() != root.tolist()
    np.testing.assert_array_equal(fitted.tail_probabilities(root**2), fitted.tail_probabilities(root.numpy() ** 2))


@quick
@given(seed=seeds, scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_shift_rotation_and_scale_of_both_change_nothing(seed, scale):
    reference, candidate = correlated(seed, 40), 2 * correlated(seed + 1, 15)
    rotation = np.linalg.qr(normal(seed + 2, 6, 6))[0]
    moved = [scale * (points @ rotation + normal(seed + 3, 6)) for points in (candidate, reference)]
    np.testing.assert_allclose(squared_mahalanobis(*moved), squared_mahalanobis(candidate, reference), rtol=1e-6)


def test_left_out_distances_are_those_of_a_fit_without_the_point():
    reference = correlated(0, 40)
    shrinkage = fit_mahalanobis(reference).shrinkage
    expected = []
    for row, point in enumerate(reference):
        others = np.delete(reference, row, axis=0)
        # The target keeps its size, up to the factor by which the covariance grows when a divisor of 40 becomes 39.
        target = np.trace(np.cov(reference.T, bias=True)) / 6 * np.eye(6) * 40 / 39
        covariance = (1 - shrinkage) * np.cov(others.T, bias=True) + shrinkage * target
        difference = point - others.mean(axis=0)
        expected.append(difference @ np.linalg.solve(covariance, difference))
    np.testing.assert_allclose(fit_mahalanobis(reference).left_out_distances, np.sort(expected), rtol=1e-8)


def test_rank_among_the_reference():
    fitted = fit_mahalanobis(correlated(0, 99))
    distances = fitted.left_out_distances
    ranks = fitted.tail_probabilities(np.array([0.0, distances[49], distances[-1], distances[-1] + 1]), "reference")
    assert ranks.tolist() == pytest.approx([1.0, 0.51, 0.02, 0.01])


def within_binomial(share, trials, probability, *, extra=0.0):
    """Within 4.5 standard errors, of which one part is the binomial's."""
    return abs(share - probability) <= 4.5 * math.sqrt(probability * (1 - probability) / trials + extra) + 1 / trials


@pytest.mark.parametrize("alpha", (0.01, 0.1))
def test_chi_square_false_alarms_are_alpha_for_equal_variances(alpha):
    candidate = normal(0, 20000, 16)
    share = mahalanobis_outlier_probability(candidate, 5 + normal(1, 3000, 16) - 5, alpha=alpha)
    assert within_binomial(share, 20000, alpha)
    assert mahalanobis_outlier_probability(candidate + 2, normal(1, 3000, 16), alpha=alpha) > 0.9


@pytest.mark.parametrize("spectrum", ("equal", "falling", "collapsed"))
@pytest.mark.parametrize("number", (60, 400))
def test_reference_tail_false_alarms_are_alpha_for_any_gaussian_and_fewer_points_than_dimensions(spectrum, number):
    scales = {"equal": np.ones(64), "falling": np.arange(1, 65) ** -0.5, "collapsed": np.r_[np.ones(8), [1e-3] * 56]}
    repeats, alpha, shares = 40, 0.05, []
    for repeat in range(repeats):
        reference = normal([repeat, 0], number, 64) * scales[spectrum]
        candidate = normal([repeat, 1], 500, 64) * scales[spectrum]
        shares.append(mahalanobis_outlier_probability(candidate, reference, alpha=alpha, tail="reference"))
    # Ranks are multiples of 1 / (number + 1); "below alpha" keeps these of them:
    expected = (math.ceil(alpha * (number + 1)) - 1) / (number + 1)
    # The reference's own draw moves each share by about alpha (1 - alpha) / number.
    assert within_binomial(np.mean(shares), 500 * repeats, expected, extra=alpha * (1 - alpha) / number / repeats)


def test_chi_square_tail_is_refused_or_warned_of_where_it_is_wrong():
    scales = np.arange(1, 65) ** -0.5
    candidate, reference = normal(0, 2000, 64) * scales, normal(1, 200, 64) * scales
    with pytest.warns(UserWarning, match="200 reference points in 64 dimensions"):
        share = mahalanobis_outlier_probability(candidate, reference)
    assert share > 0.05  # what the warning is about
    with pytest.raises(InputError, match=r"64 points in 64 dimensions .* Pass more than 64 .*tail='reference'"):
        mahalanobis_outlier_probability(candidate, reference[:64])
    assert np.isfinite(squared_mahalanobis(candidate, reference[:64])).all()


def test_outliers_are_counted_with_wilsons_interval():
    fitted = fit_mahalanobis(normal(0, 500, 4))
    candidate = np.concatenate([np.zeros((95, 4)), np.full((5, 4), 9.0)])
    result = fitted.outlier_probability(candidate)
    assert (result.estimate, result.num_points, result.num_resamples) == (0.05, 100, 0)
    assert (result.low, result.high) == pytest.approx((0.0215, 0.1118), abs=1e-4)  # Wilson 1927 for 5 of 100
    assert mahalanobis_outlier_probability(candidate, normal(0, 500, 4)) == 0.05
    assert fitted.outlier_probability(candidate[:1]).estimate == 0.0


def test_constant_dimensions_do_not_hide_a_shift_in_others():
    reference = np.concatenate([normal(0, 500, 4), np.full((500, 2), 7.0)], axis=1)
    candidate = np.concatenate([normal(1, 200, 4), np.full((200, 2), 7.0)], axis=1)
    assert np.isfinite(squared_mahalanobis(candidate, reference)).all()
    assert mahalanobis_outlier_probability(candidate, reference) < 0.04
    assert mahalanobis_outlier_probability(candidate + 9 * np.eye(6)[0], reference) == 1.0
    assert mahalanobis_outlier_probability(candidate + 9 * np.eye(6)[5], reference) == 1.0


def test_a_large_reference_is_fitted_on_a_reported_subsample():
    reference = correlated(0, 3000)
    part, same = (fit_mahalanobis(reference, max_points=1000) for _ in range(2))
    assert part.num_points == len(part.left_out_distances) == 1000
    assert (
        part.mean.tolist() == same.mean.tolist() != fit_mahalanobis(reference, max_points=1000, seed=1).mean.tolist()
    )
    candidate = correlated(1, 50)
    np.testing.assert_allclose(
        part.squared_distances(candidate), fit_mahalanobis(reference).squared_distances(candidate), rtol=0.3
    )


# ---- what comes by chance ------------------------------------------------------------------------------------------


def test_splits_are_disjoint_parts_of_the_reference():
    reference = np.arange(20.0)[:, None]
    seen = []
    for number, max_points, used in ((None, 100, 20), (6, 100, 20), (None, 10, 10)):

        def statistic(candidate, others, used=used, number=number):
            assert len(candidate) == (number or used // 2) and len(candidate) + len(others) == used
            both = {*candidate[:, 0], *others[:, 0]}
            assert len(both) == used and both <= set(reference[:, 0])
            return candidate.sum()

        values = split_half_null(reference, statistic, num_splits=5, num_candidates=number, max_points=max_points)
        again = split_half_null(reference, statistic, num_splits=5, num_candidates=number, max_points=max_points)
        assert values.tolist() == again.tolist() and len(set(values)) > 1
        seen.append(values.tolist())
    assert seen[0] != split_half_null(reference, statistic=lambda c, r: c.sum(), num_splits=5, seed=1).tolist()


@pytest.mark.parametrize("name", ("csi", "mop"))
def test_the_null_holds_what_a_fresh_set_of_the_policy_gives_and_not_a_shifted_one(name):
    if name == "csi":
        statistic = partial(cluster_separation_index, eps=2.0, normalized=True)
    else:
        statistic = partial(mahalanobis_outlier_probability, alpha=0.1, tail="reference")
    ranks, shifted = [], []
    for repeat in range(10):
        reference, fresh = normal([repeat, 0], 200, 4), normal([repeat, 1], 100, 4)
        null = split_half_null(reference, statistic, num_splits=19)
        # As many reference latents as in the null.
        ranks.append(null_rank(statistic(fresh, reference[:100]), null))
        shifted.append(null_rank(statistic(fresh + 2.5, reference[:100]), null))
    assert set(ranks) <= {number / 20 for number in range(1, 21)}
    assert np.mean(np.array(shifted) <= 0.05) == 1.0
    assert kstest(np.array(ranks) - 0.025, "uniform").pvalue > 0.001
    assert np.mean(np.array(ranks) <= 0.1) <= 0.4


def test_rank_against_the_null():
    null = np.array([1.0, 2.0, 2.0, 3.0])
    assert [null_rank(value, null) for value in (0.0, 2.0, 2.5, 9.0)] == [1.0, 0.8, 0.4, 0.2]


# ---- bad input -----------------------------------------------------------------------------------------------------

GOOD = normal(0, 30, 3)
NAN_ROW = np.where(np.arange(30)[:, None] == 4, math.nan, GOOD)


@pytest.mark.parametrize(
    ("candidate", "reference", "message"),
    (
        (GOOD[:0], GOOD, r"candidate: shape \(0, 3\).*; there must be at least one response"),
        (GOOD, torch.zeros(0, 3), r"reference: shape \(0, 3\)"),
        (GOOD[:, :0], GOOD[:, :0], r"shape \((30|10), 0\)|shape \(30, 0\)"),
        (NAN_ROW, GOOD, "candidate: row 4 holds NaN or infinity"),
        (GOOD, torch.from_numpy(NAN_ROW), "reference: row 4 holds NaN or infinity"),
        (torch.full((2, 3), math.inf), GOOD, "candidate: row 0 holds NaN or infinity"),
        (GOOD[:, :2], GOOD, "candidate: 2 latent dimensions.* reference has 3"),
        (GOOD[0], GOOD, r"candidate: shape \(3,\) of float64; expected real numbers of shape"),
        (GOOD, GOOD[None], r"reference: shape \(1, 30, 3\)"),
        (GOOD.astype(str), GOOD, "candidate: .*expected real numbers"),
        (GOOD.astype(complex), GOOD, "candidate: .*expected real numbers"),
    ),
)
def test_bad_latents_are_named(candidate, reference, message):
    with pytest.raises(InputError, match=message):
        cluster_separation_index(candidate, reference)


@pytest.mark.parametrize("call", (csi_interval, squared_mahalanobis, mahalanobis_outlier_probability))
def test_bad_latents_are_named_by_every_function(call):
    for candidate, reference, message in (
        (NAN_ROW, GOOD, "candidate: row 4"), (GOOD, NAN_ROW, "reference: row 4"), (GOOD[:, :2], GOOD, "candidate: 2"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            call(candidate, reference)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"eps": 0}, "eps: 0; expected a distance above 0, or 'auto'"),
        ({"eps": -1.0}, "eps: -1.0"),
        ({"eps": math.nan}, "eps: nan"),
        ({"eps": "automatic"}, "eps: 'automatic'"),
        ({"min_samples": 0}, "min_samples: 0; expected a whole number, at least 1"),
        ({"min_samples": 2.5}, "min_samples: 2.5"),
        ({"noise": "keep"}, "noise: 'keep'; expected one of cluster, singletons, drop"),
    ),
)
def test_wrong_clustering_is_named(options, message):
    with pytest.raises(InputError, match=message):
        cluster_separation_index(GOOD, GOOD, **options)
    with pytest.raises(InputError, match=message):
        csi_interval(GOOD, GOOD, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda: cluster_separation_index(GOOD, GOOD, max_cluster_points=0), "max_cluster_points: 0"),
        (lambda: cluster_separation_index(GOOD, GOOD[:3], eps="auto"), "3 points have no distance to the 5-th"),
        (lambda: auto_eps(np.ones((20, 2))), "eps: 'auto' would be 0"),
        (lambda: auto_eps(GOOD, num_points=0), "num_points: 0"),
        (lambda: auto_eps(GOOD, min_samples=0), "^min_samples: 0"),
        (lambda: auto_eps(NAN_ROW), "^reference: row 4"),
        (lambda: csi_interval(GOOD, GOOD, num_resamples=0), "num_resamples: 0"),
        (lambda: csi_interval(GOOD, GOOD, max_points=0), "max_points: 0"),
        (lambda: squared_mahalanobis(GOOD, GOOD[:1]), "reference: 1 points; a covariance needs at least 10"),
        (lambda: squared_mahalanobis(GOOD, np.ones((20, 3))), "covariance cannot be inverted"),
        (lambda: squared_mahalanobis(GOOD, np.tile([[1.0, 0, 0], [-1, 0, 0]], (9, 1))), "or lie on a line"),
        (lambda: fit_mahalanobis(GOOD, max_points=3), "max_points: 3; expected a whole number, at least 10"),
        (lambda: fit_mahalanobis(GOOD).tail_probabilities(np.ones(3), "normal"), "tail: 'normal'; expected"),
        (lambda: mahalanobis_outlier_probability(GOOD, GOOD, alpha=0), "alpha: 0; it is a probability"),
        (lambda: mahalanobis_outlier_probability(GOOD, GOOD, alpha=1.0), "alpha: 1.0"),
        (lambda: mahalanobis_outlier_probability(GOOD, GOOD, alpha=math.nan), "alpha: nan"),
        (lambda: mahalanobis_outlier_probability(GOOD, GOOD, tail="reference"), "alpha: 0.01; the smallest rank"),
        (lambda: split_half_null(GOOD[:3], squared_mahalanobis), "3 points cannot be split"),
        (lambda: split_half_null(GOOD, squared_mahalanobis, num_splits=0), "num_splits: 0"),
        (lambda: split_half_null(GOOD, squared_mahalanobis, max_points=3), "max_points: 3; .* at least 4"),
        (lambda: split_half_null(GOOD, squared_mahalanobis, num_candidates=16), "num_candidates: 16; .* 1 to 15"),
        (lambda: split_half_null(NAN_ROW, squared_mahalanobis), "reference: row 4 holds NaN"),
        (lambda: null_rank(math.nan, np.ones(3)), "null_rank: nan"),
        (lambda: null_rank(1.0, np.array([])), r"null_rank: 1.0 against \(0,\) values"),
    ),
)  # fmt: skip
def test_wrong_use_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_the_smallest_sets_that_are_enough_are_taken():
    assert auto_eps(normal(0, 5, 3), min_samples=5) > 0
    assert split_half_null(GOOD, lambda one, other: len(one) + 10 * len(other), num_splits=1, max_points=4) == [22]
    fitted = fit_mahalanobis(GOOD[:10])
    far = np.full((1, 3), 1e3)
    assert fitted.outlier_probability(far, alpha=1.1 / 11, tail="reference").estimate == 1
    with pytest.raises(InputError, match="the smallest rank"):
        fitted.outlier_probability(far, alpha=0.9 / 11, tail="reference")
