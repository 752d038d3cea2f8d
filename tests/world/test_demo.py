import base64
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inform_rm import InfoRMForSequenceClassification
from inform_rm.errors import InputError
from inform_rm.eval.accuracy import pairwise_accuracy
from inform_rm.eval.best_of_n.simulate import kl_nats, overoptimization_curves
from inform_rm.hub.export import export_model
from inform_rm.scoring.scorer import RewardScorer
from inform_rm.world.demo import DemoBudget, check_loads_elsewhere, demo, paired_bootstrap_interval
from inform_rm.world.demo_report import TEST_SETS, console_table, write_demo_report
from inform_rm.world.worlds import WorldConfig, make_pairs

TINY = DemoBudget(
    reward_steps=8, pretrained_reward_steps=8, pairs_per_step=2, latent_dim=4, test_pairs=20, audited_pairs=12,
    num_prompts=3, attacked_prompts=12, responses_per_prompt=8,
)  # fmt: skip
ROWS = {name: make_pairs(WorldConfig(), name, 40) for name in TEST_SETS}


def made_up_curves():
    """Best-of-n of two models on eight prompts."""
    rng = np.random.default_rng(3)
    ns = [1, 2, 4, 8]
    gold = rng.normal(size=(8, 8))
    proxies = {
        model: overoptimization_curves(gold + noise * rng.normal(size=(8, 8)), gold, ns)
        for model, noise in (("standard", 1.0), ("inform", 0.5))
    }
    return {"ns": ns, "kl_nats": kl_nats(ns).tolist(), "proxies": proxies}


def made_up(inform_is_right, standard_is_right):
    """Rewards and result of a demo whose models rank each pair right with the given probability."""
    rng = np.random.default_rng(0)
    rewards = {}
    for model, share in (("standard", standard_is_right), ("inform", inform_is_right)):
        signs = {name: np.where(rng.random(40) < share, 1.0, -1.0) for name in TEST_SETS}
        rewards[model] = {name: np.column_stack([0.7 * sign, -0.5 * sign]) for name, sign in signs.items()}
    sets = {}
    for name, rows in ROWS.items():
        right = {model: 0.5 + 0.5 * np.sign(part[name] @ [1.0, -1.0]) for model, part in rewards.items()}
        difference = right["inform"] - right["standard"]
        sets[name] = {model: pairwise_accuracy(*part[name].T) for model, part in rewards.items()}
        sets[name]["longer_wins"] = pairwise_accuracy(*([len(row[s]) for row in rows] for s in ("chosen", "rejected")))
        sets[name]["inform_minus_standard"] = {
            "accuracy_difference": difference.mean(),
            "interval": paired_bootstrap_interval(difference),
        }
    result = {
        "settings": {"backbone": "<b>&amp;", "seed": 0, "num_prompts": 4},
        "world": {"style_bias": 0.5},
        "versions": {"torch": "0"},
        "model_parameters": {"standard": 10, "inform": 20},
        "train_pairs": 16,
        "data_fingerprints": {"world/in_distribution.jsonl": "0" * 64},
        "test_sets": sets,
        "decomposition": {
            model: {
                "num_pairs": 30,
                "response_decides": 0.5,
                "response_decides_interval": [0.3, 0.7],
                "sign_flips": 0.2,
                "correlations": {"words": {"prompt_free_gap": -0.31, "prompt_related_gap": 0.1}},
            }
            for model in ("standard", "inform")
        },
        "best_of_n": {
            model: {"proxy_gain": 1.5, "gold_gain": 0.75, **part["peak"]}
            for model, part in made_up_curves()["proxies"].items()
        },
        "detection": {
            "csi_normalized": 0.31,
            "mop": 0.125,
            "num_responses": 48,
            "null": {"csi_normalized": {"interval": [0.2, 0.3]}, "mop": {"interval": [0.0, 0.0625]}},
        },
        "loaded_elsewhere": {"num_responses": 16, "largest_reward_difference": 0.0, "module": "m"},
        "seconds": {"world": 1.0},
    }
    return result, rewards


