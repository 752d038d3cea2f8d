"""Evaluation on rankings and scored responses: figures against scipy, single rewards, files and pages."""

import json

import numpy as np
import pytest
import scipy.stats

from inform_rm import compare, decompose, evaluate
from inform_rm.cli.dispatch import main
from inform_rm.errors import InputError
from inform_rm.eval.group_statistics import bootstrap_ratio, ranking_statistics, score_statistics
from inform_rm.util.rankings import agreement

WORDS = ["sky", "sea", "grass", "rose", "apple", "basket"]
RANKINGS = [
    {"prompt": f"Name {WORDS[at % 6]} {at}", "responses": [f"{WORDS[(at + k) % 6]} {k}" for k in range(2 + at % 4)],
     "scores": [(k * 5 + at) % (3 + at % 2) + 0.5 * (k == 0) for k in range(2 + at % 4)], "subset": "ab"[at % 2]}
    for at in range(14)
]  # fmt: skip
SCORED = [
    {
        "prompt": f"Name {WORDS[at % 6]}",
        "response": f"{WORDS[at % 5]} {at}",
        "helpfulness": at % 5,
        "correctness": at % 3,
    }
    for at in range(12)
]
WEIGHTS = {"helpfulness": 0.65, "correctness": 0.8}


@pytest.fixture(params=range(5))
def drawn(request):
    generator = np.random.default_rng(request.param)
    number = generator.integers(2, 7)
    labels = generator.integers(0, 3, number).astype(float)
    labels[:2] = (0, 1)
    return generator.integers(0, 4, number) / 2, labels


def test_agreement_is_scipys_tau_and_counting(drawn):
    rewards, labels = drawn
    found = agreement(rewards, labels)
    expected = scipy.stats.kendalltau(rewards, labels).statistic
    assert found.tau == pytest.approx(0.0 if np.isnan(expected) else expected)
    gaps = [r - s for r, x in zip(rewards, labels) for s, y in zip(rewards, labels) if x > y]  # noqa: B905
    assert (found.num_pairs, found.num_ties) == (len(gaps), gaps.count(0))
    assert found.num_right == sum((gap > 0) + 0.5 * (gap == 0) for gap in gaps)
    assert found.margin == pytest.approx(sum(gaps))
    top = [label == max(labels) for reward, label in zip(rewards, labels, strict=True) if reward == max(rewards)]
    assert found.top == pytest.approx(sum(top) / len(top))


def test_a_model_that_says_nothing_has_no_correlation_and_half_the_pairs():
    found = agreement([1.0, 1.0, 1.0], [3, 2, 1])
    assert (found.tau, found.num_right, found.num_ties) == (0.0, 1.5, 3)
    assert found.top == pytest.approx(1 / 3)


def test_rankings_of_a_perfect_and_of_a_reversed_model():
    labels = [[1, 2, 3], [5, 1], [1, 1, 0]]
    right = ranking_statistics(labels, labels, ["a", "a", "b"])
    assert (right["kendall_tau"], right["accuracy"], right["top_1_accuracy"]) == (1, 1, 1)
    assert (right["num_pairs"], right["num_prompts"], right["num_responses"]) == (6, 3, 8)
    assert right["subsets"]["b"]["num_pairs"] == 2
    wrong = ranking_statistics([[-y for y in row] for row in labels], labels, ["a", "a", "b"])
    assert (wrong["kendall_tau"], wrong["accuracy"], wrong["top_1_accuracy"]) == (-1, 0, 0)
    assert wrong["kendall_tau_interval"] == [-1, -1]


def test_the_bootstrap_of_a_mean_is_near_its_normal_interval():
    values = np.random.default_rng(0).normal(2, 1, 400)
    low, high = bootstrap_ratio(values, np.ones(400), 0)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    counts = np.random.default_rng(1).integers(1, 9, 400)
    wide = np.ptp(bootstrap_ratio(values * counts, counts, 0))
    assert wide > high - low  # unequal weights leave fewer rows that count


