"""CSI against the pseudocode, Mahalanobis distances against numpy, and how often both raise a false alarm."""

import math
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, chi2, kstest
from sklearn.covariance import LedoitWolf

from inform_rm.errors import InputError
from inform_rm.eval.detection import clusters, latent_arrays, outliers
from inform_rm.eval.detection.clusters import auto_eps, csi_interval, fit_csi
from inform_rm.eval.detection.outliers import fit_mahalanobis, fit_mop, null_rank, split_half_null
from inform_rm.eval.detection.settings import NOISE_POLICIES, DetectionSettings
from inform_rm.eval.outliers import (  # where they are promised
    cluster_separation_index,
    mahalanobis_outlier_probability,
)

quick = settings(deadline=None, max_examples=30)
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
    noise=st.sampled_from(NOISE_POLICIES),
)
@pytest.mark.filterwarnings("ignore:all .* points are DBSCAN noise")
def test_csi_is_that_of_the_pseudocode_and_of_the_named_clusters(sets, eps, min_samples, noise):
    candidate, reference = sets
    chosen = {"eps": eps, "min_samples": min_samples, "noise": noise}
    expected = naive_csi(candidate.tolist(), reference.tolist(), eps, min_samples, noise)
    csi = cluster_separation_index(candidate, reference, **chosen)
    assert csi == pytest.approx(expected, rel=1e-9, abs=1e-9)
    found = cluster_separation_index(torch.from_numpy(candidate), torch.from_numpy(reference), **chosen)
    assert found == csi
    values, columns = fit_csi(reference, DetectionSettings(**chosen))(candidate, 0)
    normalized = cluster_separation_index(candidate, reference, normalized=True, **chosen)
    assert values["csi"] == csi and values["csi_normalized"] == normalized == pytest.approx(csi / len(candidate))
    labels = np.array(naive_dbscan(candidate.tolist(), eps, min_samples))
    assert values["noise_share"] == (labels == -1).mean() and not values["subsampled"]
    cluster, total = np.array(columns["cluster"]), 0.0
    for number in set(columns["cluster"]) - {-1}:
        centroid = candidate[cluster == number].mean(axis=0)
        total += (cluster == number).sum() * np.linalg.norm(reference - centroid, axis=1).min()
    assert total == pytest.approx(csi, rel=1e-9, abs=1e-9)


def test_noise_is_one_cluster_singletons_or_nothing():
    reference = np.array([[0.0], [10.0]])
    candidate = np.array([[0.0], [0.1], [0.2], [4.0], [8.0]])  # one cluster of three; 4 and 8 are noise
    csi = {noise: cluster_separation_index(candidate, reference, min_samples=3, noise=noise)
           for noise in NOISE_POLICIES}  # fmt: skip
    assert csi["drop"] == pytest.approx(3 * 0.1)
    assert csi["singletons"] == pytest.approx(3 * 0.1 + 4 + 2)
    assert csi["cluster"] == pytest.approx(3 * 0.1 + 2 * 4)  # the centroid, 6, lies 4 from 10
    _, columns = fit_csi(reference, DetectionSettings(eps=0.5, min_samples=3, noise="drop"))(candidate, 0)
    assert columns["csi_distance"] == [pytest.approx(0.1)] * 3 + [None] * 2
    with pytest.warns(UserWarning, match="all 1 points are DBSCAN noise at eps 0.5"):
        assert cluster_separation_index([[3.0, 4.0]], np.zeros((1, 2)), noise="drop") == 0.0


def test_a_candidate_equal_to_the_reference_has_csi_0_where_centroids_are_reference_points():
    spread = 100 * normal(0, 30, 3) + 1e6  # where squares of the coordinates would cancel
    assert cluster_separation_index(spread, spread, noise="singletons") == 0.0
    equal = np.repeat(spread, 8, axis=0)  # 30 clusters of equal points
    assert cluster_separation_index(equal, equal) == pytest.approx(0.0, abs=1e-6)
    # Not in general: the centroid of a square is none of its corners.
    square = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    assert cluster_separation_index(square, square) == pytest.approx(4 * math.sqrt(0.5))


