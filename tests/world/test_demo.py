import base64
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from inform_rm.errors import InputError
from inform_rm.eval.best_of_n.simulate import kl_nats, overoptimization_curves
from inform_rm.hub.export import export_model
from inform_rm.scoring.scorer import RewardScorer
from inform_rm.world.demo import DemoBudget, _compare, _training_arguments, check_loads_elsewhere, demo
from inform_rm.world.demo_report import TEST_SETS, console_table, demo_page
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
    sets = {name: _compare(name, rows, rewards) for name, rows in ROWS.items()}
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


def test_twins_that_cancel_have_no_spread():
    rows = [{"chosen": "a b", "rejected": "a"}] * 40
    alternating = np.column_stack([np.tile([1.0, -1.0], 20), np.zeros(40)])  # right, wrong, right, wrong, ...
    pairs = {"standard": np.array([[1.0, 0.0]] * 40), "inform": alternating}
    rewards = {model: dict.fromkeys(TEST_SETS, part) for model, part in pairs.items()}
    of_twins, of_single = (
        _compare(name, rows, rewards)["inform_minus_standard"] for name in ("adversarial_prompt", "in_distribution")
    )
    assert of_twins == {"accuracy_difference": -0.5, "interval": [-0.5, -0.5]}
    low, high = of_single["interval"]
    half = 1.96 * 0.5 / 40**0.5  # of a mean of 40 differences, half of them 0 and half -1
    assert (low, high) == pytest.approx((-0.5 - half, -0.5 + half), abs=0.15 * half)


@pytest.mark.parametrize(
    ("inform", "standard", "found"),
    [(1.0, 0.2, "ahead on"), (0.2, 1.0, "behind on"), (1.0, 1.0, "level on")],
)
def test_verdict_follows_the_numbers_whoever_wins(inform, standard, found):
    result, _ = made_up(inform, standard)
    table, verdict = console_table(result).split("\n\n")
    differences = {
        label: result["test_sets"][name]["inform_minus_standard"]["accuracy_difference"]
        for name, label in TEST_SETS.items()
    }
    listed = ", ".join(f"{label} ({difference:+.3f})" for label, difference in differences.items())
    said = " ".join(verdict.split())
    assert said.startswith(f"Against the standard model InfoRM is {found} {listed} (")
    assert len(re.findall(r"\.(?= |$)", said)) == 2  # sentences
    assert f"{result['test_sets']['unseen_family']['standard']['accuracy']:.3f} [" in table
    assert len({len(line) for line in table.splitlines()}) == 1  # columns line up


def test_page_is_self_contained_and_shows_every_figure_for_light_and_dark(read_page, drawn):
    result, rewards = made_up(0.9, 0.6)
    steps = range(10, 50, 10)
    logs = {
        model: [{"step": s, "loss": 0.6, "kl_nats": 1.0} for s in steps]
        + [{"step": s, "eval_bradley_terry_loss": 0.5, "eval_accuracy": 0.7} for s in steps]
        for model in ("standard", "inform")
    }
    rng = np.random.default_rng(0)
    columns = ("prompt_free_gap", "prompt_related_gap", "words difference")
    gaps = {model: {name: rng.normal(size=30) for name in columns} for model in ("standard", "inform")}
    points = {"x": [0.0, 1.0, 2.0], "y": [1.0, 0.0, 2.0], "kind": ["reference", "candidate", "outlier"]}
    source_text = demo_page(result, ROWS, rewards, logs=logs, gaps=gaps, curves=made_up_curves(), points=points).html()
    page = read_page(source_text)
    sources, alternatives = page.values("src", "srcset", "href"), page.values("alt")
    assert len(sources) == 14 and len(set(sources)) == 14  # seven figures, each in two schemes
    for source in sources:
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert len(alternatives) == 7 and all(alternatives)
    assert "<b>&amp;" in page.text  # a name with markup in it is shown, not obeyed
    for name in TEST_SETS:
        assert f"{result['test_sets'][name]['inform']['accuracy']:.3f} [" in page.text
    assert "0.500 [0.300, 0.700]" in page.text and "-0.31" in page.text
    assert "outlier probability 0.125 (0.000, 0.062)" in page.text and "CSI per response 0.31" in page.text
    assert "width=device-width" in source_text and "prefers-color-scheme: dark" in source_text
    assert source_text.index("<table>") < source_text.index("<p")  # tables before prose


