"""Pairs dealt out to processes by cost: every pair once, equally many each, and nothing but the share changes."""

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from inform_rm.training.balance import BalancedSampler, balanced, costs_of, pair_costs

COSTS = st.lists(st.integers(1, 1000), min_size=1, max_size=24)


class Rows(list):
    """A sampler whose order an epoch decides."""

    def set_epoch(self, epoch):
        self[:] = np.random.default_rng(epoch).permutation(sorted(self)).tolist()


def test_a_cost_is_the_tokens_and_what_each_of_them_sees():
    # A prompt of 4; responses of 2 and 1: seen are 4 * 4 / 2, 2 * (4 + 1) and 1 * (4 + 1 / 2).
    assert pair_costs([4], ([2], [1]), hidden_size=10).tolist() == [7 + (8 + 10 + 4.5) / 80]


def test_costs_of_encoded_rows_are_those_of_their_lengths():
    pairs = {"prompt_length": [2, 1], "chosen_input_ids": [[5] * 6, [5] * 3], "rejected_input_ids": [[5] * 3, [5] * 9]}
    expected = [*pair_costs([2, 1], ([4, 2], [1, 8]), 16)]
    assert costs_of(Dataset.from_dict(pairs), 16).tolist() == expected
    both = zip(pairs["chosen_input_ids"], pairs["rejected_input_ids"], strict=True)
    groups = {"prompt_length": [2, 1], "responses_input_ids": [list(sides) for sides in both]}
    assert costs_of(Dataset.from_dict(groups), 16).tolist() == pytest.approx(expected)


@given(costs=COSTS, parts=st.integers(1, 6))
def test_lists_are_equally_long_hold_everything_once_and_differ_by_at_most_the_largest_cost(costs, parts):
    costs = costs * parts
    found = balanced(costs, parts)
    assert sorted(place for part in found for place in part) == list(range(len(costs)))
    assert {len(part) for part in found} == {len(costs) // parts}
    assert found == balanced(costs, parts)
    sums = [sum(costs[place] for place in part) for part in found]
    in_order = [sum(costs[start : start + len(costs) // parts]) for start in range(0, len(costs), len(costs) // parts)]
    assert max(sums) <= max(max(costs) + np.mean(sums), max(in_order))


def test_the_best_split_of_a_small_example_is_found():
    assert [sum([8, 7, 6, 5][place] for place in part) for part in balanced([8, 7, 6, 5], 2)] == [13, 13]


@given(
    number=st.integers(1, 70), batch_size=st.integers(1, 4), processes=st.integers(1, 4), accumulated=st.integers(1, 3)
)
def test_an_update_has_the_pairs_that_one_process_would_learn_from(number, batch_size, processes, accumulated):
    costs = np.random.default_rng(number).lognormal(size=number)
    plain, inner = Rows(range(number)), Rows(range(number))
    sampler = BalancedSampler(inner, costs, batch_size, processes, accumulated)
    orders = []
    for epoch in (0, 1, 1):
        plain.set_epoch(epoch)
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(order) == len(sampler) == number
        update, a_pass = batch_size * processes * accumulated, batch_size * processes
        for start in range(0, number, update):
            assert sorted(order[start : start + update]) == sorted(plain[start : start + update])
        assert order[number - number % a_pass :] == plain[number - number % a_pass :]
        orders.append(order)
    assert orders[1] == orders[2]


@pytest.mark.parametrize("processes", (4, 16))
def test_processes_wait_less(processes):
    generator = np.random.default_rng(0)
    costs = generator.lognormal(5, 1, 16 * 8 * processes)

    def waiting(rows):
        shares = costs[list(rows)].reshape(-1, processes, 8).sum(axis=2)
        return (shares.max(axis=1) / shares.mean(axis=1)).mean() - 1

    before, after = waiting(range(len(costs))), waiting(BalancedSampler(range(len(costs)), costs, 8, processes))
    assert after < 0.4 * before
