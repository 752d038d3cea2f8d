"""The stopping rule: Algorithm 1 of arXiv:2402.09345 by hand, planted jumps, noise, resuming."""

import json
import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inform_rm.errors import InputError
from inform_rm.eval.detection.early_stopping import RewardFallStopping
from inform_rm.eval.early_stopping import CSIEarlyStopping  # where it is promised

values = st.floats(0, 1e6).map(lambda value: round(value, 3))


def algorithm_1(sequence, ratio):
    """Straight from the pseudocode, each step from the whole history."""
    decisions = []
    for step in range(len(sequence)):
        changes = [abs(sequence[i] - sequence[i - 1]) for i in range(1, step + 1)]
        mean = sum(changes[:-1]) / len(changes[:-1]) if len(changes) > 1 else 0.0
        decisions.append(mean > 0 and changes[-1] > ratio * mean)
    return decisions


def test_written_out_sequence():
    """By hand, with max_change_ratio 2 (the columns are C, change, mean of the earlier changes, twice the mean).

    10; 12: 2; 11: 1, 2, 4; 14: 3, 1.5, 3 (equal: no); 9: 5, 2, 4 fires; 9: 0, 11/4, 5.5;
    14: 5, 11/5, 4.4 fires; 20: 6, 16/6, 5.33 fires; 21: 1, 22/7, 6.29
    """
    rule = CSIEarlyStopping(max_change_ratio=2.0)
    decisions = [rule.update(csi) for csi in (10, 12, 11, 14, 9, 9, 14, 20, 21)]
    assert decisions == [False, False, False, False, True, False, True, True, False]
    rule = CSIEarlyStopping(max_change_ratio=2.0)  # a power of 2 as unit changes nothing, to the last bit
    assert [rule.update(csi / 2**20) for csi in (10, 12, 11, 14, 9, 9, 14, 20, 21)] == decisions


@settings(max_examples=60)
@given(sequence=st.lists(st.integers(0, 60), max_size=30), ratio=st.sampled_from([1.0, 2.0, 5.0, 10.0]))
def test_decisions_are_those_of_the_pseudocode(sequence, ratio):
    rule = CSIEarlyStopping(ratio)
    history = algorithm_1(sequence, ratio)
    # Integers: the means may round, so steps that are equal up to rounding are left to the rule.
    for step, csi in enumerate(sequence):
        fires = rule.update(csi)
        changes = [abs(b - a) for a, b in pairwise(sequence[: step + 1])]
        if len(changes) > 1 and changes[-1] * (len(changes) - 1) == ratio * sum(changes[:-1]):
            assert not fires
        else:
            assert fires == history[step]


def test_fires_on_a_planted_jump_and_not_on_noise():
    # Six changes of about the noise's size first: from a single small one, noise alone can be a tenfold jump.
    known = [100.0, 103.0, 100.0, 103.0, 100.0, 103.0, 100.0]
    for seed in range(20):
        generator = random.Random(seed)
        for drift, jump in ((0, 60), (3, -80)):  # a fall counts as much as a rise
            values = known + [100 + drift * step + generator.gauss(0, 2) for step in range(60)]
            rule = CSIEarlyStopping()
            assert not any(rule.update(csi) for csi in values)
            assert rule.update(values[-1] + jump)


def test_no_value_fires_before_a_change_above_zero():
    rule = CSIEarlyStopping()
    assert [rule.update(csi) for csi in (0.0, 1e9)] == [False, False]
    rule = CSIEarlyStopping()
    assert [rule.update(csi) for csi in (3.0, 3.0, 3.0, 4.0)] == [False] * 4
    # Zeros count in the mean from then on: 1/3, so that 3.4 > 10/3 fires.
    assert rule.update(7.4)


