"""What a beta pays for: by quadrature and simulation; and the warnings of runs that hold too much or nothing."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.optimize import minimize

from inform_rm.training.budget import BudgetWatch, budget_lines, budget_of_run, kl_budget, most_flips, teachable_nats
from inform_rm.training.kl_warmup import KLWarmup
from inform_rm.training.run import train

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(81)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def whole_loss(parameters, beta, flip_rate):
    """Eq. 25 for pairs that are told apart by one latent, N(m, v) and N(-m, v), with decoder a s; exact over noise."""
    m, log_v, a = parameters
    gap = a * (2 * m + np.sqrt(2 * np.exp(log_v)) * NODES)
    preference = (WEIGHTS * ((1 - flip_rate) * np.logaddexp(0, -gap) + flip_rate * np.logaddexp(0, gap))).sum()
    kl = 0.5 * (m**2 + np.exp(log_v) - 1 - log_v)
    return preference + beta * 2 * kl, preference, kl


@pytest.mark.parametrize("flip_rate", [0.0, 0.1, 0.25])
@pytest.mark.parametrize("beta", [0.3, 0.1, 0.01])
def test_no_minimum_holds_more_than_its_budget(beta, flip_rate):
    starts = [(m, log_v, a) for m in (0.1, 2.0) for log_v in (0.0, -3.0) for a in (0.5, 3.0)]
    found = [
        minimize(
            lambda at: whole_loss(at, beta, flip_rate)[0], start, method="Nelder-Mead", options={"maxiter": 2000}
        ).x
        for start in starts
    ]
    best = min(found, key=lambda at: whole_loss(at, beta, flip_rate)[0])
    loss, preference, kl = whole_loss(best, beta, flip_rate)
    entropy = -sum(p * np.log(p) for p in (flip_rate, 1 - flip_rate) if p)
    assert teachable_nats(flip_rate) == pytest.approx(np.log(2) - entropy)
    assert preference >= entropy - 1e-9 and loss <= np.log(2) + 1e-9
    assert kl <= kl_budget(beta, flip_rate)
    if beta == 0.01:
        assert 0.9 < kl < 1.3  # one latent that is as good as can be needs no more


def test_a_mean_over_both_responses_pays_for_twice_as_much():
    assert kl_budget(0.1, 0.25, kl_share=0.5) == pytest.approx(2 * kl_budget(0.1, 0.25))
    assert kl_budget(0.0) == np.inf


def test_the_limit_of_wrong_labels_holds_whatever_the_model_gets_right():
    rng = np.random.default_rng(0)
    flip_rate = rng.uniform(0, 0.5, 1000)
    right = rng.uniform(0.5, 1, 1000)  # of the true labels
    agreeing = rng.binomial(200, (1 - flip_rate) * right + flip_rate * (1 - right))
    limits = np.array([most_flips(number / 200, 200)[1] for number in agreeing])
    assert np.mean(limits >= flip_rate) > 0.975
    best = rng.binomial(200, 1 - flip_rate)  # a model that is always right: there the bound is tight
    shares, limits = np.transpose([most_flips(number / 200, 200) for number in best])
    assert np.mean(limits >= flip_rate) > 0.96 and abs(np.mean(shares - flip_rate)) < 0.01


SETTINGS = {"architecture": "inform", "loss_type": "bradley_terry", "ranking_loss": "all_pairs", "beta": 0.1}


def test_what_a_run_records_and_says():
    assert budget_of_run({**SETTINGS, "architecture": "standard"}, 1.0, None) is None
    assert budget_of_run({**SETTINGS, "loss_type": "hinge"}, 1.0, None) is None
    assert budget_of_run(SETTINGS, 1.0, None) == {"nats_per_response": pytest.approx(np.log(2) / 0.2)}
    found = budget_of_run(SETTINGS, 1.0, {"accuracy": 0.75, "num_pairs": 400})
    assert found["flip_rate_at_most"] == 0.25 < found["flip_rate_limit"] < 0.3
    assert found["nats_per_response_at_that"] == pytest.approx(0.1308 / 0.2, abs=1e-3)
    first, second = budget_lines(SETTINGS, found, 2.0)
    assert first == (
        "beta 0.1 pays for at most 3.47 nats a response (ln 2 / 2 beta), or 0.654 if a quarter of the labels is wrong"
    )
    assert second.startswith("labels: at most 25 % can be wrong at random") and second.endswith("this model uses 2")
    ranked = {"accuracy": 0.75, "num_pairs": 400, "num_prompts": 9}
    assert "flip_rate_at_most" not in budget_of_run(SETTINGS, 1.0, ranked)


def watched(lines, *, beta=0.1, warmup=0.25, steps=100, kl_share=1.0, pairs=64, loss="bradley_terry"):
    """What is warned of a run with log lines ``step: (accuracy, kl, information)``."""
    kl_warmup = KLWarmup(beta, warmup)
    watch = BudgetWatch(kl_warmup)
    args = SimpleNamespace(pairs_of_step=pairs, kl_warmup_steps=warmup, beta=beta, loss_type=loss)
    model = SimpleNamespace(config=SimpleNamespace(kl_share=kl_share))
    for step, (accuracy, kl, information) in lines.items():
        state = SimpleNamespace(global_step=step, max_steps=steps, is_world_process_zero=True)
        kl_warmup.weight(step, steps)
        logs = {"accuracy": accuracy, "kl_nats": kl, "label_information_nats": information}
        watch.on_log(args, state, None, logs=logs, model=model)
    return watch.warned


TENS = range(10, 101, 10)


@pytest.mark.parametrize(
    ("lines", "settings", "expected"),
    [
        (dict.fromkeys(TENS, (0.52, 0.01, 0.0)), {}, "empty"),
        (dict.fromkeys(TENS, (0.52, 0.01, 0.0)), {"warmup": 0}, "empty"),
        (dict.fromkeys(range(10, 51, 10), (0.52, 0.01, 0.0)), {}, None),  # it may still come: beta is not whole yet
        (dict.fromkeys(TENS, (0.52, 0.01, 0.0)), {"warmup": 60}, None),
        (dict.fromkeys(TENS, (0.70, 0.01, 0.1)), {}, None),  # little, but it tells something
        (dict.fromkeys(TENS, (0.52, 2.0, 0.0)), {"beta": 0.001}, None),
        (dict.fromkeys(TENS, (0.52, 0.01, 0.0)), {"pairs": 2}, None),  # 100 pairs
        (dict.fromkeys(TENS, (0.57, 0.25, 0.005)), {"beta": 0.01}, "empty"),  # hardly anything, far below its price
        (dict.fromkeys(TENS, (0.57, 0.25, 0.015)), {"beta": 0.01}, None),
        (dict.fromkeys(TENS, (0.57, 1.2, 0.005)), {"beta": 0.001}, None),  # it does carry something
        (dict.fromkeys(TENS, (0.57, 0.25, 0.005)), {"loss": "hinge"}, None),  # of which ln 2 says nothing
        (dict.fromkeys(TENS, (0.90, 66.0, 0.4)), {}, "overspent"),  # 13 nats a pair for 0.4
        (dict.fromkeys(range(10, 71, 10), (0.90, 66.0, 0.4)), {}, None),  # the KL term has just begun
        (dict.fromkeys(TENS, (0.75, 5.0, 0.15)), {"beta": 0.01}, None),  # 0.1 for 0.15
        (dict.fromkeys(TENS, (0.75, 20.0, 0.13)), {"beta": 0.01}, "overspent"),  # 0.4 for 0.13
        (dict.fromkeys(TENS, (0.75, 20.0, 0.25)), {"beta": 0.01, "kl_share": 0.5}, None),  # 0.2 for 0.25
        (dict.fromkeys(TENS, (0.75, 20.0, 0.13)), {"beta": 0}, None),
    ],
)  # fmt: skip
def test_one_warning_for_latents_that_hold_nothing_or_too_much(lines, settings, expected, caplog):
    with caplog.at_level(logging.WARNING, logger="inform_rm.training.budget"):
        assert watched(lines, **settings) == expected
    assert len(caplog.records) == (expected is not None)
    for record in caplog.records:
        assert "kl_warmup_steps" in record.getMessage()


def test_after_a_resume_only_the_steps_since_then_count(caplog):
    kl_warmup = KLWarmup(0.1, 0)
    kl_warmup.weight(0, 1000)
    watch, args = (
        BudgetWatch(kl_warmup),
        SimpleNamespace(pairs_of_step=1, kl_warmup_steps=0, beta=0.1, loss_type="bradley_terry"),
    )
    state = SimpleNamespace(global_step=900, max_steps=1000, is_world_process_zero=True)
    watch.on_train_begin(args, state, None)
    state.global_step = 910  # ten pairs, not 910
    watch.on_log(args, state, None, logs={"accuracy": 0.4, "kl_nats": 0.01}, model=None)
    assert watch.warned is None and watch._sums[0] == 10


def test_a_run_says_that_its_kl_term_does_not_hold(base_settings, caplog):
    settings = base_settings(
        beta=1.0, kl_warmup_steps=0, learning_rate=1e-4, max_steps=12,
        per_device_train_batch_size=32, gradient_accumulation_steps=1, save_steps=12,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="inform_rm.training.budget"):
        result = train(settings)
    assert result["budget"] == {"nats_per_response": pytest.approx(np.log(2) / 2)}
    said = [record.getMessage() for record in caplog.records if record.name == "inform_rm.training.budget"]
    assert len(said) == 1 and said[0].startswith("The KL term does not hold yet: at step ")
    # ln 2 minus the loss without the KL term, which is logged with it.
    for line in result["log_history"][:-1]:
        assert line["label_information_nats"] == pytest.approx(
            np.log(2) - (line["loss"] - 2 * line["kl_nats"]), abs=1e-3
        )