@pytest.mark.parametrize("offset", (0.0, 1e9))
def test_neither_blocks_nor_an_offset_change_the_result(monkeypatch, offset):
    offset = offset * np.resize([1, -1], 24)  # no one number is near all
    candidate, reference = 100 * normal(0, 15, 24) + offset, 100 * normal(1, 40, 24) + offset
    plain = np.linalg.norm(candidate[:, None] - reference[None], axis=2).min(axis=1)
    csi = cluster_separation_index(candidate, reference, noise="singletons")
    assert csi == pytest.approx(plain.sum(), rel=1e-9)
    squares = LedoitWolf().fit(reference).mahalanobis(candidate)
    for elements in (4, 7 * 24, 2**23):
        monkeypatch.setattr(latent_arrays, "_BLOCK_ELEMENTS", elements)  # blocks of 1, 7 and all rows
        np.testing.assert_allclose(fit_mahalanobis(reference).squared_distances(candidate), squares, rtol=1e-6)


def test_latents_in_half_precision_are_compared_in_float64():
    reference = np.array(
        [[0.0], [1.0], [1.001], [4000.0]], dtype=np.float16
    )  # around their mean the middle two are one
    assert cluster_separation_index(reference[2:3], reference) == 0


def test_a_subsample_is_reported_seeded_and_scaled_up(monkeypatch):
    candidate, reference = normal(0, 400, 3), normal(1, 50, 3) + 5

    def measure(seed=0):
        values, columns = fit_csi(reference, DetectionSettings(eps=2.0, seed=seed))(candidate, 0)
        return values, np.array(columns["cluster"], dtype=float)  # NaN where there is none

    whole, _ = measure()
    monkeypatch.setattr(clusters, "MOST_CLUSTERED", 200)
    (part, cluster), (again, same), (_, other) = measure(), measure(), measure(seed=1)
    assert part["subsampled"] and not whole["subsampled"]
    used = np.isfinite(cluster)
    assert used.sum() == 200 and part == again and (used == np.isfinite(same)).all()
    assert (used != np.isfinite(other)).any()
    chosen = cluster_separation_index(candidate[used], reference, eps=2.0)
    assert part["csi"] == pytest.approx(2 * chosen) == pytest.approx(whole["csi"], rel=0.1)
    assert part["csi_normalized"] == pytest.approx(chosen / 200)
    assert cluster_separation_index(candidate, reference, eps=2.0, seed=1) not in (part["csi"], whole["csi"])


def test_auto_eps_makes_nine_in_ten_reference_points_core_points():
    reference = normal(0, 300, 16)
    eps = auto_eps(reference, min_samples=5)
    plain = np.linalg.norm(reference[:, None] - reference[None], axis=2)
    core = (plain <= eps * (1 + 1e-9)).sum(axis=1) >= 5
    assert core.mean() == pytest.approx(0.9, abs=0.005)
    assert np.isclose(np.sort(plain, axis=1)[:, 4], eps, rtol=1e-9).any()  # the distance of one of them
    assert auto_eps(7 * reference) == pytest.approx(7 * eps)
    # The candidate's size decides how many reference points the curve is made of.
    for number, seed in ((100, 3), (300, 0)):
        candidate = normal(1, number, 16)
        eps = auto_eps(reference, num_points=number, seed=seed)
        found, _ = fit_csi(reference, DetectionSettings(eps="auto", seed=seed))(candidate, 0)
        assert found["csi"] == cluster_separation_index(candidate, reference, eps=eps)
        assert 0 < found["noise_share"] < 0.25
    assert auto_eps(reference, num_points=100, seed=3) > eps
    found, eps = (cluster_separation_index(candidate, reference, eps=radius, min_samples=9)
                  for radius in ("auto", auto_eps(reference, min_samples=9)))  # fmt: skip
    assert found == eps
    assert auto_eps(normal(0, 5, 3), min_samples=5) > 0


