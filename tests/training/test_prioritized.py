"""Prioritized training: it selects what it says, trains on nothing else, and resumes where it was."""

import dataclasses
import json
import math
import types

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from inform_rm.data.encoding import encode
from inform_rm.decomposition.prompt_free_gap import decompose_gaps, tempered_weights
from inform_rm.errors import InputError
from inform_rm.scoring.scorer import NonFiniteRewardError
from inform_rm.training import prioritized
from inform_rm.training.prioritized import PoolSelector
from inform_rm.training.run import train


@pytest.fixture
def settings(base_settings):
    return base_settings(
        objective="prioritized", num_prompts=4, warmup_fraction=0.25, max_steps=4, gradient_accumulation_steps=1,
        save_steps=2,
    )  # fmt: skip


@pytest.fixture
def seen(monkeypatch):
    """Each selection: positions of the pool, gaps as they were estimated, places selected, and the model's weights."""
    calls = []
    original = PoolSelector._select

    def record(self, positions, wanted):
        weights = {name: value.clone() for name, value in self._scorer.model.state_dict().items()}
        estimates = []
        estimate = self._estimate
        self._estimate = lambda rows: estimates.append(estimate(rows)) or estimates[-1]
        selected = original(self, positions, wanted)
        del self._estimate
        calls.append(
            {"positions": positions, "gaps": estimates, "selected": selected, "weights": weights, "selector": self}
        )
        return selected

    monkeypatch.setattr(PoolSelector, "_select", record)
    return calls


@pytest.fixture
def learnt(monkeypatch):
    """Ids of the pairs of every forward pass with gradient."""
    batches = []
    original = PoolSelector.batch

    def record(self, *args):
        batches.append(original(self, *args))
        return {**batches[-1]}

    monkeypatch.setattr(PoolSelector, "batch", record)
    return batches


@pytest.mark.parametrize(("architecture", "batching"), [("standard", "padded"), ("inform", "packed")])
def test_the_smallest_gaps_are_selected_and_only_they_are_learnt(settings, seen, learnt, architecture, batching):
    result = train(dataclasses.replace(settings, architecture=architecture, batching=batching))
    assert result["steps"] == 4 and len(seen) == 3  # the first step is warm-up
    for call in seen:
        (gaps,) = call["gaps"]
        assert len(gaps) == 8 and len(call["selected"]) == 4
        assert call["selected"].tolist() == sorted(gaps.round(decimals=4).argsort(stable=True)[:4].tolist())
        assert (
            not call["selector"]._scorer.model.training or call["selector"]._scorer.model.score.training
        )  # modes are put back
    assert len(learnt) == 4
    assert all(len(batch["margin"]) == 4 for batch in learnt)
    for call, line in zip(seen, result["log_history"][1:4], strict=True):
        (gaps,) = call["gaps"]
        left_out = [place for place in range(8) if place not in call["selected"].tolist()]
        assert line["prompt_free_gap_selected"] == pytest.approx(gaps[call["selected"]].mean().item(), abs=1e-5)
        assert line["prompt_free_gap_left_out"] == pytest.approx(gaps[left_out].mean().item(), abs=1e-5)
        assert 0 < line["selection_time_share"] < 1 and 2 <= line["effective_sample_size"] <= 4
    assert "prompt_free_gap_selected" not in result["log_history"][0]


