"""The prompt-free gap against brute force, the properties that define it, its precision, weights and prompt draws."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from inform_rm.decomposition.prompt_free_gap import (
    _normalised,
    decompose_gaps,
    prompt_free_gap,
    sample_prompts,
    tempered_weights,
)

NAN, INF = math.nan, math.inf
quick = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def doubles(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def grid(seed, pairs=5, prompts=7, scale=3.0):
    return scale * torch.randn(pairs, prompts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def brute_force(gaps, weights):
    """Row by row with SciPy's scalar root finder, from the defining equation."""
    roots = []
    for row, shares in zip(gaps.tolist(), weights.expand(gaps.shape).tolist(), strict=True):
        if INF in shares:
            shares = [float(share == INF) for share in shares]
        entries = [(gap, share / math.fsum(shares)) for gap, share in zip(row, shares, strict=True) if share > 0]

        def balance(c, entries=entries):
            # tanh(z / 2) / 2 is sigmoid(z) - 1/2, without overflow and without loss near its zero
            return math.fsum(share * math.tanh((gap - c) / 2) for gap, share in entries)

        low, high = min(entries)[0], max(entries)[0]
        # Beyond both ends, where the balance has its sign also where all gaps are equal.
        roots.append(brentq(balance, low - 1, high + 1, xtol=1e-10, rtol=1e-14, maxiter=500))
    return torch.tensor(roots, dtype=torch.float64)


def chi_square_bound(degrees):
    """Exceeded once in 100,000 times by chance (Wilson and Hilferty's approximation)."""
    return degrees * (1 - 2 / (9 * degrees) + 4.265 * math.sqrt(2 / (9 * degrees))) ** 3


# ---- the root ----------------------------------------------------------------------------------------------------