@pytest.mark.parametrize("noise", NOISE_POLICIES)
def test_bootstrap_interval_of_csi_is_that_of_sets_drawn_again(monkeypatch, noise):
    candidate, reference = normal(0, 60, 8), normal(1, 80, 8) + 2
    chosen = DetectionSettings(eps=3.0, noise=noise, seed=4)
    found = csi_interval(candidate, reference, chosen, 15)
    rng = np.random.default_rng([4, 1])
    again = [candidate[rng.integers(60, size=60)] for _ in range(15)]
    values = [cluster_separation_index(part, reference, eps=3.0, noise=noise, normalized=True) for part in again]
    assert found == pytest.approx(np.quantile(values, [0.025, 0.975]).tolist())
    assert fit_csi(reference, chosen)(candidate, 15)[0]["csi_normalized_interval"] == found
    eps = auto_eps(reference, num_points=60, seed=4)  # as many reference points as there are candidates
    auto, same = (csi_interval(candidate, reference, replace(chosen, eps=radius), 15) for radius in ("auto", eps))
    assert auto == same
    monkeypatch.setattr(clusters, "MOST_RESAMPLED", 15)
    low, high = csi_interval(candidate, reference, chosen, 15)
    assert high - low > found[1] - found[0]
    assert csi_interval(candidate, reference, chosen, 15) == [low, high]


def test_bootstrap_interval_of_a_csi_whose_distribution_is_known():
    # Far from each other and from all else, each place is a cluster of equal points: the resampled CSI is
    # the sum of counts times distances, 0 at one place and 1 at the other. Binomial(40, 1/2) has quantiles 14 and 26.
    candidate = np.repeat([[0.0, 0.0], [9.0, 1.0]], 20, axis=0)
    reference = np.array([[0.0, 0.0], [9.0, 0.0]])
    low, high = csi_interval(candidate, reference, DetectionSettings(eps=0.5), 150)
    assert 40 * low == pytest.approx(binom.ppf(0.025, 40, 0.5), abs=1.5)
    assert 40 * high == pytest.approx(binom.ppf(0.975, 40, 0.5), abs=1.5)


# ---- Mahalanobis ---------------------------------------------------------------------------------------------------


def correlated(seed, number, latent_dim=6):
    return normal(seed, number, latent_dim) @ normal(99, latent_dim, latent_dim) + 3


@pytest.mark.parametrize("number", (10, 200))
def test_distances_are_those_of_numpy_with_the_same_covariance(number):
    reference, candidate = correlated(0, number, 20), correlated(1, 30, 20)
    model = LedoitWolf().fit(reference)
    difference = candidate - reference.mean(axis=0)
    expected = np.einsum("ni,ij,nj->n", difference, np.linalg.inv(model.covariance_), difference)
    fitted = fit_mahalanobis(torch.from_numpy(reference))
    np.testing.assert_allclose(fitted.squared_distances(candidate), expected, rtol=1e-8)
    assert fitted.shrinkage == pytest.approx(model.shrinkage_)
    if number > 20:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_allclose(fitted.tail_probabilities(expected), chi2.sf(expected, 20))


def test_tensors_of_any_type_give_what_arrays_give():
    fitted, tensor = fit_mahalanobis(correlated(0, 100)), torch.from_numpy(correlated(1, 7)).requires_grad_()
    assert fitted.squared_distances(tensor).tolist() == fitted.squared_distances(tensor.detach().numpy()).tolist()
    rounded = tensor.bfloat16()
    assert fitted.squared_distances(rounded).tolist() == fitted.squared_distances(rounded.float()).tolist()


@quick
@given(seed=seeds, scale=st.sampled_from([1e-9, 1.0, 1e3]))
def test_shift_rotation_and_scale_of_both_change_nothing(seed, scale):
    reference, candidate = correlated(seed, 40), 2 * correlated(seed + 1, 15)
    rotation = np.linalg.qr(normal(seed + 2, 6, 6))[0]
    moved = [scale * (points @ rotation + normal(seed + 3, 6)) for points in (candidate, reference)]
    found, expected = (
        fit_mahalanobis(there).squared_distances(here) for here, there in (moved, (candidate, reference))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)


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


@pytest.mark.parametrize(("spectrum", "number"), (("equal", 60), ("collapsed", 60), ("falling", 400)))
def test_reference_tail_false_alarms_are_alpha_for_any_gaussian_and_fewer_points_than_dimensions(spectrum, number):
    scales = {"equal": np.ones(64), "falling": np.arange(1, 65) ** -0.5, "collapsed": np.r_[np.ones(8), [1e-3] * 56]}
    repeats, alpha, shares = 30, 0.05, []
    for repeat in range(repeats):
        reference = normal([repeat, 0], number, 64) * scales[spectrum]
        candidate = normal([repeat, 1], 300, 64) * scales[spectrum]
        shares.append(mahalanobis_outlier_probability(candidate, reference, alpha=alpha, tail="reference"))
    # Ranks are multiples of 1 / (number + 1); "below alpha" keeps these of them:
    expected = (math.ceil(alpha * (number + 1)) - 1) / (number + 1)
    # The reference's own draw moves each share by about alpha (1 - alpha) / number.
    assert within_binomial(np.mean(shares), 300 * repeats, expected, extra=alpha * (1 - alpha) / number / repeats)