@pytest.mark.parametrize("weights", ("uniform", "behavior"))
def test_gaps_are_those_of_single_forward_passes(settings, seen, tokenizer, weights, tmp_path):
    lm = AutoModelForCausalLM.from_pretrained(settings.model)
    for parameter in lm.parameters():  # so that its likelihoods differ between prompts
        torch.nn.init.normal_(parameter, std=0.3)
    lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    behavior_model = str(tmp_path / "lm") if weights == "behavior" else None
    changes = {"weights": weights, "behavior_model": behavior_model, "ess_target": 0.6}
    train(dataclasses.replace(settings, architecture="standard", **changes))
    call = seen[-1]
    trainer, positions = call["selector"], call["positions"]
    from inform_rm import InfoRMForSequenceClassification

    model = InfoRMForSequenceClassification.from_pretrained(settings.output_dir)
    model.load_state_dict(call["weights"])
    dataset = trainer._pairs
    generator = prioritized.np.random.default_rng([settings.seed, 0, *positions.tolist()])
    prompts = [dataset[int(row)]["prompt"] for row in trainer._prompt_rows]
    drawn = [prompts[k] for k in generator.choice(len(prompts), 4 if weights == "behavior" else 5, replace=False)]
    assert any(pair in drawn for pair in dataset[positions.tolist()]["prompt"])  # some own prompt is drawn, too

    def reward(prompt, response):
        with torch.no_grad():
            return model(input_ids=torch.tensor([encode(tokenizer, prompt, response).input_ids])).logits.item()

    def log_likelihood(prompt, response):
        encoded = encode(tokenizer, prompt, response)
        ids, first = encoded.input_ids, len(encoded.prompt_ids)
        with torch.no_grad():
            logs = lm(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        return sum(logs[at - 1, ids[at]].item() for at in range(first, len(ids)))

    for position, gap in zip(positions.tolist(), call["gaps"][0].tolist(), strict=True):
        pair = dataset[position]
        others = [prompt for prompt in drawn if prompt != pair["prompt"]]
        used = [pair["prompt"], *others[:3]] if weights == "behavior" else others[:4]
        gaps = [reward(prompt, pair["chosen"]) - reward(prompt, pair["rejected"]) for prompt in used]
        shares = None
        if weights == "behavior":
            logs = [
                log_likelihood(prompt, pair["chosen"]) + log_likelihood(prompt, pair["rejected"]) for prompt in used
            ]
            shares, _ = tempered_weights(torch.tensor([logs]), 0.6)
            assert shares.max() > 1.5 * shares.min()
        expected = decompose_gaps(torch.tensor([gaps]), shares).prompt_free_gap.item()
        assert gap == pytest.approx(expected, abs=2e-5 if weights == "uniform" else 1e-4)


def test_a_pool_of_one_batch_is_ordinary_training(settings, tmp_path):
    plain = train(dataclasses.replace(settings, objective="bradley_terry", architecture="standard"))
    pooled = train(
        dataclasses.replace(settings, pool_factor=1, architecture="standard", output_dir=str(tmp_path / "pooled"))
    )
    losses = [[line["loss"] for line in result["log_history"] if "loss" in line] for result in (plain, pooled)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_resumed_run_equals_the_uninterrupted_one(settings, tmp_path, monkeypatch):
    config = dataclasses.replace(
        settings, max_steps=8, save_steps=5, per_device_train_batch_size=8, warmup_fraction=0.1
    )
    whole = train(config)
    cut = dataclasses.replace(config, output_dir=str(tmp_path / "cut"))
    original = PoolSelector._select
    calls = []

    def stops(self, *args):
        calls.append(args)
        if len(calls) == 6:  # the first step is warm-up
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(PoolSelector, "_select", stops)
    with pytest.raises(KeyboardInterrupt):
        train(cut)
    monkeypatch.setattr(PoolSelector, "_select", original)
    resumed = train(cut)
    assert resumed["resumed_from_step"] == 5
    for name in ("loss", "prompt_free_gap_selected"):
        one, other = ([line[name] for line in result["log_history"] if name in line] for result in (whole, resumed))
        assert one == pytest.approx(other, abs=1e-6)


@pytest.fixture
def selector(settings, seen):
    """One whose gaps can be given: ``selector(gaps, wanted)`` -> places."""
    train(dataclasses.replace(settings, max_steps=1, warmup_fraction=0.0))
    made = seen[0]["selector"]

    def select(gaps, wanted):
        made._estimate = lambda rows: torch.tensor(gaps, dtype=torch.float64)
        return PoolSelector._select(made, torch.arange(len(gaps)), wanted)

    return select


@hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(gaps=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), share=st.floats(0, 1))
def test_selection_of_any_gaps(selector, gaps, share):
    wanted = max(1, round(share * len(gaps)))
    places = selector(gaps, wanted)
    assert places.tolist() == sorted(set(places.tolist())) and len(places) == wanted
    smallest = sorted(gaps[place] for place in places.tolist())
    assert smallest == pytest.approx(sorted(gaps)[:wanted], abs=1.1e-4)  # equal to four decimals counts as equal


@pytest.mark.parametrize("pool", [10, 2])
def test_processes_share_what_one_would_learn_from(settings, seen, monkeypatch, pool):
    train(dataclasses.replace(settings, max_steps=1, warmup_fraction=0.0))
    made = seen[0]["selector"]
    made._args = dataclasses.replace(settings, warmup_fraction=0.0)
    made._collate = lambda pairs: {"pairs": [(pair["id"], pair["margin"]) for pair in pairs]}
    monkeypatch.setattr(PoolSelector, "_estimate", lambda self, rows: torch.sin(rows.double()))
    positions = torch.arange(3, 3 + pool)

    def batch(number, index):
        accelerator = types.SimpleNamespace(num_processes=number, process_index=index, gather=lambda own: positions)
        return made.batch({"positions": positions}, accelerator, types.SimpleNamespace(global_step=0, max_steps=1))

    (alone, first, second) = batch(1, 0), batch(2, 0), batch(2, 1)
    parts = [part["pairs"][: part["counted"]] for part in (first, second)]
    assert parts[0] + parts[1] == alone["pairs"] and len(alone["pairs"]) == pool // 2
    assert [part["share"] for part in (first, second)] == [2 * len(part) / len(alone["pairs"]) for part in parts]
    assert all(part["pairs"] for part in (first, second))  # each takes part in the passes


def test_a_pair_that_fits_under_no_other_prompt_is_judged_by_its_own(base_settings, tmp_path, seen, tokenizer):
    short = {"prompt": "Name it", "chosen": "It is red." + " Indeed." * 8, "rejected": "It is blue."}
    long = [{"prompt": f"Name the colour {'red blue green'.split()[index]}" + " please" * 10, "chosen": "It is red.",
             "rejected": "It is blue."} for index in range(3)]  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [short, *long]))
    limit = max(len(encode(tokenizer, row["prompt"], row["chosen"]).input_ids) for row in [short, *long])
    assert len(encode(tokenizer, long[0]["prompt"], short["chosen"]).input_ids) > limit
    args = base_settings(
        data=(str(path),), objective="prioritized", num_prompts=2, warmup_fraction=0.0, max_steps=1, save_steps=1,
        max_length=limit, overlong="drop", per_device_train_batch_size=2, gradient_accumulation_steps=1,
        architecture="standard",
    )  # fmt: skip
    train(args)
    (call,) = seen
    place = [call["selector"]._pairs[row]["chosen"] for row in call["positions"].tolist()].index(short["chosen"])
    from inform_rm import InfoRMForSequenceClassification

    model = InfoRMForSequenceClassification.from_pretrained(args.output_dir).eval()
    model.load_state_dict(call["weights"])
    ids = [encode(tokenizer, short["prompt"], short[side]).input_ids for side in ("chosen", "rejected")]
    with torch.no_grad():
        high, low = (model(input_ids=torch.tensor([row])).logits.item() for row in ids)
    assert call["gaps"][0][place].item() == pytest.approx(high - low, abs=1e-5)


