"""Training on rankings and scored responses: as pairs where they are pairs, mixed, packed, resumed, refused."""

import json

import numpy as np
import pytest
import scipy.stats
import torch
from transformers import AutoTokenizer

from inform_rm import RewardTrainer
from inform_rm.errors import InputError
from inform_rm.training.collators import PackedPairCollator, PairCollator
from inform_rm.training.losses import group_loss
from inform_rm.training.reward_arguments import arguments_from_mapping
from inform_rm.training.run import train

WORDS = ["sky", "sea", "grass", "rose", "apple", "basket", "colour", "fruit", "blue", "green"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pair_rows(number):
    return [
        {"prompt": f"Name a {WORDS[at % 10]} and {at}", "chosen": "The sea is calm " * (1 + at % 3),
         "rejected": f"Seven {WORDS[(at + 3) % 10]}"}
        for at in range(number)
    ]  # fmt: skip


def ranking_rows(number):
    rows = []
    for at in range(number):
        most = 2 + at % 3
        responses = [f"The {WORDS[(at + k) % 10]} is {'calm ' * (1 + (k * 7 + at) % 4)}" for k in range(most)]
        ranks = [1 + (k + at) % most for k in range(most)]
        rows.append({"prompt": f"Write about {WORDS[at % 10]} {at}", "responses": responses, "ranks": ranks})
    rows[2]["ranks"] = [1, 2, 2, 1][: len(rows[2]["responses"])]
    return rows


def scored_rows(number):
    return [
        {"prompt": f"How many {WORDS[at % 10]}?", "response": f"There are {WORDS[at % 7]} {at}", "score": at % 5 / 2}
        for at in range(number)
    ]


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "pairs.jsonl", pair_rows(30))


@pytest.fixture
def files(tmp_path):
    return {
        "pairs": write(tmp_path / "pairs.jsonl", pair_rows(12)),
        "rankings": write(tmp_path / "rankings.jsonl", ranking_rows(12)),
        "scores": write(tmp_path / "scores.jsonl", scored_rows(12)),
    }


