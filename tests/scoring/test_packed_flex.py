"""FlexAttention of packed rows against one sequence at a time, and its rule against brute force."""

import math
import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForSequenceClassification

from inform_rm.scoring import packed_flex
from inform_rm.scoring.packed_flex import (
    ROW_MULTIPLE,
    block_mask,
    compiled_kernel,
    flex_inputs,
    flex_packed_attention,
    may_attend,
    row_layout,
)
from inform_rm.scoring.packing import pack_sequences, packed_attention_of, packed_rewards

SIZES = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "num_labels": 1, "head_dim": 16,
}  # fmt: skip
MODELS = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 4},  # not the head's size
    "gemma3_text": {"sliding_window": 5, "query_pre_attn_scalar": 16},
    "gpt_neox": {"hidden_size": 64},  # a head of 16: FlexAttention takes no smaller one
    "gpt_oss": {"sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1},
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SEGMENTS = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=4)


@pytest.fixture
def uncompiled(monkeypatch):
    """What PyTorch runs on a CPU without the compiler before it, which traces each call and compiles nothing."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


@given(segments=SEGMENTS, window=st.none() | st.integers(1, 6), filled=st.integers(0, 3))
@settings(max_examples=25)
def test_a_token_sees_its_prompt_and_its_own_response_up_to_itself(segments, window, filled):
    places = [(tree, branch, step) for tree, sizes in enumerate(segments) for branch, size in enumerate(sizes)
              for step in range(size)]  # fmt: skip
    places += [(-1, 0, step) for step in range(filled)]
    trees, branches, positions = row_layout(segments, len(places))
    assert trees.tolist() == [tree for tree, _, _ in places]
    assert row_layout(segments)[0].tolist() == [tree for tree, _, _ in places if tree >= 0]
    where = torch.arange(len(places))
    found = may_attend(trees, branches, positions, window, where[:, None], where)
    for q, (tree, branch, _) in enumerate(places):
        # The sequence that ends with q's segment, as places of the row.
        sequence = [k for k, (t, b, _) in enumerate(places) if t == tree and b in (0, branch)]
        seen = [k for k in sequence if k <= q]
        if tree >= 0:
            assert positions[q] == len(seen) - 1
            seen = seen if window is None else seen[-window:]
            assert found[q].nonzero().flatten().tolist() == seen
        else:
            assert found[q, q]


LONG = st.lists(st.lists(st.integers(1, 200), min_size=1, max_size=4), min_size=1, max_size=4)
WINDOW = st.none() | st.integers(1, 300)


@given(segments=LONG, window=WINDOW)
@example(segments=[[ROW_MULTIPLE], [ROW_MULTIPLE]], window=None)  # blocks of one tree each
@example(segments=[[3 * ROW_MULTIPLE]], window=3 * ROW_MULTIPLE - 1)  # the first token is just out of the last one's
@settings(max_examples=25)
def test_a_block_is_looked_at_where_and_only_where_a_token_of_it_is_seen(segments, window):
    length = -(-sum(map(sum, segments)) // ROW_MULTIPLE) * ROW_MULTIPLE
    layout = row_layout(segments, length)
    where = torch.arange(length)
    sees = may_attend(*layout, window, where[:, None], where)
    blocks = sees.view(-1, ROW_MULTIPLE, length // ROW_MULTIPLE, ROW_MULTIPLE).transpose(1, 2).flatten(2)
    mask = block_mask(*layout, window)
    assert mask.mask_mod(None, None, where[:, None], where).equal(sees)
    assert mask.BLOCK_SIZE == (ROW_MULTIPLE, ROW_MULTIPLE) and mask.seq_lengths == (length, length)
    assert mask.kv_num_blocks.dtype == mask.full_kv_num_blocks.dtype == torch.int32  # what the kernel reads
    for number in range(len(blocks)):
        parts = mask.kv_indices[0, 0, number, : mask.kv_num_blocks[0, 0, number]].tolist()
        wholes = mask.full_kv_indices[0, 0, number, : mask.full_kv_num_blocks[0, 0, number]].tolist()
        assert sorted(parts + wholes) == blocks[number].any(dim=1).nonzero().flatten().tolist()
        # Wholly seen is also found where a key block is of one segment, and always before the token's own block.
        branch = layout[1].view(-1, ROW_MULTIPLE)
        is_one_segment = [len(branch[key].unique()) == 1 for key in range(number)]
        assert sorted(wholes) == [key for key in range(number) if blocks[number, key].all() and is_one_segment[key]]


@pytest.mark.slow
@given(segments=LONG, window=WINDOW)
@settings(max_examples=25, deadline=None)
def test_any_packing_gives_attention_under_the_mask_written_token_by_token(segments, window):
    total = sum(map(sum, segments))
    layout = row_layout(segments, -(-total // ROW_MULTIPLE) * ROW_MULTIPLE)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, len(layout[0]), 16, generator=generator)
    key, value = torch.randn(2, 1, 2, len(layout[0]), 16, generator=generator).unbind()
    where = torch.arange(total)
    sees = may_attend(*layout, window, where[:, None], where)
    expected = scaled_dot_product_attention(
        query[:, :, :total], key[:, :, :total], value[:, :, :total], sees, enable_gqa=True
    )
    output = flex_packed_attention(query, key, value, block_mask(*layout, window), None)
    torch.testing.assert_close(output[:, :, :total], expected, atol=1e-6, rtol=1e-5)


def test_rows_and_masks_are_on_the_models_device(monkeypatch):
    monkeypatch.setattr(packed_flex, "block_mask", lambda *given: given[:3])
    row = pack_sequences([[1, 2]], [0])
    inputs = {"input_ids": row.input_ids, "position_ids": row.position_ids, "packed_segments": row.segments}
    found = flex_inputs(inputs, AutoConfig.for_model("llama", **SIZES), torch.device("meta"))  # stands for a GPU
    assert found["input_ids"].is_meta and found["position_ids"].is_meta
    assert all(layout.is_meta for layout in found["packed_segments"][None])


def test_the_kernel_is_compiled_on_a_gpu_outside_of_a_compiled_model(monkeypatch):
    monkeypatch.setattr(packed_flex, "flex_attention", lambda *tensors, **options: "as it is")
    monkeypatch.setattr(packed_flex, "compiled_kernel", lambda: lambda *tensors, **options: "compiled")
    here, there = torch.ones(1), torch.ones(1, device="meta")  # stands for a GPU
    assert flex_packed_attention(here, here, here, None, None) == "as it is"
    assert flex_packed_attention(there, there, there, None, None) == "compiled"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert flex_packed_attention(there, there, there, None, None) == "as it is"


def test_in_half_precision_soft_caps_keep_their_digits_and_sinks_the_dtype(uncompiled, monkeypatch):
    query = torch.ones(1, 2, ROW_MULTIPLE, 16, dtype=torch.bfloat16)
    mask = block_mask(*row_layout([[ROW_MULTIPLE]]), None)
    found = flex_packed_attention(query, query, query, mask, None, sinks=torch.zeros(2))
    assert found.dtype == torch.bfloat16
    # One key of score 4 beside a sink of 0, then 128 of them.
    expected = [n * math.exp(4) / (n * math.exp(4) + 1) for n in (1, ROW_MULTIPLE)]
    torch.testing.assert_close(found[0, 0, [0, -1], 0], torch.tensor(expected).bfloat16())
    monkeypatch.setattr(packed_flex, "flex_attention", lambda *tensors, score_mod, **options: score_mod)
    capped = flex_packed_attention(query, query, query, mask, None, softcap=0.3)  # 0.3008 in bfloat16
    assert capped(torch.tensor(9.0), *range(4)).item() == pytest.approx(0.3, abs=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_rewards_and_gradients_are_those_of_one_sequence_at_a_time(name, device, monkeypatch, request):
    if device == "cpu":
        request.getfixturevalue("uncompiled")
    # PyTorch refuses gradients on a CPU, where its reference has a backward pass all the same.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SIZES, **MODELS[name]})
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").to(device).eval()
    for parameter in model.parameters():  # gpt-oss leaves its sinks as they come
        torch.nn.init.normal_(parameter, std=0.2) if parameter.isnan().any() or not parameter.any() else None
    tokens = torch.randint(1, 99, (300,)).tolist()  # in a row of three blocks; of one the kernel is another
    sequences = [tokens[:70] + tokens[80:127], tokens[:70] + tokens[130:172], tokens[172:272], [*tokens[:70], 7]]
    lengths = [70, 70, 0, 70]
    alone = torch.cat([model(input_ids=torch.tensor([ids], device=device)).logits.flatten() for ids in sequences])
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], device=device)
    row = pack_sequences(sequences, lengths)
    inputs = {"input_ids": row.input_ids, "position_ids": row.position_ids, "packed_segments": row.segments}
    inputs = flex_inputs(inputs, config, torch.device(device))
    with packed_attention_of(model):
        backbone = getattr(model, model.base_model_prefix)
        hidden = backbone(**inputs, use_cache=False).last_hidden_state
        together = model.score(hidden[0, row.pooled_positions.to(device)]).flatten()
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    (alone * weights).sum().backward()
    expected = {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    (together * weights).sum().backward()
    for key, value in expected.items():
        found = dict(model.named_parameters())[key].grad
        torch.testing.assert_close(found, value, atol=1e-4 * value.abs().max().item(), rtol=0, msg=key)
    if device == "cpu":
        return
    with packed_attention_of(model), torch.no_grad():  # what scoring uses there
        torch.testing.assert_close(packed_rewards(model, row)[0], alone, atol=1e-5, rtol=1e-5)


def why_not_compiled():
    """What inductor misses for a CPU: it compiles C++ that includes Python's headers."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "no C++ compiler: neither CXX nor g++"
    return None if Path(sysconfig.get_path("include"), "Python.h").exists() else "no Python.h"


