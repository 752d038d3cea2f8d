"""The experiment behind docs/results/real-text.md: cached states are those of the whole model, stages resume."""

import argparse
import gzip
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM

from inform_rm import InfoRMForSequenceClassification

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
if not FOLDER.is_dir():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)
sys.path.insert(0, str(FOLDER))

import real_text_attack as attack  # noqa: E402
import real_text_grpo as grpo  # noqa: E402
import real_text_models as models  # noqa: E402
import real_text_policy as policy  # noqa: E402
import real_text_proxies as proxies  # noqa: E402
import real_text_samples as samples  # noqa: E402

PROMPTS = [[5, 9, 40, 41, 42], [7, 8, 9], [30, 31, 32, 33, 34, 35, 36]]
END, NEW_TOKENS = 2, 6


@pytest.fixture(scope="module")
def written(causal_lm_dir):
    model = AutoModelForCausalLM.from_pretrained(causal_lm_dir("llama_tied"))
    reader = policy.LlamaWithStates(model, (0, 1))
    return model, reader, policy.write_rows(reader, PROMPTS, 4, NEW_TOKENS, END, seed=3)


def test_states_are_those_of_the_model_on_the_written_text(written):
    model, _, rows = written
    for row, length in enumerate(rows.lengths.tolist()):
        ids = rows.ids[row, :length]
        assert ids[: rows.prompt_lengths[row]].tolist() == PROMPTS[row // 4]
        with torch.no_grad():
            whole = model(ids[None], output_hidden_states=True)
        for depth in (0, 1):
            found = rows.states[depth][row, :length].float()
            torch.testing.assert_close(found, whole.hidden_states[depth][0], atol=2e-3, rtol=2e-3)  # kept as float16


def test_texts_that_are_read_have_the_states_of_those_that_were_written(written):
    _, reader, rows = written
    ids = [rows.ids[row, :length].tolist() for row, length in enumerate(rows.lengths.tolist())]
    prompts = [PROMPTS[row // 4] for row in range(len(ids))]
    again = policy.read_rows(reader, prompts, [each[len(prompt) :] for each, prompt in zip(ids, prompts, strict=True)])
    assert torch.equal(again.ids, rows.ids * (torch.arange(rows.ids.shape[1]) < rows.lengths[:, None]))
    for row, length in enumerate(rows.lengths.tolist()):
        torch.testing.assert_close(again.states[1][row, :length], rows.states[1][row, :length], atol=2e-3, rtol=2e-3)


def test_responses_end_once_and_are_no_longer_than_asked(written):
    _, _, rows = written
    for row, length in enumerate(rows.lengths.tolist()):
        response = rows.ids[row, rows.prompt_lengths[row] : length].tolist()
        assert response.index(END) == len(response) - 1 <= NEW_TOKENS


def test_draws_have_the_models_probabilities():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(20_000, -1)
    drawn = policy._draw(logits, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=4 * 0.5 / 20_000**0.5, rtol=0.0)


@pytest.mark.parametrize("architecture", ["standard", "inform"])
@pytest.mark.parametrize("depths", [range(1, 2), range(2)])
def test_rewards_from_states_are_those_of_the_whole_reward_model(written, causal_lm_dir, architecture, depths):
    _, _, rows = written
    folder = causal_lm_dir("llama_tied")
    top = models.start_of(folder, depths, models.Variant(architecture, latent_dim=8), seed=5)
    whole = InfoRMForSequenceClassification.from_backbone(folder, architecture=architecture, latent_dim=8).eval()
    whole.score.load_state_dict(top.model.score.state_dict())
    found, latents = models.rewards_of(top, models.Prepared(rows.states[depths.start], rows.lengths))
    mask = torch.arange(rows.ids.shape[1]) < rows.lengths[:, None]
    with torch.no_grad():
        expected = whole(input_ids=rows.ids, attention_mask=mask.long())
    torch.testing.assert_close(found, expected.logits[:, 0], atol=3e-3, rtol=3e-3)
    assert found.std() > 0.01
    if architecture == "inform":
        torch.testing.assert_close(latents, expected.latent_mean, atol=5e-3, rtol=5e-3)


def test_average_of_weights_is_their_mean():
    found = models.averaged([{"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, -2.0])}])
    assert found["a"].tolist() == [2.0, 0.0]


def lines_of(prompts, responses):
    return [
        {"prompt_number": prompt, "split": "train", "tokens": 3} for prompt in range(prompts) for _ in range(responses)
    ]


def test_pairs_follow_gold_and_flips_are_as_many_as_asked():
    gold = torch.randn(800, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    every = proxies.pairs_of(lines_of(200, 4), gold, "train")
    assert len(every.group) == 200 * 6
    assert bool((gold[every.chosen] > gold[every.rejected]).all())
    given, flipped = proxies.labelled(every, 0.25, seed=1)
    assert torch.equal(gold[given.chosen] < gold[given.rejected], flipped)
    assert abs(float(flipped.float().mean()) - 0.25) < 4 * (0.25 * 0.75 / 1200) ** 0.5


def test_partners_are_mutual_and_of_one_split():
    split_of = {number: samples.SPLITS[number % 10] for number in range(30)}
    found = samples.partners(2 * list(split_of.items()))  # a line a response
    assert len(found) == 6 + 2 + 20  # of 3 for validation one has none, of 21 for training likewise
    assert all(found[other] == one != other and split_of[one] == split_of[other] for one, other in found.items())


def test_pairs_that_the_prompt_decides_are_in_there_once_under_each_prompt():
    # Prompts 0 and 1 with two responses each; rows 4 to 7 are the same responses under the other prompt.
    lines = [{"prompt_number": prompt, "split": "test"} for prompt in (0, 0, 1, 1)]
    lines += [{"prompt_number": prompt, "split": "test", "of_row": row} for row, prompt in enumerate((1, 1, 0, 0))]
    gold = torch.tensor([1.0, 0.0, 0.9, 3.0, 0.2, 0.4, 0.8, 0.1])
    of_prompt = {0: {0: 1.0, 1: 0.0, 2: 0.8, 3: 0.1}, 1: {0: 0.2, 1: 0.4, 2: 0.9, 3: 3.0}}  # by response
    found = proxies.turned_pairs(lines, gold, "test")
    pairs = {(one, other) for one in range(4) for other in range(one)
             if (of_prompt[0][one] - of_prompt[0][other]) * (of_prompt[1][one] - of_prompt[1][other]) < 0}  # fmt: skip
    assert len(pairs) == 4
    assert len(found.group) == 2 * len(pairs)
    assert sorted(found.group.tolist()) == [0] * 4 + [1] * 4
    text = [0, 1, 2, 3, 0, 1, 2, 3]
    for chosen, rejected, prompt in torch.stack([found.chosen, found.rejected, found.group], dim=1).tolist():
        assert of_prompt[prompt][text[chosen]] > of_prompt[prompt][text[rejected]]
        assert lines[chosen]["prompt_number"] == lines[rejected]["prompt_number"] == prompt
    blind = torch.tensor([float(each) for each in text])
    assert models.accuracy(blind, found) == 0.5
    clear = proxies.turned_pairs(lines, gold, "test", least_gap=0.5)
    kept = {tuple(sorted((text[one], text[other]))) for one, other in zip(clear.chosen, clear.rejected, strict=True)}
    assert kept == {(0, 3), (2, 3)}


def test_best_of_n_is_that_of_every_set():
    import itertools

    generator = torch.Generator().manual_seed(0)
    proxy, gold = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    found = attack.curves(proxy, gold, lines_of(2, 8))
    for n in (2, 4):
        best = [gold[max(chosen, key=lambda row: proxy[row])].item() for prompt in (0, 8)
                for chosen in itertools.combinations(range(prompt, prompt + 8), n)]  # fmt: skip
        assert found["gold"][found["n"].index(n)] == pytest.approx(sum(best) / len(best))


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
    write("hh-rlhf", single + turns)
    write("prompt-swap", [{**row, "subset": "swap-truthfulqa", "id": f"{row['id']}/a"} for row in single[:20]])
    write("pandalm-human", [{**row, "prompt": f"other {row['prompt']}"} for row in single[:20]])
    return tmp_path / "data"


@pytest.mark.slow
def test_all_stages_run_on_a_tiny_model_resume_and_gold_is_that_of_the_text(
    tmp_path, data, causal_lm_dir, tokenizer, monkeypatch
):
    import real_text
    import real_text_check
    import real_text_policies
    import real_text_report

    model, output = causal_lm_dir("llama_tied"), tmp_path / "out"
    template = tmp_path / "template.jinja"  # turns end with the tiny tokenizer's own end token
    template.write_text(tokenizer.chat_template)
    for module in (samples, real_text_check):
        monkeypatch.setattr(module, "TEMPLATE", template)
    sizes = samples.Sizes(
        real_pairs=40, real_tokens=24, pair_prompts=40, per_prompt=4, new_tokens=5, attack_prompts=2, other_prompts=2,
        policy_prompts=16, measured_prompts=8, candidates=32, rows=16, prompt_tokens=24,
    )  # fmt: skip
    monkeypatch.setattr(proxies, "GATE", {0.0: 0.0, 0.25: 0.0})
    for module in (proxies, real_text_report):  # in so small a world gold may not turn with the prompt
        monkeypatch.setattr(module, "GATED", "all pairs")
    runs = [grpo.PolicyRun(name, 0.0, seed, steps=2, every=1) for name in grpo.ATTACKED for seed in (10, 11)]
    for module in (grpo, real_text_policies):
        monkeypatch.setattr(module, "policy_runs", lambda: runs)
    monkeypatch.setattr(real_text, "in_processes", lambda jobs, processes: [real_text._one(job) for job in jobs])
    asked = argparse.Namespace(
        data=data, model=model, output=output, stages=real_text.STAGES, parts=samples.PARTS, processes=2, anyway=False
    )
    real_text.run_stages(asked, sizes)
    report = (output / "report.md").read_text()
    assert "InfoRM, chosen, WARM" in report
    assert "## CSI" in report
    assert (output / "curves.png").stat().st_size > 10_000

    assert "## GRPO" in report
    assert (output / "policies.png").stat().st_size > 10_000
    done = next((output / "policy").glob("*/done.json")).parent.name
    again = real_text_check.compare(output, model, "", limit=8, policy=done)
    assert again["correlation"] > 0.99

    check = real_text_check.compare(output, model, "real", limit=32)
    assert check["responses"] == 32
    assert check["correlation"] > 0.999
    assert check["same_tokens"] == 32

    # Started again, it writes what is missing as it was, and touches nothing else.
    chunk, result = output / "samples" / "attack" / "0001.safetensors", next(iter((output / "proxies").glob("*.json")))
    before = {path: path.read_bytes() for path in (chunk, result)}
    kept_file = output / "samples" / "attack" / "0000.safetensors"
    stamp = kept_file.stat().st_mtime_ns
    chunk.unlink()
    result.unlink()
    real_text.run_stages(asked, sizes)
    assert kept_file.stat().st_mtime_ns == stamp
    assert load_file(chunk)["ids"].equal(load(before[chunk])["ids"])
    assert json.loads(result.read_text()) == json.loads(before[result])