def test_what_cannot_be_selected_is_refused(settings, tmp_path):
    rows = [
        {"prompt": "Name it", "chosen": f"It is {colour}.", "rejected": "No."} for colour in ("red", "blue", "green")
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="at least two prompts"):
        train(dataclasses.replace(settings, data=(str(path),)))


def test_lora_and_accumulation(settings, seen, learnt):
    result = train(dataclasses.replace(settings, lora_r=2, gradient_accumulation_steps=2))
    assert result["steps"] == 4 and len(learnt) == 8 and len(seen) == 6


def test_pairs_whose_rewards_are_no_numbers_stop_the_run(settings, monkeypatch):
    original = prioritized.gap_grid

    def broken(*args, **kwargs):
        grid = original(*args, **kwargs)
        grid.rewards[2, 1, 0] = math.nan
        return grid

    monkeypatch.setattr(prioritized, "gap_grid", broken)
    with pytest.raises(NonFiniteRewardError, match=r"pairs.jsonl, row \d+, under some prompt"):
        train(settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool_factor": 0}, "pool_factor"), ({"num_prompts": 0}, "num_prompts"),
        ({"warmup_fraction": 1.0}, "warmup_fraction"), ({"ess_target": 1.5}, "ess_target"),
        ({"weights": "behavior"}, "behavior_model"),
        ({"weights": "behavior", "behavior_model": "some-lm", "num_prompts": 1}, "at least 2, got 1"),
        ({"behavior_model": "some-lm"}, "'uniform' uses none"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(settings, change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(settings, **change)


def test_pairs_a_step_are_those_that_are_learnt_from(base_settings, seen, learnt):
    divided = {"per_device_train_batch_size": None, "gradient_accumulation_steps": 2}
    args = base_settings(
        **divided,
        pairs_per_step=6,
        objective="prioritized",
        num_prompts=2,
        warmup_fraction=0,
        max_steps=1,
        save_steps=1,
    )
    result = train(args)
    assert result["settings"]["pairs_per_step"] == 6
    assert [len(batch["margin"]) for batch in learnt] == [3, 3]
    assert [len(call["positions"]) for call in seen] == [6, 6]  # pool_factor 2