@given(
    st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]), min_size=1, max_size=40),
    st.floats(-3, 3, allow_subnormal=False),
)
@settings(max_examples=50, deadline=None)
def test_bootstrap_interval_holds_the_mean_and_moves_with_the_data(values, shift):
    differences = np.array(values)
    low, high = paired_bootstrap_interval(differences, draws=500)
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12
    moved = paired_bootstrap_interval(differences + shift, draws=500)
    assert moved == pytest.approx((low + shift, high + shift), abs=1e-9)


def test_bootstrap_interval_has_the_width_of_the_normal_approximation():
    differences = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], size=1000, p=[0.1, 0.6, 0.3])
    low, high = paired_bootstrap_interval(differences)
    half = 1.96 * differences.std() / 1000**0.5
    assert (low, high) == pytest.approx((differences.mean() - half, differences.mean() + half), abs=0.15 * half)


def test_twins_that_cancel_have_no_spread():
    differences = np.tile([1.0, -1.0], 50)
    assert paired_bootstrap_interval(differences, block=2) == (0.0, 0.0)
    assert paired_bootstrap_interval(differences, block=1)[0] < 0.0


@pytest.mark.parametrize(
    ("inform", "standard", "sentence"),
    [
        (1.0, 0.2, "InfoRM ranks more pairs right than the standard model on: in-distribution, bias-reversed"),
        (0.2, 1.0, "InfoRM ranks fewer pairs right than the standard model on: in-distribution, bias-reversed"),
        (1.0, 1.0, "No clear difference (its interval holds 0) on: in-distribution, bias-reversed"),
    ],
)
def test_verdict_follows_the_numbers_whoever_wins(inform, standard, sentence):
    result, _ = made_up(inform, standard)
    table = console_table(result)
    assert sentence in table
    assert f"{result['test_sets']['unseen_family']['standard']['accuracy']:.3f} [" in table
    assert len({len(line) for line in table.split("\n\n")[0].splitlines()}) == 1  # columns line up


def test_page_is_self_contained_and_shows_every_figure_for_light_and_dark(tmp_path, read_page):
    result, rewards = made_up(0.9, 0.6)
    steps = range(10, 50, 10)
    logs = {
        model: [{"step": s, "loss": 0.6, "kl_nats": 1.0} for s in steps]
        + [{"step": s, "eval_bradley_terry_loss": 0.5, "eval_accuracy": 0.7} for s in steps]
        for model in ("standard", "inform")
    }
    rng = np.random.default_rng(0)
    latents = {"mean": rng.normal(size=(80, 4)), "kl_nats": rng.random((80, 4)), "gold_r1": rng.integers(0, 3, 80)}
    columns = ("prompt_free_gap", "prompt_related_gap", "words_difference")
    gaps = {model: {name: rng.normal(size=30).tolist() for name in columns} for model in ("standard", "inform")}
    points = {"x": [0.0, 1.0, 2.0], "y": [1.0, 0.0, 2.0], "kind": ["reference", "candidate", "outlier"]}
    write_demo_report(tmp_path / "report.html", result, ROWS, rewards, logs, latents, gaps, made_up_curves(), points)
    source_text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = read_page(source_text)
    sources, alternatives = page.values("src", "srcset", "href"), page.values("alt")
    assert len(sources) == 18 and len(set(sources)) == 18  # nine figures, each in two schemes
    for source in sources:
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert len(alternatives) == 9 and all(alternatives)
    assert "<b>&amp;" in page.text  # a name with markup in it is shown, not obeyed
    for name in TEST_SETS:
        assert f"{result['test_sets'][name]['inform']['accuracy']:.3f} [" in page.text
    assert "0.500 [0.300, 0.700]" in page.text and "-0.31" in page.text
    assert "outlier probability 0.125 (0.000, 0.062)" in page.text and "CSI per response 0.31" in page.text
    assert "width=device-width" in source_text and "prefers-color-scheme: dark" in source_text
    assert source_text.index("<table>") < source_text.index("<p")  # tables before prose


@pytest.fixture
def exported(tmp_path, causal_lm_dir, tokenizer):
    backbone = causal_lm_dir("llama")
    model = InfoRMForSequenceClassification.from_backbone(str(backbone), latent_dim=4)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export_model(str(tmp_path / "model"), str(tmp_path / "hub"))
    return tmp_path / "hub", RewardScorer(model.eval(), tokenizer)


