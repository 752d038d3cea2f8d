"""The gap grid: the rewards of a plain loop over cells, each prompt computed once, resumable, bad cells left out."""

import copy
import math

import pytest
import torch
from datasets import Dataset

from inform_rm import InfoRMConfig, InfoRMForSequenceClassification
from inform_rm.data.encoding import encode
from inform_rm.data.pairs import BadRow
from inform_rm.data.preferences import FEATURES
from inform_rm.decomposition.gap_grid import distinct_prompts, gap_grid
from inform_rm.decomposition.prompt_free_gap import sample_prompts
from inform_rm.scoring.scorer import RewardScorer
from inform_rm.util.journal import RewardJournal

PROMPTS = ["Name a colour.", "How many apples are there?", "Write a sentence.", "Is the sky blue?", "Sea?"]


def pairs_dataset(rows):
    """Rows of (prompt, chosen, rejected)."""
    columns = [
        {
            "prompt": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected, "margin": None,
            "subset": "s", "id": str(row), "file": "pairs.jsonl", "row": row + 1,
        }
        for row, (prompt, chosen, rejected) in enumerate(rows)
    ]  # fmt: skip
    return Dataset.from_list(columns, features=FEATURES)


@pytest.fixture(scope="module")
def pairs():
    rows = [(prompt, f"The {prompt[:4]} is red.", "No" + "!" * number) for number, prompt in enumerate(PROMPTS)]
    return pairs_dataset([*rows, (PROMPTS[1], "Seven apples.", "Blue.")])


