"""The audit against rewards computed one by one, on models whose answer is known, and on bad input."""

import copy
import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from inform_rm import decompose, evaluate
from inform_rm.data.encoding import encode
from inform_rm.decomposition.prompt_free_gap import decompose_gaps, sample_prompts, tempered_weights
from inform_rm.errors import InputError
from inform_rm.world.worlds import WorldConfig, gold_reward, make_pairs

NOUNS = ["apple", "sky", "sea", "rose", "basket", "colour", "fruit", "grass", "sentence", "number"]


def row(number):
    return {
        "prompt": f"Name a {NOUNS[number % 10]}.", "chosen": "Red" + " roses" * (number % 4) + "!" * (number % 3),
        "rejected": f"The {NOUNS[(7 * number + 3) % 10]} is blue.", "subset": ("one", "two")[number % 2],
        "id": f"pair-{number}",
    }  # fmt: skip


def write_pairs(path, rows):
    path.write_text("".join(json.dumps(item) + "\n" for item in rows), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl", [row(number) for number in range(20)])


def plain_gap(scorer, prompt, item):
    rewards = []
    for side in ("chosen", "rejected"):
        ids = torch.tensor([encode(scorer.tokenizer, prompt, item[side]).input_ids])
        with torch.no_grad():
            rewards.append(scorer.model(input_ids=ids).logits.item())
    return rewards[0] - rewards[1]


def average_ranks(values):
    """Ranks from 1; equal values share the mean of theirs."""
    return [(sum(other < one for other in values) + sum(other <= one for other in values) + 1) / 2 for one in values]


def test_gaps_and_shares_follow_from_rewards_computed_one_by_one(scorer, data, tmp_path):
    output = tmp_path / "audit"
    result = decompose(scorer, data, output, num_prompts=3, seed=3, progress=False)
    prompts = [row(number)["prompt"] for number in range(10)]  # distinct, in order of their first row
    own = torch.arange(20) % 10
    choice = sample_prompts(own, 3, 10, seed=3)
    gaps = torch.tensor(
        [[plain_gap(scorer, prompts[k], row(pair)) for k in line] for pair, line in enumerate(choice.tolist())],
        dtype=torch.float64,
    )
    expected = decompose_gaps(gaps, population=10)
    table = pq.read_table(output / "pairs.parquet").to_pydict()
    assert table["id"] == [f"pair-{number}" for number in range(20)]
    for column, values in (
        ("reward_gap", expected.own_gap), ("prompt_free_gap", expected.prompt_free_gap),
        ("prompt_related_gap", expected.prompt_related_gap), ("standard_error", expected.standard_error),
    ):  # fmt: skip
        assert table[column] == pytest.approx(values.tolist(), abs=5e-5), column
    assert table["characters_difference"][3] == len(row(3)["chosen"]) - len(row(3)["rejected"])

    free, related = expected.prompt_free_gap, expected.prompt_related_gap
    decided = (free.abs() > related.abs()).double().mean().item()
    flips = (gaps.sign() != gaps[:, :1].sign()).any(dim=1).double().mean().item()
    within, between = gaps.var(dim=1).mean().item(), free.var().item()
    assert result.response_decides == pytest.approx(decided) and 0 < decided < 1
    assert result.sign_flips == pytest.approx(flips) and 0 < flips < 1
    assert result.prompt_sensitivity == pytest.approx(within / (within + between), rel=1e-3)
    assert result.accuracy == evaluate(scorer, data, progress=False).accuracy
    assert sum(part["num_pairs"] for part in result.quadrants) == 20
    assert {name: part["num_pairs"] for name, part in result.subsets.items()} == {"one": 10, "two": 10}
    lengths = [len(row(number)["chosen"]) - len(row(number)["rejected"]) for number in range(20)]
    expected_correlation = np.corrcoef(average_ranks(lengths), average_ranks(free.tolist()))[0, 1]
    assert result.correlations["characters"]["prompt_free_gap"] == pytest.approx(expected_correlation, abs=0.02)
    assert result.cost["tokens_computed"] < result.cost["tokens_of_a_plain_loop"]
    assert {path.name for path in output.iterdir()} == {
        "pairs.parquet", "spread.png", "plane.png", "result.md", "result.html", "result.json"
    }  # fmt: skip
    assert json.loads((output / "result.json").read_text()) == result.to_dict()
    assert "Prompt-free" in result._repr_html_() and len(result.figure().axes) == 2


def test_a_model_that_does_not_see_the_prompt(model, tokenizer, data):
    """Without attention's output a reward is one of the last token alone."""
    blind = copy.deepcopy(model)
    for layer in blind.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    rows = [{**row(number), "rejected": "Blue" + "?" * (number % 2)} for number in range(20)]
    source = write_pairs(data.with_name("blind.jsonl"), rows)
    tokenizer = copy.deepcopy(tokenizer)
    # Plain text without an end token: the last token is one of the response.
    tokenizer.chat_template = "{% for m in messages %}{{ ' ' + m['content'] }}{% endfor %}"
    result = decompose(blind, source, tokenizer=tokenizer, num_prompts=5, progress=False)
    assert result.response_decides == 1 and result.sign_flips == 0
    assert (result.prompt_sensitivity or 0.0) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("split", ("adversarial_prompt", "in_distribution"))
def test_gold_rewards_of_the_world(split):
    """No learnt model: with all prompts D2 is exact, and with few it is as close as its standard error says."""
    rows = make_pairs(WorldConfig(), split, 60)
    prompts = sorted({item["prompt"] for item in rows})
    own = torch.tensor([prompts.index(item["prompt"]) for item in rows])
    related = torch.tensor(
        [
            [
                gold_reward(prompt, item["chosen"]).prompt_related
                - gold_reward(prompt, item["rejected"]).prompt_related
                for prompt in prompts
            ]
            for item in rows
        ],
        dtype=torch.float64,
    )
    style = torch.tensor(
        [gold_reward(item["prompt"], item["chosen"]).style - gold_reward(item["prompt"], item["rejected"]).style
         for item in rows], dtype=torch.float64,
    )  # fmt: skip
    gaps = related + style[:, None]
    everything = decompose_gaps(gaps, population=len(prompts))
    # The defining equation, and the part that the prompt-related rewards leave over when it is solved without style.
    balance = torch.sigmoid(gaps - everything.prompt_free_gap[:, None]).mean(dim=1)
    torch.testing.assert_close(balance, torch.full_like(balance, 0.5), atol=1e-6, rtol=0)
    offset = decompose_gaps(related).prompt_free_gap
    torch.testing.assert_close(everything.prompt_free_gap, style + offset, atol=1e-5, rtol=0)
    symmetric = torch.cat([related, -related], dim=1) + style[:, None]
    torch.testing.assert_close(decompose_gaps(symmetric).prompt_free_gap, style, atol=1e-5, rtol=0)

    choice = sample_prompts(own, 12, len(prompts), seed=0)
    few = decompose_gaps(gaps.gather(1, choice), population=len(prompts))
    # Own prompt always in: its pull on D2, stated in `decompose_gaps`, comes on top of the standard error.
    pull = few.prompt_related_gap.abs() / 12 + 0.05
    assert ((few.prompt_free_gap - everything.prompt_free_gap).abs() <= 4 * few.standard_error + pull).all()


def test_weights_of_a_behaviour_model(scorer, data, causal_lm_dir, tmp_path):
    """Against the same weights made by hand; the likelihoods themselves are tested in test_likelihoods."""
    folder = causal_lm_dir("llama")
    options = {"num_prompts": 5, "progress": False, "seed": 1}
    result = decompose(
        scorer, data, tmp_path / "audit", weights="behavior", behavior_model=folder, ess_target=0.5, **options
    )
    plain = decompose(scorer, data, **options).pairs
    assert result.settings["ess_target"] == 0.5
    lm = AutoModelForCausalLM.from_pretrained(folder)
    weighted = result.pairs
    assert weighted["reward_gap"] == pytest.approx(plain["reward_gap"], abs=1e-5)
    prompts = [row(number)["prompt"] for number in range(10)]
    choice = sample_prompts(torch.arange(20) % 10, 5, 10, seed=1)
    pair = 7
    logs, gaps = [], []
    for k in choice[pair].tolist():
        total = 0.0
        for side in ("chosen", "rejected"):
            encoded = encode(scorer.tokenizer, prompts[k], row(pair)[side])
            ids, first = encoded.input_ids, len(encoded.prompt_ids)
            with torch.no_grad():
                probabilities = lm(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
            total += sum(probabilities[at - 1, ids[at]].item() for at in range(first, len(ids)))
        logs.append(total)
        gaps.append(plain_gap(scorer, prompts[k], row(pair)))
    weights, _ = tempered_weights(torch.tensor([logs]), 0.5)
    expected = decompose_gaps(torch.tensor([gaps]), weights)
    assert weighted["prompt_free_gap"][pair] == pytest.approx(expected.prompt_free_gap.item(), abs=1e-3)
    ess = expected.effective_sample_size.item()
    assert weighted["effective_sample_size"][pair] == pytest.approx(ess, abs=1e-3) and 2.5 - 1e-6 <= ess < 5
    assert not list((tmp_path / "audit").glob("*.partial"))


def test_an_unfinished_audit_goes_on_and_refuses_other_settings(scorer, data, tmp_path, monkeypatch):
    whole = decompose(scorer, data, num_prompts=4, progress=False)
    original, calls = scorer._packed_forward, []

    def stops(*args):
        calls.append(args)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return original(*args)

    output = tmp_path / "audit"
    monkeypatch.setattr(scorer, "_packed_forward", stops)
    with pytest.raises(KeyboardInterrupt):
        decompose(scorer, data, output, num_prompts=4, progress=False)
    monkeypatch.setattr(scorer, "_packed_forward", original)
    assert not (output / "result.json").exists()
    with pytest.raises(InputError, match="num_prompts"):
        decompose(scorer, data, output, num_prompts=5, progress=False)
    resumed = decompose(scorer, data, output, num_prompts=4, progress=False)
    assert resumed.cost["tokens_computed"] < whole.cost["tokens_computed"]
    assert resumed.prompt_sensitivity == pytest.approx(whole.prompt_sensitivity, rel=1e-3)
    assert not (output / "rewards.partial").exists()


def test_pairs_with_rewards_that_are_no_numbers_are_named_and_not_averaged_in(model, tokenizer, data):
    broken = copy.deepcopy(model)
    marked = write_pairs(
        data.with_name("marked.jsonl"), [{**row(n), "chosen": "~" if n == 4 else "Red"} for n in range(9)]
    )
    token = tokenizer("~")["input_ids"][-1]
    with torch.no_grad():
        broken.get_input_embeddings().weight[token] = math.nan
    result = decompose(broken, marked, tokenizer=tokenizer, num_prompts=4, progress=False)
    assert result.left_out == {
        "overlong": 0, "no_other_prompt": 0, "nonfinite_rewards": 1, "nonfinite_ids": ["pair-4"]
    }  # fmt: skip
    assert result.num_pairs == 8 and math.isfinite(result.prompt_sensitivity)


def test_a_stratum_of_one_prompt_says_nothing(scorer, tmp_path):
    rows = [{**row(number), "subset": "alone" if number == 0 else "rest"} for number in range(8)]
    data = write_pairs(tmp_path / "strata.jsonl", rows)
    result = decompose(scorer, data, num_prompts=4, stratify=True, progress=False)
    assert result.left_out["no_other_prompt"] == 1 and result.num_pairs == 7


def test_pairs_longer_than_the_context_are_counted(model, tokenizer, tmp_path):
    rows = [{**row(number), "chosen": "xq" * (60 if number == 2 else 3)} for number in range(6)]
    data = write_pairs(tmp_path / "long.jsonl", rows)
    with pytest.raises(InputError, match=r"long.jsonl, row 3: .* over max_length 100"):
        decompose(model, data, tokenizer=tokenizer, max_length=100, progress=False)
    result = decompose(model, data, tokenizer=tokenizer, max_length=100, overlong="drop", progress=False)
    assert result.left_out["overlong"] == 1 and result.num_pairs == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prompts": 1}, "num_prompts: 1"),
        ({"num_prompts": 2.5}, "num_prompts: 2.5"),
        ({"weights": "behavior"}, "weights: 'behavior' with behavior_model None"),
        ({"weights": "behavior", "behavior_model": "x", "ess_target": 0}, "ess_target: 0"),
        ({"max_pairs": 0}, "max_pairs: 0"),
        ({"data": []}, "at least one source"),
    ],
)
def test_wrong_arguments(scorer, data, options, message):
    options = {"data": data, "progress": False, **options}
    with pytest.raises(InputError, match=message):
        decompose(scorer, options.pop("data"), **options)


def test_one_distinct_prompt_is_refused(scorer, tmp_path):
    rows = [{**row(number), "prompt": "Name one."} for number in range(5)]
    with pytest.raises(InputError, match="all pairs have the same prompt"):
        decompose(scorer, write_pairs(tmp_path / "same.jsonl", rows), progress=False)


def test_messages_without_a_template_are_refused(model, tokenizer, tmp_path):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"}]
    rows = [
        {**row(number), "prompt": [*turns, {"role": "user", "content": row(number)["prompt"]}]} for number in range(5)
    ]
    with pytest.raises(InputError, match="chat template"):
        decompose(model, write_pairs(tmp_path / "chat.jsonl", rows), tokenizer=bare, progress=False)
