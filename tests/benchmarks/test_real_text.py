"""The experiment behind docs/results/real-text.md: what is written, paired, asked and trained; its stages resume."""

import argparse
import gzip
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
if not FOLDER.is_dir():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)
sys.path.insert(0, str(FOLDER))

import kl_warmup  # noqa: E402
import real_text_attack as attack  # noqa: E402
import real_text_gold as gold  # noqa: E402
import real_text_grpo as grpo  # noqa: E402
import real_text_models as models  # noqa: E402
import real_text_proxies as proxies  # noqa: E402
import real_text_texts as texts  # noqa: E402
import real_text_writer as writer  # noqa: E402

PROMPTS = [[5, 9, 40, 41, 42], [7, 8, 9], [30, 31, 32, 33, 34, 35, 36]]
END, NEW_TOKENS = 2, 6


@pytest.fixture
def causal_lm(causal_lm_dir):
    return AutoModelForCausalLM.from_pretrained(causal_lm_dir("llama_tied"))


def test_each_token_is_drawn_from_the_models_own_logits(causal_lm, monkeypatch):
    seen = []
    monkeypatch.setattr(writer, "draw", lambda logits: (seen.append(logits), logits.argmax(dim=1))[1])
    found = writer.Writer(causal_lm, NEW_TOKENS, END).write(PROMPTS, 2, seed=0)
    assert len(found) == 6
    for row, response in enumerate(found):
        ids = PROMPTS[row // 2] + response
        with torch.no_grad():
            whole = causal_lm(torch.tensor([ids])).logits[0]
        for step in range(min(len(response), NEW_TOKENS)):
            torch.testing.assert_close(seen[step][row], whole[len(PROMPTS[row // 2]) - 1 + step], atol=1e-4, rtol=1e-4)


def test_responses_end_once_and_are_no_longer_than_asked_and_a_seed_repeats_them(causal_lm):
    own = writer.Writer(causal_lm, NEW_TOKENS, END)
    found = own.write(PROMPTS, 4, seed=3)
    assert all(response.index(END) == len(response) - 1 <= NEW_TOKENS for response in found)
    assert own.write(PROMPTS, 4, seed=3) == found != own.write(PROMPTS, 4, seed=4)


def test_draws_have_the_models_probabilities():
    torch.manual_seed(0)
    drawn = writer.draw(torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(20_000, -1))
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=4 * 0.5 / 20_000**0.5, rtol=0.0)


def test_average_of_weights_is_their_mean():
    found = models.averaged([{"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, -2.0])}])
    assert found["a"].tolist() == [2.0, 0.0]


def test_first_layers_are_those_of_the_model(causal_lm_dir, tmp_path):
    folder = tmp_path / "model"
    folder.symlink_to(causal_lm_dir("llama_tied"))
    found = models.start_of(folder, 1, models.Variant("standard"), 0, "cpu")
    whole = AutoModelForCausalLM.from_pretrained(folder).model
    assert len(found.model.layers) == 1
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        states = whole(ids, output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(found.model(ids).last_hidden_state, whole.norm(states))


def test_the_top_layer_on_kept_states_is_that_of_the_whole_model_and_learns(causal_lm_dir):
    model = models.start_of(causal_lm_dir("llama_tied"), 2, models.Variant(), 0, "cpu").eval()
    rows = texts.rows_of(
        [[5, 9], [7, 8, 9, 11], [4, 6, 3], [10]], [[40, END], [41, 44, END], [42, END], [43, END]], [0, 1, 2, 3]
    )
    top = kl_warmup.Top(model, rows, torch.tensor([3, 0, 1]))
    places = torch.tensor([1, 3, 0])
    with torch.no_grad():
        whole, kept = model(*models.batch(rows, places, "cpu")).logits, model.score(top(model, places))
    assert whole.std() > 0.05
    torch.testing.assert_close(kept, whole, atol=0.01, rtol=0.02)  # states are kept in bfloat16
    before = {name: value.clone() for name, value in model.named_parameters()}
    variant = models.Variant(beta=0.01, kl_warmup_steps=0.0, pairs_per_step=1, epochs=25, learning_rate=1e-2)
    log = kl_warmup.run(top, model, variant, models.Pairs(torch.tensor([1]), torch.tensor([0])), seed=0)
    assert [row["update"] for row in log] == [25] and log[0]["weight"] == 0.01
    assert log[0]["gradient of KL"] > 0 and log[0]["spread"] + log[0]["offset"] < log[0]["kl"]
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    trained = {name for name in before if name.startswith(("model.layers.1.", "model.norm.", "score."))}
    assert moved == trained - {"score.decoder.2.bias"}  # the same for both responses
    assert kl_warmup.judged(top, model, {"both": models.Pairs(torch.tensor([1]), torch.tensor([0]))}) == {"both": 1.0}


SIZES = texts.Sizes(prompts=(60, 6, 8), per_prompt=6)


@pytest.fixture
def world(monkeypatch):
    """Random gold rewards of texts that stand for themselves: row r of prompt p is response ``ids[r]``."""
    splits = texts.splits_of(SIZES)
    responses = [[[100 + 10 * number + place, END] for place in range(6)] for number in range(len(splits))]
    rows = texts.rows_of(
        [[number] for number in range(len(splits)) for _ in range(6)],
        [each for own in responses for each in own], [number for number in range(len(splits)) for _ in range(6)],
    )  # fmt: skip
    rows = texts.with_partners(rows, 6, splits)
    rewards = torch.randn(len(rows.lengths), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    monkeypatch.setattr(proxies, "read_rows", lambda folder, part: rows)
    monkeypatch.setattr(proxies, "gold_rewards", lambda folder, part: rewards)
    return proxies.World(Path(), SIZES)


def test_partners_are_mutual_and_of_one_split():
    splits = ["train"] * 5 + ["test"] * 4
    found = texts.partners(splits)
    assert found[4] == 4  # the odd one out
    assert all(found[other] == one and splits[one] == splits[other] for one, other in enumerate(found))


def test_a_partners_responses_follow_under_the_own_prompt(world):
    text = world.rows.ids[torch.arange(len(world.rows.lengths)), world.rows.prompt_lengths].tolist()
    assert world.rows.ids[:, 0].tolist() == world.rows.prompts.tolist()
    assert text[:12] == [*range(100, 106), *range(110, 116)]
    assert text[12:24] == [*range(110, 116), *range(100, 106)]


def test_pairs_follow_gold_and_have_each_text_once_a_prompt(world):
    found = world.pairs("train")
    assert len(found) == 60 * 4
    assert bool((world.gold[found.chosen] > world.gold[found.rejected]).all())
    both = torch.cat([found.chosen, found.rejected])
    assert len(both.unique()) == len(both)
    assert bool((world.rows.prompts[found.chosen] == world.rows.prompts[found.rejected]).all())
    against_partner = (found.chosen % 12 >= 6) | (found.rejected % 12 >= 6)
    assert int(against_partner.sum()) == 60 * 2


def test_flips_are_as_many_as_asked(world):
    every = world.pairs("train")
    given, flipped = proxies.labelled(every, 0.25, seed=1)
    assert torch.equal(world.gold[given.chosen] < world.gold[given.rejected], flipped)
    assert abs(float(flipped.float().mean()) - 0.25) < 4 * (0.25 * 0.75 / len(every)) ** 0.5


@pytest.mark.parametrize("least_gap", [0.0, 0.5])
def test_pairs_that_the_prompt_decides_are_in_there_once_under_each_prompt(world, least_gap):
    found = world.turned_pairs("test", least_gap)
    text = world.rows.ids[torch.arange(len(world.rows.lengths)), world.rows.prompt_lengths].tolist()
    of_prompt = {}  # reward by prompt and text
    for row, reward in enumerate(world.gold.tolist()):
        of_prompt.setdefault(int(world.rows.prompts[row]), {})[text[row]] = reward
    expected = set()
    for one in world.prompts("test")[::2]:
        for a, b in itertools.combinations(sorted(of_prompt[one]), 2):
            here, there = (of_prompt[prompt][a] - of_prompt[prompt][b] for prompt in (one, one + 1))
            if here * there < 0 and min(abs(here), abs(there)) > least_gap:
                expected |= {(one, a, b), (one + 1, a, b)}
    pairs = [(int(world.rows.prompts[one]), *sorted((text[one], text[other])))
             for one, other in zip(found.chosen.tolist(), found.rejected.tolist(), strict=True)]  # fmt: skip
    assert len(pairs) == len(set(pairs)) > 20
    assert set(pairs) == expected
    assert bool((world.gold[found.chosen] > world.gold[found.rejected]).all())
    blind = torch.tensor([float(each) for each in text])
    assert models.accuracy(blind, found) == 0.5


def test_best_of_n_is_that_of_every_set():
    generator = torch.Generator().manual_seed(0)
    proxy, own = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    found = attack.curves(proxy, own, torch.ones(16), torch.arange(2).repeat_interleave(8))
    for n in (2, 4):
        best = [own[max(chosen, key=lambda row: proxy[row])].item() for prompt in (0, 8)
                for chosen in itertools.combinations(range(prompt, prompt + 8), n)]  # fmt: skip
        assert found["gold"][found["n"].index(n)] == pytest.approx(sum(best) / len(best))


def log_probs(seed, tokens=12, words=7):
    generator = torch.Generator().manual_seed(seed)
    logits, start = torch.randn(2, tokens, words, generator=generator, dtype=torch.float64)
    drawn = torch.randint(words, (tokens,), generator=generator)
    return logits.requires_grad_(), start.log_softmax(dim=1), drawn, torch.randn(tokens, generator=generator).double()


def test_kl_of_tokens_is_that_of_torch():
    logits, start, _, _ = log_probs(2)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(logits=start)
    )
    torch.testing.assert_close(grpo.kl_of_tokens(logits.log_softmax(dim=1), start), expected)


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_gradient_of_an_update_is_that_of_the_formula(coefficient):
    logits, start, drawn, advantages = log_probs(0)
    own = logits.log_softmax(dim=1).gather(1, drawn[:, None])[:, 0]
    of_start = start.gather(1, drawn[:, None])[:, 0] if coefficient else None
    grpo.grpo_loss(own, own.detach(), of_start, advantages, coefficient).backward()
    # By hand: d log p(drawn) / d logit v = [v is drawn] - p(v); the estimate q / p - log(q / p) - 1 has 1 - q / p.
    chance = logits.detach().softmax(dim=1)
    direction = torch.nn.functional.one_hot(drawn, 7) - chance
    weight = -advantages
    if coefficient:
        weight = weight + coefficient * (1 - (of_start - own.detach()).exp())
    torch.testing.assert_close(logits.grad, weight[:, None] * direction / len(drawn))


def test_advantages_are_those_within_a_group():
    found = grpo.advantages_of(torch.tensor([1.0, 3.0, 10.0, 10.0, 0.0, -4.0]), 2)
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0, 0.0, 0.0, 1.0, -1.0]) * 0.5**0.5, atol=1e-3, rtol=0.0)


@pytest.fixture
def with_lora(causal_lm):
    found = grpo.Policy(causal_lm, NEW_TOKENS, END)
    generator = torch.Generator().manual_seed(0)
    for parameter in found.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return found


def test_the_copy_that_writes_is_the_policy_as_it_is_now(with_lora):
    rows = with_lora.write(PROMPTS, 2, seed=1)
    with torch.no_grad():
        found, expected = (model(rows.ids).logits for model in (with_lora.writer.model, with_lora.wrapped))
        with with_lora.wrapped.disable_adapter():
            start = with_lora.wrapped(rows.ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert float((found - start).abs().max()) > 0.5


def test_drawn_tokens_are_all_but_the_end_of_a_response_that_was_cut(with_lora):
    rows = texts.rows_of([[9, 9], [9]], [[5, 6, 7, 8, 9, 10, END], [5, END]], [0, 1])
    states, tokens, row = with_lora.drawn(rows, torch.arange(2))
    assert tokens.tolist() == [5, 6, 7, 8, 9, 10, 5, END]
    assert row.tolist() == [0] * 6 + [1] * 2
    with torch.no_grad():
        whole = with_lora.wrapped(rows.ids).logits.log_softmax(dim=2)
    expected = [whole[0, place - 1, rows.ids[0, place]] for place in range(2, 8)]
    expected += [whole[1, place - 1, rows.ids[1, place]] for place in (1, 2)]
    torch.testing.assert_close(
        with_lora.log_probs_of(states, tokens).detach(), torch.stack(expected), atol=0.1, rtol=0.1
    )  # products of bfloat16


def test_an_update_makes_better_responses_likelier_and_kl_grows_from_zero(causal_lm):
    torch.manual_seed(0)
    policy = grpo.Policy(causal_lm, NEW_TOKENS, END)
    rows = policy.write(PROMPTS, 8, seed=1)
    assert float(policy.kl_from_start(rows).abs().max()) == 0.0
    advantages = grpo.advantages_of(rows.ids.sum(dim=1).float(), 8)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)

    def likely():
        with torch.no_grad():
            states, tokens, row = policy.drawn(rows, torch.arange(24))
            return float((policy.log_probs_of(states, tokens) * advantages[row]).sum())

    before = likely()
    for _ in range(5):
        policy.update(rows, advantages, 0.0, optimizer)
    assert likely() > before + 0.1
    assert float(policy.kl_from_start(rows).min()) > 0.0


@pytest.fixture
def data(tmp_path):
    """Made-up pairs in the files that the experiment reads."""
    words = ["red", "blue", "sea", "sky", "rose", "grass", "seven", "apples", "calm", "green"]

    def write(name, rows):
        for split in ("train", "test"):
            path = tmp_path / "data" / name / f"{split}.jsonl.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            with gzip.open(path, "wt") as file:
                file.writelines(
                    json.dumps({**row, "prompt": row["prompt"].replace("X", split)}) + "\n" for row in rows
                )

    single = [{"prompt": f"X {a} {b}", "chosen": f"{a} {b}", "rejected": b, "subset": "helpful-base", "id": f"{a}{b}"}
              for a in words[:6] for b in words]  # fmt: skip
    turns = [{**row, "prompt": f"Human: {row['prompt']} now\n\nAssistant: yes\n\nHuman: so"} for row in single]
    others = [{**row, "subset": "harmless-base", "prompt": f"other {row['prompt']}"} for row in single[:20]]
    write("hh-rlhf", single + turns + others)
    write("prompt-swap", [{**row, "subset": "swap-truthfulqa", "id": f"{row['id']}/a"} for row in single[:20]])
    return tmp_path / "data"


@pytest.mark.slow
def test_all_stages_run_on_a_tiny_model_resume_and_gold_is_that_of_the_text(
    tmp_path, data, causal_lm_dir, tokenizer, monkeypatch, savefig
):
    import real_text
    import real_text_check

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    model, output = tmp_path / "model", tmp_path / "out"
    model.symlink_to(causal_lm_dir("llama_tied"))
    template = tmp_path / "template.jinja"  # turns end with the tiny tokenizer's own end token
    template.write_text(tokenizer.chat_template)
    monkeypatch.setattr(texts, "TEMPLATE", template)
    sizes = texts.Sizes(
        real_tokens=24, prompts=(24, 8, 8), per_prompt=6, policy_prompts=10, attack_prompts=2, candidates=32,
        measured_prompts=16, prompt_tokens=24, new_tokens=5, rows=64,
    )  # fmt: skip
    short = {"epochs": 1, "latent_dim": 8, "pairs_per_step": 32}
    monkeypatch.setattr(gold, "SETTING", replace(gold.SETTING, epochs=1))
    monkeypatch.setattr(proxies, "SEARCHED", {
        "standard": [models.Variant("standard", attention_dropout=share, **short) for share in (0.0, 0.1)],
        "InfoRM": [models.Variant(beta=beta, **short) for beta in (0.01, 0.1)],
    })  # fmt: skip
    monkeypatch.setattr(proxies, "GATE", {0.0: 0.0, 0.25: 0.0})
    monkeypatch.setattr(grpo, "GROUPS", 4)
    runs = [grpo.PolicyRun(name, coefficient, seed, steps=2, every=1) for name in grpo.ATTACKED
            for coefficient in grpo.COEFFICIENTS for seed in (10, 11)]  # fmt: skip
    monkeypatch.setattr(grpo, "policy_runs", lambda: runs)

    def do_all(jobs):
        for job in jobs:
            real_text.do_job(job)

    asked = argparse.Namespace(
        data=data, model=model, output=output, stages=real_text.STAGES, layers=1, device="cpu", processes=1,
        anyway=False, minutes=None, coefficient=None,
    )  # fmt: skip
    real_text.run_stages(asked, sizes, do_all)
    report = (output / "report.md").read_text()
    for words in ("InfoRM, chosen, WARM", "## CSI", "## GRPO"):
        assert words in report
    assert all((output / name).stat().st_size > 10_000 for name in ("curves.png", "policies.png"))

    check = real_text_check.compare(output, model, data, sizes, limit=64)
    assert check["responses"] == 64
    assert check["same_tokens"] > 3  # most of a random model's tokens are no text
    assert check["largest_difference"] < 1e-3

    # Started again, it writes what is missing as it was, and touches nothing else.
    kept, lost = output / "samples" / "other.safetensors", output / "samples" / "attack.safetensors"
    before, stamp = load_file(lost), kept.stat().st_mtime_ns
    result = next(iter((output / "proxies").glob("*.json")))
    figures = json.loads(result.read_text())
    for path in (lost, result):
        path.unlink()
    real_text.run_stages(asked, sizes, do_all)
    assert kept.stat().st_mtime_ns == stamp
    assert load_file(lost)["ids"].equal(before["ids"])
    assert json.loads(result.read_text()) == figures