@pytest.fixture(scope="module")
def build(backbone_configs):
    def build(name):
        torch.manual_seed(0)
        config = InfoRMConfig(text_config=copy.deepcopy(backbone_configs[name]), latent_dim=8)
        model = InfoRMForSequenceClassification(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        return model.eval()

    return build


@pytest.fixture
def scorer(build, tokenizer):
    return RewardScorer(build("llama"), tokenizer)


def plain_rewards(scorer, pairs, choice, prompt_rows):
    """One forward pass a cell."""
    rewards = torch.full((*choice.shape, 2), math.nan)
    for pair, prompts in enumerate(choice.tolist()):
        for column, prompt in enumerate(prompts):
            for side, name in enumerate(("chosen", "rejected")):
                if prompt >= 0:
                    text = pairs[int(prompt_rows[prompt])]["prompt"]
                    ids = encode(scorer.tokenizer, text, pairs[pair][name]).input_ids
                    with torch.no_grad():
                        rewards[pair, column, side] = scorer.model(input_ids=torch.tensor([ids])).logits[0, 0]
    return rewards


@pytest.mark.parametrize(
    ("name", "template", "batching"),
    [
        *((name, True, "packed") for name in ("llama", "mistral", "gpt_neox")),
        *(("llama", False, batching) for batching in ("packed", "padded")),
    ],
)
def test_rewards_are_those_of_one_forward_pass_a_cell(build, tokenizer, pairs, name, template, batching):
    tokenizer = copy.deepcopy(tokenizer)
    if not template:
        tokenizer.chat_template = None  # prompt and response are one text: tokens may merge across the boundary
    scorer = RewardScorer(build(name), tokenizer, batching=batching, tokens_per_batch=200)
    prompt_rows, own = distinct_prompts(pairs)
    choice = sample_prompts(own, 4, len(prompt_rows), seed=0)
    grid = gap_grid(scorer, pairs, choice, prompt_rows)
    expected = plain_rewards(scorer, pairs, choice, prompt_rows)
    assert expected.std() > 0.1 and grid.used.all()
    torch.testing.assert_close(grid.rewards, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(grid.gaps, (expected[..., 0] - expected[..., 1]).double(), atol=2e-5, rtol=0)


def test_distinct_prompts_are_numbered_by_their_first_row(pairs):
    rows, own = distinct_prompts(pairs)
    assert rows.tolist() == [0, 1, 2, 3, 4] and own.tolist() == [0, 1, 2, 3, 4, 1]


def test_each_prompt_is_computed_once(scorer, pairs):
    prompt_rows, own = distinct_prompts(pairs)
    choice = sample_prompts(own, 5, 5, seed=0)  # every pair under every prompt
    grid = gap_grid(scorer, pairs, choice, prompt_rows)
    prompts = [encode(scorer.tokenizer, pairs[int(row)]["prompt"], "x") for row in prompt_rows]
    responses = [
        len(encode(scorer.tokenizer, PROMPTS[0], pairs[pair][side]).response_ids)
        for pair in range(6) for side in ("chosen", "rejected")
    ]  # fmt: skip
    assert grid.tokens_computed == sum(len(prompt.prompt_ids) for prompt in prompts) + 5 * sum(responses)
    assert grid.tokens_plain == 12 * sum(len(prompt.prompt_ids) for prompt in prompts) + 5 * sum(responses)


def test_a_part_of_the_rows_gets_the_same_rewards(scorer, pairs):
    prompt_rows, own = distinct_prompts(pairs)
    choice = sample_prompts(own, 3, 5, seed=0)
    whole = gap_grid(scorer, pairs, choice, prompt_rows)
    rows = torch.tensor([5, 2])
    part = gap_grid(scorer, pairs, choice[rows], prompt_rows, rows=rows)
    torch.testing.assert_close(part.rewards, whole.rewards[rows], atol=1e-5, rtol=0)


def test_an_interrupted_grid_goes_on(build, tokenizer, pairs, tmp_path, monkeypatch):
    scorer = RewardScorer(build("llama"), tokenizer, tokens_per_batch=60)
    prompt_rows, own = distinct_prompts(pairs)
    choice = sample_prompts(own, 4, 5, seed=0)
    whole = gap_grid(scorer, pairs, choice, prompt_rows)

    journal = RewardJournal(tmp_path / "journal", {"run": 1})
    original, calls = scorer._packed_forward, []

    def stops(*args):
        calls.append(args)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(scorer, "_packed_forward", stops)
    with pytest.raises(KeyboardInterrupt):
        gap_grid(scorer, pairs, choice, prompt_rows, journal=journal)
    journal.close()
    monkeypatch.setattr(scorer, "_packed_forward", original)

    journal = RewardJournal(tmp_path / "journal", {"run": 1})
    finished = len(list(journal.finished()))
    assert 0 < finished < 48
    resumed = gap_grid(scorer, pairs, choice, prompt_rows, journal=journal)
    assert len(list(journal.finished())) == 48
    assert resumed.tokens_computed < whole.tokens_computed and resumed.tokens_plain == whole.tokens_plain
    torch.testing.assert_close(resumed.rewards, whole.rewards, atol=1e-5, rtol=0)


def test_cells_without_a_prompt_are_not_used(scorer, pairs):
    prompt_rows, own = distinct_prompts(pairs)
    choice = sample_prompts(own, 5, 5, seed=0, strata=torch.tensor([0, 0, 1, 1, 1]))
    grid = gap_grid(scorer, pairs, choice, prompt_rows)
    assert (choice == -1).any() and grid.used.equal(choice >= 0)
    assert grid.rewards.isnan().all(dim=2).equal(choice == -1)


@pytest.mark.parametrize("overlong", ("error", "drop", "truncate_prompt"))
def test_prompts_longer_than_the_context(build, tokenizer, overlong):
    rows = [(PROMPTS[0], "Red.", "Blue"), ("Say " + "xq" * 50, "Yes.", "No"), (PROMPTS[1], "One.", "Two")]
    pairs = pairs_dataset(rows)
    scorer = RewardScorer(build("llama"), tokenizer, max_length=100)
    prompt_rows, own = distinct_prompts(pairs)
    choice = sample_prompts(own, 3, 3, seed=0)
    if overlong == "error":
        with pytest.raises(BadRow, match=r"pairs.jsonl, row 2: .* over max_length 100"):
            gap_grid(scorer, pairs, choice, prompt_rows, overlong=overlong)
        # Under other pairs the long prompt is left out: they are not at fault.
        fine = torch.tensor([0, 2])
        grid = gap_grid(scorer, pairs, choice[fine], prompt_rows, rows=fine, overlong=overlong)
        assert (grid.used == (choice[fine] != 1)).all()
        return
    grid = gap_grid(scorer, pairs, choice, prompt_rows, overlong=overlong)
    if overlong == "drop":
        assert (grid.used == (choice != 1)).all()
    else:
        assert grid.used.all() and grid.rewards.isfinite().all()


def test_rewards_that_are_no_numbers_are_handed_on(scorer, pairs):
    bad = encode(scorer.tokenizer, PROMPTS[4], "No!!!!").input_ids[-3]
    with torch.no_grad():
        scorer.model.get_input_embeddings().weight[bad] = math.nan
    prompt_rows, own = distinct_prompts(pairs)
    grid = gap_grid(scorer, pairs, sample_prompts(own, 3, 5, seed=0), prompt_rows)
    assert grid.used.all() and grid.gaps[4].isnan().all() and grid.gaps[0].isfinite().all()