def test_score_statistics_are_scipys():
    generator = np.random.default_rng(3)
    rewards, scores = generator.normal(size=30), generator.normal(size=30)
    found = score_statistics(rewards, scores, ["a"] * 20 + ["b"] * 10)
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean((rewards - scores) ** 2)))
    assert found["mean_error"] == pytest.approx(np.mean(rewards - scores))
    assert found["pearson"] == pytest.approx(np.corrcoef(rewards, scores)[0, 1])
    ranks = scipy.stats.rankdata(rewards), scipy.stats.rankdata(scores)
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert found["subsets"]["b"]["num_scored"] == 10
    assert "pearson" not in score_statistics(np.ones(5), scores[:5], ["a"] * 5)


def test_an_evaluation_on_rankings_is_about_its_rewards(scorer, tmp_path, read_page):
    result = evaluate(scorer, RANKINGS, tmp_path / "out", progress=False)
    rewards = [scorer.score([row["prompt"]] * len(row["responses"]), row["responses"]).numpy() for row in RANKINGS]
    labels = [row["scores"] for row in RANKINGS]
    taus = [scipy.stats.kendalltau(*both).statistic for both in zip(rewards, labels, strict=True)]
    assert result.kendall_tau == pytest.approx(np.mean(taus), abs=1e-6)
    low, high = result.kendall_tau_interval
    assert low < result.kendall_tau < high
    best = [row[np.argmax(values)] == max(row) for row, values in zip(labels, rewards, strict=True)]
    assert result.top_1_accuracy == pytest.approx(np.mean(best))
    assert set(result.subsets) == {"a", "b"} and result.subsets["a"]["num_prompts"] == 7
    lines = [json.loads(line) for line in (tmp_path / "out" / "rankings.jsonl").open()]
    assert [line["rewards"] for line in lines] == [pytest.approx(values, abs=1e-5) for values in rewards]
    assert [line["labels"] for line in lines] == labels
    written = json.loads((tmp_path / "out" / "result.json").read_text())
    assert written["kendall_tau"] == result.kendall_tau and written["data"][0]["rows_read"] == 14
    page = read_page((tmp_path / "out" / "result.html").read_text(encoding="utf-8"))
    assert "Kendall's tau-b" in page.text and "bootstraps over prompts" in page.text
    assert ["all", "14"] in [row[:2] for row in page.rows]


def test_an_evaluation_on_scores_is_about_its_rewards(scorer, tmp_path, read_page):
    result = evaluate(scorer, SCORED, tmp_path / "out", progress=False, score_weights=WEIGHTS)
    rewards = scorer.score([row["prompt"] for row in SCORED], [row["response"] for row in SCORED]).numpy()
    scores = np.array([0.65 * row["helpfulness"] + 0.8 * row["correctness"] for row in SCORED])
    assert result.rmse == pytest.approx(np.sqrt(np.mean((rewards - scores) ** 2)), rel=1e-5)
    assert result.pearson == pytest.approx(scipy.stats.pearsonr(rewards, scores).statistic, abs=1e-5)
    assert result.settings["score_weights"] == WEIGHTS and result.num_scored == 12
    assert "RMSE" in read_page((tmp_path / "out" / "result.html").read_text(encoding="utf-8")).text
    assert len((tmp_path / "out" / "scored.jsonl").read_text().splitlines()) == 12


def test_layouts_are_evaluated_alone_and_pairs_are_needed_elsewhere(scorer):
    with pytest.raises(InputError, match="sources of several layouts"):
        evaluate(scorer, [RANKINGS, [{"prompt": "?", "response": "x", "score": 1}]], progress=False)
    with pytest.raises(InputError, match="layout 'ranking', where pair is needed"):
        decompose(scorer, RANKINGS, progress=False)
    for function in (evaluate, decompose):
        with pytest.raises(InputError, match="score_weights: for scored responses"):
            function(scorer, RANKINGS, progress=False, score_weights=WEIGHTS)
    with pytest.raises(InputError, match="models are compared on pairs"):
        compare(models={"one": scorer}, data=RANKINGS, progress=False)


def test_the_command_says_what_it_found(reward_dir, tmp_path, capsys):
    for name, rows, flags, said in (
        ("rankings", RANKINGS, [], "Kendall's tau-b"),
        ("scored", SCORED, ["--score-weights", "helpfulness=0.65", "correctness=0.8"], "RMSE"),
    ):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = ["evaluate", "--model", str(reward_dir), "--data", str(file), "--output", str(tmp_path / name)]
        assert main([*command, *flags]) == 0
        assert said in capsys.readouterr().out
