"""The policies behind docs/results/real-text.md: GRPO's loss, what it is told, and the top layers with LoRA."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
if not FOLDER.is_dir():
    pytest.skip("benchmarks/ is not beside the tests", allow_module_level=True)
sys.path.insert(0, str(FOLDER))

import real_text_grpo as grpo  # noqa: E402
import real_text_policy as policy  # noqa: E402

PROMPTS = [[5, 9, 40, 41, 42], [7, 8, 9]]
END, NEW_TOKENS = 2, 6


def draws(seed, tokens=12, words=7):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, words, generator=generator, dtype=torch.float64)
    start = torch.randn(tokens, words, generator=generator, dtype=torch.float64).log_softmax(dim=1)
    drawn = torch.randint(words, (tokens,), generator=generator)
    advantages = torch.randn(tokens, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), start, drawn, advantages


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_gradient_of_the_first_update_is_that_of_the_formula(coefficient):
    logits, start, drawn, advantages = draws(0)
    log_probs = logits.log_softmax(dim=1)
    old = log_probs.detach().gather(1, drawn[:, None])[:, 0]
    grpo.grpo_loss(log_probs, start, drawn, old, advantages, coefficient).backward()
    # By hand: d log p(drawn) / d logit v = [v is drawn] - p(v); d KL / d logit v = p(v) (log p(v) / q(v) - KL).
    chance = log_probs.detach().exp()
    ratios = log_probs.detach() - start
    kl = (chance * ratios).sum(dim=1, keepdim=True)
    expected = -advantages[:, None] * (torch.nn.functional.one_hot(drawn, 7) - chance)
    expected = (expected + coefficient * chance * (ratios - kl)) / len(drawn)
    torch.testing.assert_close(logits.grad, expected)


def test_tokens_beyond_the_clip_are_not_pushed_further():
    logits, start, drawn, _ = draws(1)
    log_probs = logits.log_softmax(dim=1)
    own = log_probs.detach().gather(1, drawn[:, None])[:, 0]
    change = torch.tensor([0.5, -0.5, 0.1] * 4, dtype=torch.float64)  # of the log ratio: above, below, within the clip
    advantages = torch.tensor([1.0] * 6 + [-1.0] * 6, dtype=torch.float64)
    grpo.grpo_loss(log_probs, start, drawn, own - change, advantages, 0.0).backward()
    stopped = (change > 0.2) & (advantages > 0) | (change < -0.3) & (advantages < 0)
    assert stopped.sum() == 4
    assert torch.equal(logits.grad.abs().sum(dim=1) == 0, stopped)


def test_kl_of_tokens_is_that_of_torch():
    logits, start, _, _ = draws(2)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(logits=start)
    )
    torch.testing.assert_close(grpo.kl_of_tokens(logits.log_softmax(dim=1), start), expected)


def test_advantages_are_those_within_a_group():
    found = grpo.advantages_of(torch.tensor([1.0, 3.0, 10.0, 10.0, 0.0, -4.0]), 2)
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0, 0.0, 0.0, 1.0, -1.0]) * 0.5**0.5, atol=1e-3, rtol=0.0)


@pytest.fixture
def with_lora(causal_lm_dir):
    model = AutoModelForCausalLM.from_pretrained(causal_lm_dir("llama_tied"))
    found = grpo.Policy(model, (range(1), range(1, 2)), lora_layers=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in found.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return found


def test_top_layers_give_the_log_probabilities_of_the_whole_policy(with_lora, causal_lm_dir):
    rows = policy.write_rows(with_lora.reader, PROMPTS, 4, NEW_TOKENS, END, seed=3)
    normed, before = with_lora.top(rows)
    where = grpo.drawn_places(rows, NEW_TOKENS)
    found = with_lora.log_probs(normed, where)
    whole = with_lora.wrapped(input_ids=rows.ids).logits.log_softmax(dim=2)  # padding lies behind
    torch.testing.assert_close(found, whole[where[0], where[1] - 1], atol=2e-2, rtol=2e-2)  # states kept as float16
    with with_lora.wrapped.disable_adapter(), torch.no_grad():
        start = with_lora.log_probs(with_lora.top(rows)[0], where)
        model = AutoModelForCausalLM.from_pretrained(causal_lm_dir("llama_tied"))
        expected = model(rows.ids).logits.log_softmax(dim=2)
    torch.testing.assert_close(start, expected[where[0], where[1] - 1], atol=2e-2, rtol=2e-2)
    assert float((found - start).detach().abs().max()) > 0.5
    assert before.shape == normed.shape


def test_drawn_tokens_are_all_but_the_end_of_a_response_that_was_cut():
    ids = torch.tensor([[9, 9, 5, 6, 7, END], [9, 5, END, 0, 0, 0]])
    rows = policy.Rows(ids, torch.tensor([2, 1]), torch.tensor([6, 3]), {})
    rows_of, columns = grpo.drawn_places(rows, new_tokens=3)
    assert list(zip(rows_of.tolist(), columns.tolist(), strict=True)) == [(0, 2), (0, 3), (0, 4), (1, 1), (1, 2)]


def test_lora_below_what_a_proxy_reads_is_refused(causal_lm_dir):
    model = AutoModelForCausalLM.from_pretrained(causal_lm_dir("llama_tied"))
    with pytest.raises(ValueError, match="has to begin in between"):
        grpo.Policy(model, (range(1, 2), range(1, 2)), lora_layers=2)