def weights_of(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def trained(args):
    trainer = RewardTrainer(args=args)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("batching", "ranking_loss"), [("packed", "all_pairs"), ("padded", "all_pairs"), ("packed", "plackett_luce")]
)
def test_rankings_of_two_train_as_pairs_do(base_settings, pairs_file, tmp_path, batching, ranking_loss):
    as_rankings = [
        {"prompt": row["prompt"], "responses": [row["rejected"], row["chosen"]], "scores": [0, at]}
        for at, row in enumerate(pair_rows(30), start=1)
    ]
    file = write(tmp_path / "rankings.jsonl", as_rankings)
    options = {"batching": batching, "tokens_per_batch": 100 if batching == "packed" else None}
    pairs = trained(base_settings(**options))
    rankings = trained(
        base_settings(**options, ranking_loss=ranking_loss, data=(str(file),), output_dir=str(tmp_path / "other"))
    )
    for one, other in zip(pairs.state.log_history[:-1], rankings.state.log_history[:-1], strict=True):
        for name in ("loss", "grad_norm", "accuracy", "margin", "reward_mean", "reward_std", "kl_nats"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
        assert other["kendall_tau"] == pytest.approx(2 * one["accuracy"] - 1)
    expected = weights_of(pairs)
    for name, value in weights_of(rankings).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_the_three_layouts_train_in_one_run(base_settings, files):
    evaluation = tuple(map(str, files.values()))
    result = train(base_settings(data=evaluation, eval_data=evaluation, eval_steps=3, max_steps=9))
    counts = result["train_pairs"]
    assert counts["layouts"] == ["pair", "ranking", "scored"] and counts["rows"] == 36
    assert result["budget"] is None  # of a score ln 2 says nothing
    untied = [sum(one < other for one in row["ranks"] for other in row["ranks"]) for row in ranking_rows(12)]
    assert counts["pairs"] == 12 + sum(untied) and len(result["data_fingerprints"]) == 3
    found = result["evaluation"]
    assert (found["num_pairs"], found["num_prompts"], found["num_scored"]) == (counts["pairs"], 24, 12)
    assert -1 <= found["kendall_tau"] <= 1 and found["rmse"] > 0
    low, high = found["accuracy_interval"]
    assert low < found["accuracy"] < high
    assert any("rmse" in line and "kendall_tau" in line for line in result["log_history"] if "loss" in line)


def test_batching_and_its_split_change_nothing(base_settings, files, tmp_path):
    data = tuple(map(str, files.values()))
    runs = [
        trained(base_settings(data=data, output_dir=str(tmp_path / str(number)), max_steps=4, **options))
        for number, options in enumerate(
            ({"batching": "padded"}, {"batching": "packed", "tokens_per_batch": 10_000}, {"tokens_per_batch": 60})
        )
    ]
    for other in runs[1:]:
        for name, value in weights_of(other).items():
            torch.testing.assert_close(value, runs[0].model.state_dict()[name], rtol=1e-3, atol=2e-5)


def test_evaluation_is_that_of_scipy_on_the_rewards(base_settings, files):
    trainer = RewardTrainer(
        args=base_settings(data=(str(files["rankings"]),), eval_data=(str(files["rankings"]), str(files["scores"])))
    )
    found = trainer.evaluate()
    predicted = trainer.predict(trainer.eval_pairs.dataset).predictions
    by_tau, gaps, losses, errors = [], [], [], []
    for rows, labels in zip(predicted, trainer.eval_pairs.dataset["labels"], strict=True):
        rows = rows[rows[:, 3] == 1]
        assert sorted(rows[:, 1]) == pytest.approx(sorted(labels))
        if len(rows) == 1:
            errors.append(rows[0, 0] - rows[0, 1])
            continue
        by_tau.append(scipy.stats.kendalltau(rows[:, 0], rows[:, 1]).statistic)
        gaps += [one[0] - other[0] for one in rows for other in rows if one[1] > other[1]]
        of_one = torch.zeros(len(rows), dtype=torch.long)
        losses.append(group_loss(torch.tensor(rows[:, 0]), torch.tensor(rows[:, 1]), of_one).item())
    assert found["eval_kendall_tau"] == pytest.approx(np.mean(by_tau))
    assert found["eval_accuracy"] == pytest.approx(np.mean(np.sign(gaps) / 2 + 0.5))
    assert found["eval_bradley_terry_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["eval_rmse"] == pytest.approx(np.sqrt(np.mean(np.square(errors))))


def test_a_batch_holds_each_prompt_once_and_rewards_stay_in_order(files, causal_lm_dir, base_settings):
    trainer = RewardTrainer(args=base_settings(data=(str(files["rankings"]), str(files["scores"]))))
    rows = [trainer.train_dataset[at] for at in (2, 13, 5, 1)]
    padded = PairCollator(AutoTokenizer.from_pretrained(causal_lm_dir("llama")))(rows)
    packed = PackedPairCollator()(rows)
    for name in ("labels", "groups", "margin"):
        assert padded[name].tolist() == packed[name].tolist()
    once = sum(
        row["prompt_length"] + sum(len(ids) - row["prompt_length"] for ids in row["responses_input_ids"])
        for row in rows
    )
    assert packed["input_ids"].shape == (1, once)
    assert padded["labels"][:4].tolist() == [max(row["labels"]) for row in rows]
    split = PackedPairCollator(tokens_per_batch=1)(rows)
    places = torch.cat([row["places"] for row in split["rows"]])
    assert sorted(places.tolist()) == list(range(len(padded["labels"])))
    labels = torch.cat([row["labels"] for row in split["rows"]])
    assert labels[places.argsort()].tolist() == padded["labels"].tolist()


def test_rows_in_memory_and_other_evaluation_data(base_settings):
    args = base_settings(data=(), max_steps=2)
    trainer = RewardTrainer(args.model, args, train_dataset=ranking_rows(10), eval_dataset=pair_rows(6))
    trainer.train()
    assert trainer.evaluate()["eval_num_pairs"] == 6
    assert trainer.evaluate(scored_rows(5))["eval_num_scored"] == 5
    assert trainer.evaluate(ranking_rows(5))["eval_num_prompts"] == 5


def test_a_scored_run_is_a_regression(base_settings, files):
    result = train(base_settings(data=(str(files["scores"]),), eval_data=(str(files["scores"]),), beta=0.0,
                                 learning_rate=3e-3, max_steps=30, score_loss_coefficient=2.0))  # fmt: skip
    logged = [line for line in result["log_history"] if "rmse" in line]
    assert logged[0]["loss"] == pytest.approx(2 * logged[0]["rmse"] ** 2, rel=1e-4)
    assert "accuracy" not in logged[0] and "accuracy" not in result["evaluation"]
    assert result["evaluation"]["rmse"] < logged[0]["rmse"]


def test_a_killed_mixed_run_goes_on_as_if_nothing_had_been(base_settings, files, train_and_kill, tmp_path):
    options = {"data": tuple(map(str, files.values())), "ranking_loss": "plackett_luce"}
    whole = train(base_settings(**options, output_dir=str(tmp_path / "whole")))
    config = base_settings(**options)
    train_and_kill(config, 3)
    resumed = train(config)
    losses = [[line["loss"] for line in result["log_history"] if "loss" in line] for result in (whole, resumed)]
    assert losses[0] == losses[1]


def test_the_cache_gives_the_same_groups_and_keeps_refusing(base_settings, files, tmp_path):
    first = RewardTrainer(args=base_settings(data=(str(files["rankings"]),))).train_pairs
    again = RewardTrainer(args=base_settings(data=(str(files["rankings"]),))).train_pairs
    assert again.counts == first.counts and again.dataset[:] == first.dataset[:]
    with pytest.raises(
        InputError, match="loss_type 'scaled_bradley_terry' does not go with rows of the layout ranking"
    ):
        RewardTrainer(args=base_settings(data=(str(files["rankings"]),), loss_type="scaled_bradley_terry"))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("rankings", {"objective": "prioritized"}, "objective 'prioritized' does not go with .* chooses among pairs"),
        ("rankings", {"augmentation": "rrm"}, "augmentation 'rrm' does not go with .* adds pairs to pairs"),
        ("scores", {"label_smoothing": 0.1}, "label_smoothing does not go with rows of the layout scored"),
        ("scores", {"center_rewards_coefficient": 0.1}, "center_rewards_coefficient does not go with rows"),
        ("rankings", {"streaming": True}, "Rankings and scored responses have a file of their own"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_with_its_name(base_settings, files, kind, settings, message):
    with pytest.raises(InputError, match=message):
        train(base_settings(data=(str(files[kind]),), **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "hinge"}, "loss_type 'hinge' does not go with ranking_loss 'plackett_luce'"),
        ({"label_smoothing": 0.1}, "label_smoothing does not go with ranking_loss"),
        ({"center_rewards_coefficient": 0.1}, "center_rewards_coefficient does not go with ranking_loss"),
        ({"score_loss_coefficient": -1.0}, "score_loss_coefficient must be a finite number of at least 0"),
    ],
)
def test_plackett_luce_refuses_what_is_about_pairs(base_settings, settings, message):
    with pytest.raises(InputError, match=message):
        base_settings(ranking_loss="plackett_luce", **settings)


def test_too_many_ties_are_refused_before_training(base_settings, tmp_path):
    row = {"prompt": "?", "responses": [f"{WORDS[at % 10]} {at}" for at in range(12)], "ranks": [1] * 11 + [2]}
    file = write(tmp_path / "ties.jsonl", [row])
    with pytest.raises(InputError, match=r"at most 10 above others; row ties/1 has 11\. Choose all_pairs"):
        RewardTrainer(args=base_settings(data=(str(file),), ranking_loss="plackett_luce"))


def test_the_best_model_of_scores_needs_a_metric_that_is_there(base_settings, files):
    best = {"load_best_model_at_end": True, "eval_steps": 3, "data": (str(files["scores"]),)}
    with pytest.raises(InputError, match="metric_for_best_model 'accuracy' is about comparisons"):
        RewardTrainer(args=base_settings(**best, eval_data=(str(files["scores"]),)))
    with pytest.raises(InputError, match="'eval_rmse' is an error: set greater_is_better false"):
        RewardTrainer(args=base_settings(**best, eval_data=(str(files["scores"]),), metric_for_best_model="eval_rmse"))


@pytest.mark.parametrize("given", [["helpfulness=0.65", "correctness=-1"], {"helpfulness": 0.65, "correctness": -1}])
def test_score_weights_are_read_from_flags_and_yaml(given):
    args = arguments_from_mapping({"model": "m", "data": "d", "output_dir": "o", "score_weights": given}, "test")
    assert args.score_weights == {"helpfulness": 0.65, "correctness": -1.0}


@pytest.mark.parametrize("given", ["helpfulness", ["a=1", "a=2"], {"a": "b"}, {"a": True}, {}, 3])
def test_weights_that_are_none_are_refused(given):
    with pytest.raises(InputError, match="score_weights"):
        arguments_from_mapping({"model": "m", "data": "d", "output_dir": "o", "score_weights": given}, "test")


def test_a_ranking_is_one_of_the_pairs_of_a_step(base_settings, files):
    divided = {"per_device_train_batch_size": None, "gradient_accumulation_steps": None, "pairs_per_step": 5}
    trainer = RewardTrainer(args=base_settings(data=(str(files["rankings"]),), **divided))
    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer.args.pairs_of_step == len(batch["margin"]) == 5 < len(batch["labels"])