def test_chi_square_tail_is_refused_or_warned_of_where_it_is_wrong():
    scales = np.arange(1, 65) ** -0.5
    candidate, reference = normal(0, 2000, 64) * scales, normal(1, 200, 64) * scales
    with pytest.warns(UserWarning, match="200 reference points in 64 dimensions"):
        share = mahalanobis_outlier_probability(candidate, reference)
    assert share > 0.05  # what the warning is about
    with pytest.raises(InputError, match=r"64 points in 64 dimensions .* Pass more than 64 .*tail='reference'"):
        mahalanobis_outlier_probability(candidate, reference[:64])
    assert np.isfinite(fit_mahalanobis(reference[:64]).squared_distances(candidate)).all()


def test_outliers_are_counted_with_wilsons_interval():
    measure = fit_mop(normal(0, 500, 4), DetectionSettings(tail="chi2"))
    candidate = np.concatenate([np.zeros((95, 4)), np.full((5, 4), 9.0)])
    values, columns = measure(candidate, 0)
    assert values["mop"] == 0.05 == mahalanobis_outlier_probability(candidate, normal(0, 500, 4))
    assert values["mop_interval"] == pytest.approx([0.0215, 0.1118], abs=1e-4)  # Wilson 1927 for 5 of 100
    assert [tail < 0.01 for tail in columns["tail_probability"]] == columns["mop_outlier"] == [False] * 95 + [True] * 5
    squares = fit_mahalanobis(normal(0, 500, 4)).squared_distances(candidate)
    assert columns["squared_mahalanobis"] == squares.tolist()


def test_a_tail_of_exactly_alpha_is_no_outlier():
    _, columns = fit_mop(normal(0, 10, 2), DetectionSettings(alpha=3 / 11, tail="reference"))(normal(1, 200, 2), 0)
    assert 3 / 11 in columns["tail_probability"]
    assert columns["mop_outlier"] == [tail < 3 / 11 for tail in columns["tail_probability"]]


def test_constant_dimensions_do_not_hide_a_shift_in_others():
    reference = np.concatenate([normal(0, 500, 4), np.full((500, 2), 7.0)], axis=1)
    candidate = np.concatenate([normal(1, 200, 4), np.full((200, 2), 7.0)], axis=1)
    assert mahalanobis_outlier_probability(candidate, reference) < 0.04
    for moved in (0, 5):
        assert mahalanobis_outlier_probability(candidate + 9 * np.eye(6)[moved], reference) == 1.0


def test_a_large_reference_is_fitted_on_a_seeded_subsample(monkeypatch):
    reference, candidate = correlated(0, 3000), correlated(1, 50)
    whole = fit_mahalanobis(reference).squared_distances(candidate)
    monkeypatch.setattr(outliers, "MOST_FITTED", 1000)
    part, same, other = (fit_mahalanobis(reference, seed=seed) for seed in (0, 0, 1))
    assert part.num_points == 1000 and part.mean.tolist() == same.mean.tolist() != other.mean.tolist()
    np.testing.assert_allclose(part.squared_distances(candidate), whole, rtol=0.3)
    _, columns = fit_mop(reference, DetectionSettings(seed=1))(candidate, 0)
    assert columns["squared_mahalanobis"] == other.squared_distances(candidate).tolist()


# ---- what comes by chance ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "used"), ((100, 20), (10, 10), (4, 4)))
def test_splits_are_disjoint_halves_of_the_reference(monkeypatch, most, used):
    reference = np.arange(20.0)[:, None]
    monkeypatch.setattr(outliers, "MOST_SPLIT", most)

    def statistic(candidate, others):
        assert len(candidate) == len(others) == used // 2
        both = {*candidate[:, 0], *others[:, 0]}
        assert len(both) == used and both <= set(reference[:, 0])
        return candidate.sum()

    values, again, other = (split_half_null(reference, statistic, num_splits=5, seed=seed) for seed in (0, 0, 1))
    assert values.tolist() == again.tolist() != other.tolist() and len(set(values)) > 1