@pytest.mark.slow
def test_exported_model_gives_the_same_rewards_where_the_package_is_absent(exported):
    folder, scorer = exported
    checked = check_loads_elsewhere(folder, ROWS["in_distribution"][:2], scorer)
    assert checked["num_responses"] == 4 and checked["largest_reward_difference"] <= 1e-5
    assert checked["module"].startswith("transformers_modules.")


@pytest.mark.slow
def test_other_rewards_elsewhere_are_reported(exported):
    folder, scorer = exported
    scorer.model.score.encoder.bias.data += 1.0
    with pytest.raises(RuntimeError, match="gives other rewards in a fresh interpreter"):
        check_loads_elsewhere(folder, ROWS["in_distribution"][:1], scorer)


@pytest.mark.slow
def test_a_folder_that_does_not_load_elsewhere_is_reported(exported):
    folder, scorer = exported
    (folder / "modeling_inform.py").unlink()
    with pytest.raises(RuntimeError, match="does not load without the package"):
        check_loads_elsewhere(folder, ROWS["in_distribution"][:1], scorer)


@pytest.mark.parametrize("seed", [-1, 1.5, True])
def test_a_bad_seed_is_refused_before_anything_is_written(tmp_path, seed):
    with pytest.raises(InputError, match="seed"):
        demo(tmp_path / "demo", seed=seed)
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_whole_demo_on_a_tiny_budget(tmp_path, capsys, read_page):
    result = demo(tmp_path, seed=1, budget=TINY)
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8")) == json.loads(json.dumps(result))
    out = capsys.readouterr().out
    assert console_table(result) in out
    for name in TEST_SETS:
        for model in ("standard", "inform"):
            assert result["test_sets"][name][model]["num_pairs"] == 20
            # The table's accuracy is that of the rewards on disk, counted here once more.
            pairs = [json.loads(line) for line in open(tmp_path / "evaluation" / model / "pairs.jsonl")]
            wins = [p["chosen_reward"] > p["rejected_reward"] for p in pairs if p["subset"] == name]
            assert result["test_sets"][name][model]["accuracy"] == pytest.approx(sum(wins) / 20)
    assert result["loaded_elsewhere"]["num_responses"] == 16
    assert result["train_pairs"] == 16
    assert re.fullmatch(r"[0-9a-f]{64}", next(iter(result["data_fingerprints"].values())))
    assert len(read_page((tmp_path / "report.html").read_text(encoding="utf-8")).values("alt")) == 9
    for model in ("standard", "inform"):
        audit = json.loads((tmp_path / "decomposition" / model / "result.json").read_text())
        assert audit["num_pairs"] == 12 and audit["settings"]["num_prompts"] == 3
        assert result["decomposition"][model]["response_decides"] == audit["response_decides"]
    attack = json.loads((tmp_path / "best-of-n" / "result.json").read_text())
    for model in ("standard", "inform"):
        assert result["best_of_n"][model]["gold_gain"] == attack["proxies"][model]["gold"]["gain"][-1]
    # Four responses to each prompt, and the best of each quarter of the other four by InfoRM.
    table = pq.read_table(tmp_path / "best-of-n" / "responses.parquet").to_pydict()
    first, best = (
        [json.loads(line)["response"] for line in open(tmp_path / "best-of-n" / f"{name}.jsonl")]
        for name in ("first", "best")
    )
    assert first == [text for row, text in enumerate(table["response"]) if row % 8 < 4]
    assert best == [text for row, text in enumerate(table["response"]) if row % 8 >= 4]
    detection = json.loads((tmp_path / "detection" / "result.json").read_text())
    assert detection["candidates"][0]["num_responses"] == 48 and result["detection"]["null"] == detection["null"]
    # Both architectures saw the same pairs and took the same number of steps.
    runs = [json.loads((tmp_path / model / "train_result.json").read_text()) for model in ("standard", "inform")]
    for key in ("data_fingerprints", "train_pairs", "steps"):
        assert runs[0][key] == runs[1][key]
    # The same folder takes another demo, with a given backbone.
    again = demo(tmp_path, backbone=str(tmp_path / "backbone"), seed=2, budget=TINY)
    assert again["settings"]["backbone"] == str(tmp_path / "backbone")
    assert again["settings"]["seed"] == 2
