"""When the KL term begins: a warm-up by steps, and by what preferences have earned."""

import dataclasses
import logging
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inform_rm.training.kl_warmup import KLWarmup
from inform_rm.training.run import train


def weights(steps, total=10, nats=0.0, earned=None, beta=0.1):
    """The weight at each step of a run whose updates, of 64 pairs, earn ``earned(step)`` nats a pair."""
    warmup, found = KLWarmup(beta, steps, nats), []
    for step in range(total):
        found.append(warmup.weight(step, total))
        if earned is not None:
            warmup.add(64, 64 * (math.log(2) - earned(step)))
    return found


def test_the_weight_is_beta_without_warm_up_and_never_falls():
    assert weights(0) == [0.1] * 10
    for steps in (0.25, 3, 20):
        found = weights(steps)
        assert found[0] == 0 and found == sorted(found) and max(found) <= 0.1
    assert weights(0.25)[5] == 0.1  # 2.5 steps without, 2.5 steps of rise


def test_steps_are_steps_from_1_on_and_below_parts_of_the_run():
    assert [weights(10, 100)[step] for step in (10, 15, 20, 99)] == pytest.approx([0, 0.05, 0.1, 0.1])
    assert [weights(1, 100)[step] for step in (1, 2, 3)] == pytest.approx([0, 0.1, 0.1])
    assert [weights(0.4, 100)[step] for step in (40, 60, 80)] == pytest.approx([0, 0.05, 0.1])


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({"steps": 0.1, "nats": 0.02, "earned": lambda step: 0.05}, 10),  # earned before: no longer than without
        ({"steps": 0.1, "nats": 0.02, "earned": lambda step: 0.05 * (step >= 20)}, 25),  # a mean
        ({"steps": 0.1, "nats": 0.02, "earned": lambda step: 9.0 * (step >= 10)}, 11),
        ({"steps": 0.1, "nats": 0.02, "earned": lambda step: -0.01}, 40),
        ({"steps": 0.6, "nats": 0.02, "earned": lambda step: -0.01}, 60),
        ({"steps": 0.1, "nats": 0.0, "earned": lambda step: -0.01}, 10),
        ({"steps": 0, "nats": 0.02, "earned": lambda step: -0.01}, 0),
    ],
)
def test_it_waits_for_what_preferences_earn_but_not_for_ever(settings, length, caplog):
    with caplog.at_level(logging.INFO, logger="inform_rm.training.kl_warmup"):
        found = weights(total=100, **settings)
    expected = [0.1 if step >= 2 * length else 0.1 * max(0, step / length - 1) for step in range(100)]
    assert found == pytest.approx(expected)
    waited = length > settings["steps"] * 100
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == waited and all(f"begins after {length} of 100 steps" in line for line in said)


@given(st.lists(st.tuples(st.integers(0, 300), st.floats(0, 5)), min_size=1, max_size=20))
def test_what_is_earned_is_a_mean_that_forgets(updates):
    warmup = KLWarmup(0.1, 0.1, 0.02)
    for pairs, loss in updates:
        warmup.add(pairs, pairs * loss)
    after = [sum(pairs for pairs, _ in updates[place + 1 :]) for place in range(len(updates))]
    shares = [
        (1 - math.exp(-pairs / 640)) * math.exp(-later / 640) for (pairs, _), later in zip(updates, after, strict=True)
    ]
    if sum(shares):
        mean = sum(share * (math.log(2) - loss) for share, (_, loss) in zip(shares, updates, strict=True)) / sum(
            shares
        )
        assert warmup.earned == pytest.approx(mean, abs=1e-9)
    else:
        assert warmup.earned == 0


def test_a_checkpoint_holds_it(tmp_path):
    warmup, other = KLWarmup(0.1, 0.1, 0.02), KLWarmup(0.1, 0.1, 0.02)
    for _ in range(3):
        warmup.add(64, 40)
    other.begin(tmp_path)  # an earlier version did not wait, and wrote nothing
    assert other.nats == 0
    other.nats = 0.02
    warmup.save(tmp_path)
    other.begin(tmp_path)
    assert vars(other) == vars(warmup) and warmup.earned > 0.02
    assert [each.weight(10, 100) for each in (warmup, other)] == [0, 0]
    warmup.save(tmp_path)
    other.begin(tmp_path)
    assert other.length == 10 and not other.waits
    other.begin(None)
    assert other.length is None and other.earned == 0


def test_a_run_waits_for_its_preferences(base_settings):
    """In steps of 1e-6 nothing is learnt: beta, which is large, shows when the term begins."""
    settings = base_settings(
        beta=100.0, kl_warmup_steps=0.2, learning_rate=1e-6, max_steps=10, logging_steps=1,
        per_device_train_batch_size=8, gradient_accumulation_steps=1, save_steps=10,
    )  # fmt: skip

    def begins(name, **changes):
        log = train(dataclasses.replace(settings, output_dir=f"{settings.output_dir}-{name}", **changes))[
            "log_history"
        ]
        return next(line["step"] for line in log if "loss" in line and line["loss"] > 2)

    assert begins("waits") == 6  # the first update with a weight is that after 4 finished ones, whose weight is 0
    assert begins("not", kl_warmup_nats=0) == 4