@quick
@given(
    seed=seeds, prompts=st.integers(1, 9), scale=st.sampled_from([0.0, 0.01, 1.0, 8.0, 1e4]), kind=st.integers(0, 3)
)
def test_root_equals_brute_force(seed, prompts, scale, kind):
    # Equal halves too far apart for SciPy's floats have a test of their own.
    assume(not (scale == 1e4 and kind == 2))
    gaps = grid(seed, prompts=prompts, scale=scale)
    weights = torch.rand(gaps.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.01
    if kind == 1:  # some entries left out
        weights[weights < 0.4] = 0.0
        weights[:, 0] = 0.3
    elif kind == 2:  # one row with entries that take everything
        weights[2, : 1 + prompts // 2] = INF
    elif kind == 3:
        weights = weights[0]
    expected = brute_force(gaps, weights)
    torch.testing.assert_close(prompt_free_gap(gaps, weights), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(prompt_free_gap(gaps, 1e-3 * weights), expected, atol=1e-6, rtol=0)


def test_without_weights_prompts_count_equally():
    gaps = grid(0)
    torch.testing.assert_close(prompt_free_gap(gaps), brute_force(gaps, torch.ones(7)), atol=1e-6, rtol=0)


def test_one_prompt_and_equal_gaps_give_the_gap_itself():
    gaps = doubles([3.7], [-1e4], [0.0])
    assert prompt_free_gap(gaps).equal(gaps[:, 0])
    assert prompt_free_gap(gaps.expand(3, 6)).equal(gaps[:, 0])


def test_large_gaps():
    gaps = doubles([1e4, 1e4 + 1, 1e4 + 3, 1e4 - 2], [-1e4, 1e4, 9e3, 8e3], [-1e4, -5.0, 5.0, 1e4])
    # Of the second row three gaps are far above the first: the lowest three tenths of the mass end between them.
    weights = doubles([1.0, 1.0, 1.0, 1.0], [0.1, 0.3, 0.3, 0.3], [1.0, 1.0, 1.0, 1.0])
    torch.testing.assert_close(prompt_free_gap(gaps, weights), brute_force(gaps, weights), atol=1e-6, rtol=0)


def test_equal_halves_far_apart_are_balanced_by_their_tails():
    # Sigmoids are 0 and 1 everywhere between the halves. Solved by hand: e^-c (1 + e^a) = e^c (e^-b + e^-d).
    a, b, d = 30.0, 1e4, 1e4 + 2
    below, above = a + math.log1p(math.exp(-a)), -b + math.log1p(math.exp(b - d))
    root = prompt_free_gap(doubles([0.0, a, b, d], [0.0, b, 0.0, b])).tolist()
    assert root == pytest.approx([(below - above) / 2, b / 2], abs=1e-6)
    # The same where one is still wide of float64's sight and the other not: no jump between the two ways to compute.
    for apart in [30.0, 60.0, 700.0, 800.0] + [34 + 0.25 * step for step in range(24)]:
        assert prompt_free_gap(doubles([0.0, apart])).item() == pytest.approx(apart / 2, abs=1e-6)


def test_one_row_of_equal_halves_is_balanced_whatever_the_others_are():
    # e^-c (1 + e) = 2 e^(c - 1000), by hand, alone and beside a row whose mass leans to one side.
    far, lopsided = [0.0, 1.0, 1000.0, 1000.0], [0.0, 0.0, 0.0, 4.0]
    expected = 500 + math.log((1 + math.e) / 2) / 2
    assert prompt_free_gap(doubles(far)).item() == pytest.approx(expected, abs=1e-6)
    assert prompt_free_gap(doubles(far, lopsided))[0].item() == pytest.approx(expected, abs=1e-6)


def test_nearly_equal_halves_far_apart_are_not_taken_for_equal():
    # Of the lower half, 2^-40 heavier, that much has to be above c: w sigmoid(-c) = 1/2 - (1 - w), w = 1/2 + 2^-40.
    more = 2.0**-40
    root = prompt_free_gap(doubles([0.0, 1000.0]), doubles([0.5 + more, 0.5 - more])).item()
    assert root == pytest.approx(math.log((0.5 + more) / more - 1), abs=1e-3)


@quick
@given(seed=seeds, scale=st.sampled_from([1.0, 50.0, 1e4]))
def test_swapping_the_sides_of_a_pair_negates_the_root(seed, scale):
    gaps, weights = grid(seed, scale=scale, prompts=6), grid(seed + 1, prompts=6).abs()
    for used in (None, weights):
        torch.testing.assert_close(prompt_free_gap(-gaps, used), -prompt_free_gap(gaps, used), atol=1e-9, rtol=0)


@quick
@given(seed=seeds, shift=st.floats(-100, 100))
def test_a_reward_of_the_response_alone_is_wholly_prompt_free(seed, shift):
    gaps, weights = grid(seed), grid(seed + 1).abs()
    shifts = shift * torch.arange(1, 6, dtype=torch.float64)
    before, after = decompose_gaps(gaps, weights), decompose_gaps(gaps + shifts[:, None], weights)
    torch.testing.assert_close(after.prompt_free_gap, before.prompt_free_gap + shifts, atol=2e-6, rtol=0)
    torch.testing.assert_close(after.prompt_related_gap, before.prompt_related_gap, atol=2e-6, rtol=0)
    # Exactly 0, but for gaps at the smallest floats, whose halves are rounded.
    assert decompose_gaps(shifts[:, None].expand(5, 4)).prompt_related_gap.abs().max() < 1e-300


@quick
@given(seed=seeds, column=st.integers(0, 6), increase=st.floats(0.1, 20))
def test_root_rises_with_each_gap(seed, column, increase):
    gaps, weights = grid(seed, scale=1.0), grid(seed + 1).abs() + 0.1
    raised = gaps.clone()
    raised[:, column] += increase
    assert (prompt_free_gap(raised, weights) > prompt_free_gap(gaps, weights)).all()


@quick
@given(seed=seeds)
def test_prompt_related_preference_is_a_coin_flip_over_the_prompts(seed):
    gaps, weights = grid(seed), grid(seed + 1).abs()
    related = gaps - prompt_free_gap(gaps, weights)[:, None]
    mean = (weights * related.sigmoid()).sum(1) / weights.sum(1)
    torch.testing.assert_close(mean, torch.full((5,), 0.5, dtype=torch.float64), atol=1e-6, rtol=0)


@quick
@given(seed=seeds)
def test_exact_on_a_sum_whose_prompt_related_gaps_are_symmetric(seed):
    half, weights, free = grid(seed, prompts=4), grid(seed + 1, prompts=4).abs(), grid(seed + 2)[:, 0]
    gaps = torch.cat([half, -half], dim=1) + free[:, None]
    parts = decompose_gaps(gaps, weights.repeat(1, 2))
    torch.testing.assert_close(parts.prompt_free_gap, free, atol=1e-6, rtol=0)
    torch.testing.assert_close(parts.prompt_related_gap, half[:, 0], atol=1e-6, rtol=0)


def mutual_information(related, weights):
    """I(pair; preference) in nats from the joint table over (pair, prompt, preference), prompts summed out."""
    shares = weights / weights.sum(1, keepdim=True) / len(weights)
    joint = torch.stack([shares * related.sigmoid(), shares * (-related).sigmoid()], dim=-1).sum(1)
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return (joint * (joint / independent).log()).sum().item()


@quick
@given(seed=seeds)
def test_mutual_information_with_the_pair_is_zero(seed):
    gaps, weights = grid(seed, pairs=6), grid(seed + 1, pairs=6).abs() + 0.01
    free = prompt_free_gap(gaps, weights)
    assert abs(mutual_information(gaps - free[:, None], weights)) < 1e-6


def test_mean_gap_leaves_mutual_information_where_gaps_are_skewed():
    gaps = doubles([12.0, 0.0, 0.0, 0.0], [-12.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0])
    weights = torch.ones(3, 4, dtype=torch.float64)
    assert mutual_information(gaps - prompt_free_gap(gaps)[:, None], weights) < 1e-6
    assert mutual_information(gaps - gaps.mean(1, keepdim=True), weights) > 0.01


# ---- bad rows and wrong use ----------------------------------------------------------------------------------------


def test_bad_gaps_stay_in_their_row():
    gaps = grid(3)
    expected = prompt_free_gap(gaps)
    for bad in (NAN, INF, -INF):
        spoilt = gaps.clone()
        spoilt[1, 4] = bad
        root = prompt_free_gap(spoilt)
        assert root.isnan().tolist() == [False, True, False, False, False]
        assert root[[0, 2, 3, 4]].equal(expected[[0, 2, 3, 4]])
        parts = decompose_gaps(spoilt)
        assert parts.converged.tolist() == [True, False, True, True, True]
        assert parts.standard_error.isnan().equal(root.isnan())
        assert parts.prompt_related_gap.isnan().equal(root.isnan())
        # At weight 0 it is not looked at.
        weights = torch.ones(7).index_fill(0, torch.tensor(4), 0.0)
        kept = gaps[:, [0, 1, 2, 3, 5, 6]]
        torch.testing.assert_close(prompt_free_gap(spoilt, weights), prompt_free_gap(kept), atol=1e-6, rtol=0)
        assert decompose_gaps(spoilt, weights).converged.all()


@pytest.mark.parametrize(
    ("gaps", "weights", "message"),
    (
        (torch.zeros(3), None, r"shape \(3,\)"),
        (torch.zeros(2, 0), None, "no prompts"),
        (torch.zeros(2, 3), torch.ones(2), r"shape \(2,\)"),
        (torch.zeros(2, 3), torch.ones(3, 2), r"shape \(3, 2\)"),
        (torch.zeros(2, 2), doubles([1.0, 1.0], [-1.0, 2.0]), "row 1 .*negative"),
        (torch.zeros(2, 2), doubles([1.0, 1.0], [NAN, 2.0]), "row 1 .*NaN"),
        (torch.zeros(3, 2), doubles([1.0, 1.0], [1.0, 0.0], [0.0, 0.0]), "row 2 .*no positive"),
    ),
)
def test_wrong_input_is_named(gaps, weights, message):
    with pytest.raises(ValueError, match=message):
        prompt_free_gap(gaps, weights)
    with pytest.raises(ValueError, match=message):
        decompose_gaps(gaps, weights)


def test_a_population_smaller_than_the_prompts_is_named():
    for population, row in ((6, 0), (torch.tensor([7, 7, 7, 3, 7]), 3)):
        with pytest.raises(ValueError, match=rf"population of row {row} is \d, but 7 of its prompts"):
            decompose_gaps(grid(0), population=population)


def test_types_and_empty_batches():
    for dtype in (torch.bfloat16, torch.float32, torch.int64):
        assert prompt_free_gap(torch.tensor([[1, 3]], dtype=dtype)).equal(doubles([2.0])[0])
    assert prompt_free_gap(torch.zeros(0, 4)).shape == decompose_gaps(torch.zeros(0, 4)).standard_error.shape == (0,)
    assert not prompt_free_gap(torch.zeros(2, 3, requires_grad=True)).requires_grad


# ---- decompose -----------------------------------------------------------------------------------------------------


def test_the_own_gap_is_the_first_and_the_parts_add_up():
    gaps = grid(5)
    parts = decompose_gaps(gaps)
    assert parts.own_gap.equal(gaps[:, 0])
    assert parts.prompt_related_gap.equal(parts.own_gap - parts.prompt_free_gap)


def test_not_converged_where_floats_are_too_coarse():
    parts = decompose_gaps(doubles([0.0, 1.0, 5.0], [1e13, 1e13 + 1, 1e13 + 5]))
    assert parts.converged.tolist() == [True, False]
    assert parts.prompt_free_gap[1].item() - 1e13 == pytest.approx(parts.prompt_free_gap[0].item(), abs=0.01)
    assert decompose_gaps(doubles([-1e308, 1e308, 1e308])).prompt_free_gap.isfinite().all()


def test_standard_error_of_one_prompt_all_prompts_and_hopeless_gaps():
    gaps = doubles([1.0, 2.0, 4.0])
    error = decompose_gaps(gaps).standard_error
    assert error.item() > 0.5
    assert decompose_gaps(gaps, doubles([0.0, 1.0, 0.0])).standard_error.isnan().all()
    assert decompose_gaps(gaps, doubles([0.0, INF, 0.0]), population=9).standard_error.isnan().all()
    assert decompose_gaps(gaps, population=3).standard_error.item() == 0.0
    assert decompose_gaps(gaps[:, :1], population=1).standard_error.item() == 0.0
    assert decompose_gaps(gaps, population=12).standard_error.item() == pytest.approx(error.item() * math.sqrt(3 / 4))
    both = decompose_gaps(gaps.expand(2, 3), population=torch.tensor([3, 12])).standard_error
    assert both.tolist() == pytest.approx([0.0, error.item() * math.sqrt(3 / 4)])
    assert decompose_gaps(doubles([0.0, 1e4], [2.0, 2.0])).standard_error.tolist() == [INF, 0.0]


@pytest.mark.parametrize("weighted", (False, True))
def test_standard_error_agrees_with_a_bootstrap_over_prompts(weighted):
    generator = torch.Generator().manual_seed(0)
    gaps = grid(11, pairs=1, prompts=80, scale=1.5).exp()  # skewed
    weights = torch.rand(1, 80, generator=generator, dtype=torch.float64) if weighted else torch.ones(1, 80).double()
    picks = torch.randint(80, (3000, 80), generator=generator)
    spread = prompt_free_gap(gaps[0, picks], weights[0, picks]).std().item()
    assert decompose_gaps(gaps, weights).standard_error.item() == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize("population", (None, 60))
def test_standard_error_covers_the_root_of_all_prompts(population):
    generator = torch.Generator().manual_seed(1)
    everything = (0.8 * torch.randn(population or 20000, generator=generator, dtype=torch.float64)).exp() * 2
    truth = prompt_free_gap(everything[None])
    draws = 600
    rows = torch.stack([torch.randperm(len(everything), generator=generator)[:40] for _ in range(draws)])
    parts = decompose_gaps(everything[rows], population=population)
    covered = ((parts.prompt_free_gap - truth).abs() <= 1.96 * parts.standard_error).double().mean().item()
    assert 0.9 <= covered <= 0.99


# ---- weights -------------------------------------------------------------------------------------------------------


def test_effective_sample_size():
    weights = doubles([1.0, 1.0, 1.0, 1.0], [3.0, 1.0, 0.0, 0.0], [1e200, 1e200, 0.0, 0.0], [INF, 1.0, 1.0, INF])
    assert decompose_gaps(grid(0, 4, 4), weights).effective_sample_size.tolist() == pytest.approx([4.0, 1.6, 2.0, 2.0])


def test_weights_are_taken_as_shares_of_their_row():
    found = _normalised(doubles([1.0, 3.0], [2e200, 8e200], [INF, 7.0]))
    torch.testing.assert_close(found, doubles([0.25, 0.75], [0.2, 0.8], [1.0, 0.0]))


def effective_sample_size(weights):
    return weights.sum(1).square() / weights.square().sum(1)


def tempered(scores, exponent):
    return torch.where(scores == -INF, 0.0, (exponent * (scores - scores.amax(1, keepdim=True))).exp())


@quick
@given(seed=seeds, target=st.floats(0.01, 1.0), scale=st.sampled_from([0.1, 1.0, 30.0, 1e5]), unusable=st.booleans())
def test_tempering_takes_the_largest_exponent_that_keeps_the_target(seed, target, scale, unusable):
    scores = grid(seed, prompts=8, scale=scale)
    if unusable:
        scores[1, 3:6] = scores[4, 1:] = -INF
    weights, exponents = tempered_weights(scores, target)
    usable = scores != -INF
    torch.testing.assert_close(weights.sum(1), torch.ones(5, dtype=torch.float64))
    assert weights[~usable].eq(0).all()
    assert ((exponents >= 0) & (exponents <= 1)).all()
    needed = target * usable.sum(1)
    assert (effective_sample_size(weights) >= needed * (1 - 1e-6)).all()
    for row, exponent in enumerate(exponents.tolist()):
        shape = tempered(scores, exponent)[row]
        torch.testing.assert_close(weights[row], shape / shape.sum())
        if exponent < 1:
            more = min(1.0, exponent * 1.001 + 1e-3 / scale)
            assert effective_sample_size(tempered(scores, more))[row] < needed[row]


def test_tempering_equals_a_grid_search():
    scores = grid(2, pairs=4, prompts=10, scale=6.0)
    steps = torch.linspace(0, 1, 20001, dtype=torch.float64)
    for target in (0.15, 0.25, 0.6, 0.9):
        for row, exponent in zip(scores, tempered_weights(scores, target)[1].tolist(), strict=True):
            sizes = effective_sample_size((steps[:, None] * (row - row.max())).exp())
            assert (sizes.diff() <= 1e-9).all()  # falls in the exponent
            assert exponent == pytest.approx(steps[sizes >= target * 10].max().item(), abs=5.1e-5)


def test_tempering_at_its_ends():
    scores = doubles([0.0, -1.0, -2.0], [5.0, 5.0, 5.0], [5.0, 5.0, -INF], [0.0, -INF, -INF])
    weights, exponents = tempered_weights(scores, 1.0)
    assert exponents.tolist() == [0.0, 1.0, 1.0, 1.0]
    torch.testing.assert_close(weights[:2], torch.full((2, 3), 1 / 3, dtype=torch.float64))
    assert weights[2:].tolist() == [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]
    # 1 of 3 always holds: the plain softmax.
    weights, exponents = tempered_weights(scores, 0.3)
    assert exponents.tolist() == [1.0] * 4
    torch.testing.assert_close(weights, scores.softmax(1))


def test_by_default_a_quarter_of_the_prompts_stays_in_play():
    weights, _ = tempered_weights(grid(0, prompts=40, scale=100.0))
    assert effective_sample_size(weights).tolist() == pytest.approx(5 * [10.0])


def test_tempering_names_wrong_input():
    with pytest.raises(ValueError, match="row 1 have no usable"):
        tempered_weights(doubles([0.0, 0.0], [-INF, -INF]))
    for bad in (NAN, INF):
        with pytest.raises(ValueError, match="row 1 hold NaN"):
            tempered_weights(doubles([0.0, 0.0], [0.0, bad]))


# ---- prompt draws --------------------------------------------------------------------------------------------------


@quick
@given(seed=st.integers(-(2**70), 2**70), population=st.integers(1, 30), num_prompts=st.integers(1, 35), d=st.data())
def test_draws_are_without_replacement_and_within_the_stratum(seed, population, num_prompts, d):
    own = torch.tensor(d.draw(st.lists(st.integers(0, population - 1), min_size=1, max_size=20)))
    labels = d.draw(st.lists(st.integers(-2, 2), min_size=population, max_size=population))
    for strata in (None, torch.tensor(labels)):
        rows = sample_prompts(own, num_prompts, population, seed=seed, strata=strata)
        available = [population if strata is None else labels.count(labels[prompt]) for prompt in own.tolist()]
        assert rows.dtype == torch.int64
        assert rows.shape == (len(own), min(num_prompts, max(available)))
        assert rows[:, 0].equal(own)
        for row, count in zip(rows.tolist(), available, strict=True):
            drawn = row[: min(num_prompts, count)]
            assert row[len(drawn) :] == [-1] * (len(row) - len(drawn))
            assert len(set(drawn)) == len(drawn)
            assert all(0 <= prompt < population for prompt in drawn)
            assert strata is None or {labels[prompt] for prompt in drawn} == {labels[row[0]]}


def test_a_draw_depends_on_seed_row_and_own_prompt_and_on_nothing_else():
    own = torch.randint(1000, (50,), generator=torch.Generator().manual_seed(0))
    rows = sample_prompts(own, 8, 1000, seed=4)
    assert rows.equal(sample_prompts(own, 8, 1000, seed=4))
    assert rows[:20].equal(sample_prompts(own[:20], 8, 1000, seed=4))
    changed = own.clone()
    changed[7] = (own[7] + 1) % 1000
    same = (rows == sample_prompts(changed, 8, 1000, seed=4)).all(1)
    assert same.sum() == 49 and not same[7]
    for seed in (5, 6, -4):
        assert (rows[:, 1:] == sample_prompts(own, 8, 1000, seed=seed)[:, 1:]).double().mean() < 0.05
    alike = sample_prompts(torch.full((50,), 3), 8, 1000, seed=4)
    assert len(alike.unique(dim=0)) == 50
    assert sample_prompts(own, 8, 1000, seed=4, strata=torch.zeros(1000, dtype=torch.int32)).equal(rows)


@pytest.mark.parametrize("stratified", (False, True))
def test_all_others_are_equally_likely_in_every_column_and_pair_of_columns(stratified):
    # 7 others; with strata they are the odd numbers.
    population, step = (16, 2) if stratified else (8, 1)
    strata = torch.arange(population) % 2 if stratified else None
    own_prompt = 7 if stratified else 3
    draws = 4000
    rows = sample_prompts(torch.full((draws,), own_prompt), 4, population, seed=9, strata=strata)
    others = torch.tensor([p for p in range(1 if stratified else 0, population, step) if p != own_prompt])
    assert len(others) == 7
    for column in (1, 2, 3):
        counts = (rows[:, column, None] == others).sum(0).double()
        assert ((counts - draws / 7) ** 2 / (draws / 7)).sum() < chi_square_bound(6)
    for first, second in ((1, 2), (1, 3), (2, 3)):
        _, counts = (rows[:, first] * population + rows[:, second]).unique(return_counts=True)
        assert len(counts) == 42
        assert ((counts.double() - draws / 42) ** 2 / (draws / 42)).sum() < chi_square_bound(41)


def test_within_a_stratum_prompts_are_counted_in_their_order():
    labels = torch.arange(300) % 2
    rows = sample_prompts(torch.full((4,), 30), 20, 300, seed=5, strata=labels)
    for number, row in enumerate(rows.tolist()):
        drawn = np.random.default_rng([5, number, 30]).choice(149, size=19, replace=False)
        others = [prompt for prompt in range(0, 300, 2) if prompt != 30]
        assert row == [30, *(others[place] for place in drawn)]


def test_draws_from_a_large_population_are_spread_evenly():
    rows = sample_prompts(torch.arange(5000), 9, 100000, seed=0)
    counts = torch.histc(rows[:, 1:].double(), bins=50, min=0, max=100000)
    assert ((counts - 800) ** 2 / 800).sum() < chi_square_bound(49)


def test_no_pairs_draw_nothing():
    assert sample_prompts(torch.zeros(0, dtype=torch.long), 3, 5, seed=0).shape[0] == 0