# Not gpt-oss: PyTorch 2.13's kernel for CPUs gives no log-sum-exp, by which its sinks come in. Nor gradients.
@pytest.mark.slow
@pytest.mark.skipif(why_not_compiled() is not None, reason=str(why_not_compiled()))
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"gpt_oss"}))
def test_compiled_rewards_are_those_of_one_sequence_at_a_time(name, monkeypatch):
    config = AutoConfig.for_model(name, **{**SIZES, **MODELS[name]})
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    ran, kernel, block_mask_of = [], compiled_kernel(), packed_flex.block_mask

    def compiled(*tensors, **options):
        ran.append(options["block_mask"].seq_lengths)
        return kernel(*tensors, **options)

    def with_tensor(trees, branches, positions, window):
        # A whole number is a symbol under dynamic=True, whose name PyTorch 2.13 breaks in the C++ that it writes.
        return block_mask_of(trees, branches, positions, None if window is None else torch.tensor(window))

    monkeypatch.setattr(packed_flex, "flex_attention", compiled)
    monkeypatch.setattr(packed_flex, "block_mask", with_tensor)
    tokens = torch.randint(1, 99, (126,), generator=torch.Generator().manual_seed(0)).tolist()
    sequences = [tokens[:48], tokens[:27] + tokens[90:], tokens[60:], tokens[:27] + tokens[50:51]]
    row = pack_sequences(sequences, [27, 27, 0, 27])
    inputs = {"input_ids": row.input_ids, "position_ids": row.position_ids, "packed_segments": row.segments}
    with torch.no_grad():
        alone = torch.cat([model(input_ids=torch.tensor([ids])).logits.flatten() for ids in sequences])
        with packed_attention_of(model):
            backbone = getattr(model, model.base_model_prefix)
            hidden = backbone(**flex_inputs(inputs, config, torch.device("cpu")), use_cache=False).last_hidden_state
        together = model.score(hidden[0, row.pooled_positions]).flatten()
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert ran == 2 * [(256, 256)]  # a layer each; of one block it would be another kernel


def test_bfloat16_is_as_near_to_float32_as_a_sequence_alone_in_bfloat16(uncompiled):
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1) if parameter.dim() > 1 else None
    prompts = torch.randint(1, 99, (4, 20)).tolist()
    sequences = [prompts[place % 4] + torch.randint(1, 99, (10 + place,)).tolist() for place in range(24)]
    row = pack_sequences(sequences, [20] * 24)
    inputs = {"input_ids": row.input_ids, "position_ids": row.position_ids, "packed_segments": row.segments}
    with torch.no_grad():
        exact = torch.cat([model(input_ids=torch.tensor([ids])).logits.flatten() for ids in sequences])
        model.bfloat16()
        alone = torch.cat([model(input_ids=torch.tensor([ids])).logits.flatten() for ids in sequences])
        with packed_attention_of(model):
            hidden = model.model(**flex_inputs(inputs, config, torch.device("cpu")), use_cache=False).last_hidden_state
        together = model.score(hidden[0, row.pooled_positions]).flatten()
    spread = (alone.float() - exact).square().mean().sqrt()
    assert spread > 1e-4 * exact.std()  # otherwise nothing was rounded
    assert (together.float() - exact).square().mean().sqrt() < 1.5 * spread