@pytest.mark.parametrize("name", ("csi", "mop"))
def test_the_null_holds_what_a_fresh_set_of_the_policy_gives_and_not_a_shifted_one(name):
    if name == "csi":
        statistic = partial(cluster_separation_index, eps=2.0, normalized=True)
    else:
        statistic = partial(mahalanobis_outlier_probability, alpha=0.1, tail="reference")
    ranks, shifted = [], []
    for repeat in range(10):
        reference, fresh = normal([repeat, 0], 120, 4), normal([repeat, 1], 60, 4)
        null = split_half_null(reference, statistic, num_splits=19)
        # As many reference latents as in the null.
        ranks.append(null_rank(statistic(fresh, reference[:60]), null))
        shifted.append(null_rank(statistic(fresh + 2.5, reference[:60]), null))
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


@pytest.mark.parametrize("call", (cluster_separation_index, mahalanobis_outlier_probability))
@pytest.mark.parametrize(
    ("candidate", "reference", "message"),
    (
        (GOOD[:0], GOOD, r"candidate: shape \(0, 3\).*, at least one of each"),
        (GOOD, torch.zeros(0, 3), r"reference: shape \(0, 3\)"),
        (GOOD[:, :0], GOOD[:, :0], r"shape \(30, 0\)"),
        (NAN_ROW, GOOD, "candidate: row 4 holds NaN or infinity"),
        (GOOD, torch.from_numpy(NAN_ROW), "reference: row 4 holds NaN or infinity"),
        (torch.full((2, 3), math.inf), GOOD, "candidate: row 0 holds NaN or infinity"),
        (GOOD[:, :2], GOOD, "candidate: 2 latent dimensions.* reference has 3"),
        (GOOD[0], GOOD, r"candidate: shape \(3,\) of float64; expected real numbers of shape"),
        (GOOD.astype(str), GOOD, "candidate: .*expected real numbers"),
    ),
)
def test_bad_latents_are_named(call, candidate, reference, message):
    with pytest.raises(InputError, match=message):
        call(candidate, reference)


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (
            lambda: cluster_separation_index(GOOD, GOOD, noise="keep"),
            "noise: got 'keep'; expected one of cluster",
        ),
        (lambda: cluster_separation_index(GOOD, GOOD[:3], eps="auto"), "3 points have no distance to the 5-th"),
        (lambda: auto_eps(np.ones((20, 2))), "eps: 'auto' would be 0"),
        (lambda: auto_eps(NAN_ROW), "^reference: row 4"),
        (lambda: fit_mahalanobis(GOOD[:9]), "reference: 9 points; a covariance needs at least 10"),
        (lambda: fit_mahalanobis(np.ones((20, 3))), "covariance cannot be inverted"),
        (lambda: fit_mahalanobis(np.tile([[1.0, 0, 0], [-1, 0, 0]], (9, 1))), "or lie on a line"),
        (lambda: fit_mahalanobis(np.tile([[1.0, 0], [-1, 0]], (9, 1))), "or lie on a line"),
        (lambda: mahalanobis_outlier_probability(GOOD, GOOD, tail="normal"), "tail: got 'normal'; expected"),
        (lambda: mahalanobis_outlier_probability(GOOD, GOOD, alpha=1.0), "alpha: 1.0; it is a probability"),
        (lambda: fit_mahalanobis(GOOD).check_alpha(1.0, "chi2"), "alpha: 1.0; it is a probability"),
        (lambda: fit_mahalanobis(GOOD).check_alpha(0.1, "normal"), "tail: got 'normal'; expected"),
        (lambda: mahalanobis_outlier_probability(GOOD, GOOD, tail="reference"), "alpha: 0.01; the smallest rank"),
    ),
)
def test_wrong_use_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_the_smallest_alpha_that_a_rank_can_be_below_is_taken():
    call = partial(mahalanobis_outlier_probability, np.full((1, 3), 1e3), GOOD[:10], tail="reference")
    assert call(alpha=1.1 / 11) == 1
    for alpha in (1 / 11, 0.95 / 11):
        with pytest.raises(InputError, match="the smallest rank"):
            call(alpha=alpha)