@pytest.fixture(scope="module")
def scorer(reward_dir):
    return RewardScorer(reward_dir)


@pytest.mark.slow
def test_exported_model_gives_the_same_rewards_where_the_package_is_absent(scorer, reward_dir, tmp_path):
    export_model(str(reward_dir), str(tmp_path / "hub"))
    checked = check_loads_elsewhere(tmp_path / "hub", ROWS["in_distribution"][:2], scorer)
    assert checked["num_responses"] == 4 and checked["largest_reward_difference"] <= 1e-5
    assert checked["module"].startswith("transformers_modules.")


@pytest.mark.parametrize(
    ("answer", "message"),
    [('print(json.dumps({"rewards": [9e9, 0], "ids_agree": True}))', "gives other rewards in a fresh interpreter"),
     ('print(json.dumps({"rewards": [0, 0], "ids_agree": False}))', "gives other token ids"),
     ("raise KeyError(5)", r"does not load without the package:[^$]*KeyError: 5")],
)  # fmt: skip
def test_what_goes_wrong_elsewhere_is_reported(scorer, monkeypatch, answer, message):
    monkeypatch.setattr("inform_rm.world.demo._LOAD_ELSEWHERE", f"import json\n{answer}")
    with pytest.raises(RuntimeError, match=message):
        check_loads_elsewhere("folder", ROWS["in_distribution"][:1], scorer)


@pytest.mark.parametrize("seed", [-1, 1.5, True])
def test_a_bad_seed_is_refused_before_anything_is_written(tmp_path, seed):
    with pytest.raises(InputError, match="seed"):
        demo(tmp_path / "demo", seed=seed)
    assert not (tmp_path / "demo").exists()


def test_a_given_backbone_is_trained_with_its_own_settings(tmp_path):
    own, given = (_training_arguments(tmp_path, "inform", name, 3, 5, TINY) for name in (None, "org/model"))
    assert (own.model, own.learning_rate, own.max_length) == (str(tmp_path / "backbone"), 1e-3, 256)
    assert (given.model, given.learning_rate, given.max_length) == ("org/model", 5e-5, None)
    assert own.seed == given.seed == 3 and own.data == given.data


@pytest.mark.slow
def test_whole_demo_on_a_tiny_budget(tmp_path, capfd, caplog, read_page, drawn):
    for name in ("hub-model/stale.bin", "inform/train_result.json", "report.html"):  # of an earlier demo
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    result = demo(tmp_path, seed=1, budget=TINY)
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8")) == json.loads(json.dumps(result))
    out, errors = capfd.readouterr()
    stages = [line for line in out.splitlines() if re.match(r" ?\d+/10 ", line)]
    assert [line.split()[0] for line in stages] == [f"{number}/10" for number in range(1, 11)]
    assert [line[6:].split("  ")[0] for line in stages] == list(result["seconds"])
    assert all(re.search(r", about \d+ (min|s) left$", line) for line in stages[2:])
    assert console_table(result) in out and str(tmp_path / "report.html") in out and str(tmp_path / "hub-model") in out
    assert "'loss'" not in out + errors and "it/s" not in errors and "WARNING" not in errors
    assert [record.message for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []
    assert len(out.encode()) + len(errors.encode()) < 4096
    for name in TEST_SETS:
        for model in ("standard", "inform"):
            assert result["test_sets"][name][model]["num_pairs"] == 20
            # The table's accuracy is that of the rewards on disk, counted here once more.
            pairs = [json.loads(line) for line in open(tmp_path / "evaluation" / model / "pairs.jsonl")]
            wins = [p["chosen_reward"] > p["rejected_reward"] for p in pairs if p["subset"] == name]
            assert result["test_sets"][name][model]["accuracy"] == pytest.approx(sum(wins) / 20)
    assert result["loaded_elsewhere"]["num_responses"] == 16 and not (tmp_path / "hub-model" / "stale.bin").exists()
    assert result["train_pairs"] == 16
    assert re.fullmatch(r"[0-9a-f]{64}", next(iter(result["data_fingerprints"].values())))
    assert len(read_page((tmp_path / "report.html").read_text(encoding="utf-8")).values("alt")) == 7
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