@settings(max_examples=30)
@given(sequence=st.lists(values, min_size=1, max_size=20), cut=st.integers(0, 20))
def test_resuming_gives_the_same_decisions(sequence, cut):
    whole, first = CSIEarlyStopping(2.0), CSIEarlyStopping(2.0)
    decisions = [whole.update(csi) for csi in sequence]
    before = [first.update(csi) for csi in sequence[:cut]]
    second = CSIEarlyStopping(2.0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + [second.update(csi) for csi in sequence[cut:]] == decisions
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("csi", (math.nan, math.inf, -math.inf))
def test_no_number_is_refused_and_leaves_the_state(csi):
    rule = CSIEarlyStopping()
    rule.update(1.0)
    rule.update(2.0)
    state = rule.state_dict()
    with pytest.raises(InputError, match=r"csi: -?(nan|inf); no change from or to it"):
        rule.update(csi)
    assert rule.state_dict() == state


@pytest.mark.parametrize("ratio", (0, -1.0, math.nan, math.inf, True))
def test_wrong_ratio_is_named(ratio):
    with pytest.raises(InputError, match=r"max_change_ratio: .*; expected a number above 0"):
        CSIEarlyStopping(ratio)


def test_states_that_would_change_the_decisions_are_refused():
    with pytest.raises(InputError, match=r"max_change_ratio: 10, but the state comes from a rule with 5\.0"):
        CSIEarlyStopping().load_state_dict(CSIEarlyStopping(5.0).state_dict())
    for state in ({}, {"last_csi": 1.0}, {**CSIEarlyStopping().state_dict(), "other": 1}, None):
        with pytest.raises(InputError, match="expected the entries max_change_ratio, last_csi"):
            CSIEarlyStopping().load_state_dict(state)


@settings(max_examples=60)
@given(rewards=st.lists(st.integers(-30, 60), min_size=1, max_size=20), share=st.sampled_from([0.05, 0.1, 0.5]))
def test_a_fall_is_a_share_of_the_largest_gain_so_far(rewards, share):
    rule = RewardFallStopping(share)
    for step, reward in enumerate(rewards):
        largest = max(rewards[: step + 1])
        lost, limit = largest - reward, share * (largest - rewards[0])
        assert rule.update(reward) == (lost > limit)


def test_slow_falls_add_up_and_rises_say_nothing():
    rule = RewardFallStopping(0.1)
    assert not any(rule.update(0.1 * step) for step in range(101))  # to 10
    decisions = [rule.update(10 - 0.05 * step) for step in range(1, 41)]
    assert decisions.index(True) == 20  # the first below 9


def test_a_fall_within_chance_does_not_fire():
    for error, fires in ((0.0, True), (0.3, True), (0.4, False)):  # 1 against twice sqrt(2) times the error
        rule = RewardFallStopping(0.1)
        assert [rule.update(reward, error) for reward in (0.0, 5.0, 4.0)] == [False, False, fires]
    rule = RewardFallStopping(0.1)
    assert [rule.update(*step) for step in ((0.0, 0.0), (5.0, 0.0), (4.0, 0.5))] == 3 * [False]  # 1 is not above 1
    steps = ((0.0, 0.0), (5.0, 1.0), (5.0, 0.0), (4.0, 0.0))  # of equal largest ones the last counts
    rule = RewardFallStopping(0.1)
    assert [rule.update(*step) for step in steps] == [False, False, False, True]


@settings(max_examples=30)
@given(rewards=st.lists(st.integers(-30, 60), min_size=1, max_size=20), cut=st.integers(0, 20))
def test_resuming_the_fall_gives_the_same_decisions(rewards, cut):
    whole, first, second = RewardFallStopping(0.3), RewardFallStopping(0.3), RewardFallStopping(0.3)
    decisions = [whole.update(reward, 0.5) for reward in rewards]
    before = [first.update(reward, 0.5) for reward in rewards[:cut]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + [second.update(reward, 0.5) for reward in rewards[cut:]] == decisions
    with pytest.raises(InputError, match=r"max_reward_fall: 0\.1, but the state comes from a rule with 0\.3"):
        RewardFallStopping(0.1).load_state_dict(first.state_dict())


@pytest.mark.parametrize("reward", (math.nan, math.inf))
def test_a_reward_that_is_no_number_leaves_the_state(reward):
    rule, other = RewardFallStopping(), RewardFallStopping()
    for each in (rule, other):
        each.update(0.0)
    with pytest.raises(InputError, match="expected finite numbers"):
        rule.update(reward)
    assert vars(rule) == vars(other)


@pytest.mark.parametrize("share", (0, 1, -0.1, math.nan, True, False, "0.1"))
def test_wrong_share_is_named(share):
    with pytest.raises(InputError, match=r"max_reward_fall: .*; it is a share"):
        RewardFallStopping(share)
