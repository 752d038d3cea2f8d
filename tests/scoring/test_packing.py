"""Packed rows: rewards and gradients of the separate sequences, for every architecture that takes them."""

import copy
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    LlamaConfig,
    Qwen3Config,
    RwkvConfig,
)

from inform_rm import InfoRMConfig, InfoRMForSequenceClassification
from inform_rm.scoring import packed_flex, packing
from inform_rm.scoring.packing import (
    CPU_TOKENS_PER_BATCH,
    default_tokens_per_batch,
    engine_line,
    last_layer_at,
    pack_sequences,
    packed_attention,
    packed_attention_of,
    packed_batches,
    packed_inputs,
    packed_rewards,
    split_at,
    use_packed_attention,
    why_not_packed,
)
from inform_rm.scoring.scorer import RewardScorer

VOCABULARY = 320
# Prompts of one and of several tokens, responses of one token, a prompt without mates, no prompt at all, and rows
# longer than Mistral's window of 8.
SEQUENCES = [
    [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 20, 21, 22, 23],
    [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 30],
    [40, 41],
    [40, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51],
    [60, 61, 62, 63],
    [70],
    [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 30, 31, 32],
]
PROMPT_LENGTHS = [10, 10, 1, 1, 2, 0, 10]


def build(config, kind="inform", attention="sdpa"):
    """A reward model with rewards of order 1: an initial std of 0.02 would make every comparison pass."""
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    if kind == "inform":
        model = InfoRMForSequenceClassification(InfoRMConfig(text_config=config, latent_dim=8))
    else:
        own = type(config)(**{**config.to_dict(), "num_labels": 1})
        own.dtype = torch.float32
        model = AutoModelForSequenceClassification.from_config(own)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.set_attn_implementation(attention)
    return model.eval()


def rewards_alone(model, sequences):
    return torch.stack([model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in sequences])


@pytest.mark.parametrize(
    ("name", "kind", "attention"),
    [
        ("llama", "inform", "sdpa"),
        ("llama", "transformers", "eager"),
        ("mistral", "inform", "eager"),
        ("mistral", "transformers", "sdpa"),
        ("qwen2", "transformers", "sdpa"),
        ("gpt_neox", "inform", "sdpa"),
        ("gpt2", "transformers", "sdpa"),
    ],
)
def test_rewards_and_gradients_are_those_of_one_sequence_at_a_time(backbone_configs, name, kind, attention):
    model = build(backbone_configs[name], kind, attention)
    weights = torch.linspace(-1, 1, len(SEQUENCES)).exp()

    expected = rewards_alone(model, SEQUENCES)
    (expected * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with packed_attention_of(model):
        rewards, _ = packed_rewards(model, pack_sequences(SEQUENCES, PROMPT_LENGTHS))
        (rewards * weights).sum().backward()

    assert expected.std() > 0.1  # otherwise the comparison shows nothing
    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=0)
    for name, parameter in model.named_parameters():
        if name in gradients:
            scale = gradients[name].abs().max()
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4 * scale.item(), rtol=0, msg=name)


def test_reward_samples_are_those_of_one_sequence_at_a_time(mistral):
    alone = [mistral(input_ids=torch.tensor([ids]), reward_samples=5) for ids in SEQUENCES]
    with packed_attention_of(mistral):
        rewards, spread = packed_rewards(mistral, pack_sequences(SEQUENCES, PROMPT_LENGTHS), reward_samples=5)
    torch.testing.assert_close(rewards, torch.cat([one.logits[0] for one in alone]), atol=1e-5, rtol=0)
    torch.testing.assert_close(spread, torch.cat([one.reward_std[0] for one in alone]), atol=1e-5, rtol=0)


def test_a_packed_row_is_computed_on_the_models_device(backbone_configs):
    model = build(backbone_configs["mistral"], "transformers").to("meta")
    row = pack_sequences(SEQUENCES, PROMPT_LENGTHS)
    with packed_attention_of(model), torch.no_grad():
        inputs = packed_inputs(model, row)
        assert inputs["input_ids"].is_meta and inputs["position_ids"].is_meta
        rewards, _ = packed_rewards(model, row)  # on "meta" tensors of two devices do not mix
    assert rewards.is_meta and rewards.shape == (len(SEQUENCES),)


def test_a_gpu_gets_block_masks_for_the_models_windows(mistral, monkeypatch):
    monkeypatch.setattr(packed_flex, "flex_inputs", lambda *given: given)
    given = {}, mistral.config, torch.device("cuda")
    assert packed_flex.for_device(*given) == given
    assert packed_flex.for_device({}, mistral.config, torch.device("cpu")) == {}
    monkeypatch.setattr(packing, "for_device", lambda *given: given[1:])
    assert packed_inputs(mistral, pack_sequences([[5]], [0])) == (mistral.config, torch.device("cpu"))


@st.composite
def trees(draw):
    """Sequences of a few prompts, in any order, and their prompt lengths."""
    tokens = st.integers(3, VOCABULARY - 1)
    rows = []
    for prompt in draw(st.lists(st.lists(tokens, max_size=12), min_size=1, max_size=3)):
        responses = draw(st.lists(st.lists(tokens, min_size=1, max_size=12), min_size=1, max_size=4))
        rows += [(prompt + response, len(prompt)) for response in responses]
    return draw(st.permutations(rows))


@pytest.fixture(scope="module")
def mistral(backbone_configs):
    return build(backbone_configs["mistral"])


@settings(max_examples=12, deadline=None)
@given(rows=trees(), budget=st.integers(1, 80))
def test_rewards_do_not_depend_on_packing_order_or_mates(mistral, rows, budget):
    sequences, lengths = [ids for ids, _ in rows], [length for _, length in rows]
    scorer = RewardScorer(mistral, tokens_per_batch=budget)
    with torch.no_grad():
        expected = rewards_alone(mistral, sequences)
    rewards = scorer.score_encoded(sequences, prompt_lengths=lengths)
    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=0)


@settings(max_examples=25)
@given(rows=trees(), budget=st.integers(1, 80))
def test_batches_keep_the_budget_and_part_no_prompt_that_fits(rows, budget):
    sequences, lengths = [ids for ids, _ in rows], [length for _, length in rows]
    batches = packed_batches(*split_at(sequences, lengths), budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(rows)))
    sizes = {}
    for ids, length in rows:
        prompt = tuple(ids[:length])
        sizes[prompt] = sizes.get(prompt, length) + len(ids) - length
    for batch in batches:
        packed = pack_sequences([sequences[row] for row in batch], [lengths[row] for row in batch])
        prompts = [tuple(sequences[row][: lengths[row]]) for row in batch]
        longest = max(len(sequences[row]) for row in batch)
        assert packed.input_ids.numel() <= max(budget, 4 * max(map(len, prompts)), longest)
        for prompt in set(prompts):
            if sizes[prompt] <= budget:
                assert prompts.count(prompt) == sum(tuple(ids[:length]) == prompt for ids, length in rows)


def test_items_with_the_most_tokens_come_first():
    assert packed_batches([[1], [2], [3]], [1, 9, 5], 5) == [[1], [2], [0]]
    assert packed_batches([[1], 8 * [2], [3]], [3, 1, 5], 5) == [[1], [2], [0]]  # the prompt's tokens count


def test_a_budget_is_kept_when_it_is_used_up():
    assert packed_batches([[1], [2]], [1, 2], 5) == [[1, 0]]
    assert packed_batches([[1], [2]], [1, 2], 4) == [[1], [0]]
    assert packed_batches([[1], [2], [3], [4]], [1, 1, 1, 1], 4) == [[0, 1], [2, 3]]
    assert packed_batches([], [], 4) == []


@pytest.mark.parametrize("function", (pack_sequences, split_at))
def test_as_many_prompt_lengths_as_sequences_are_needed(function):
    with pytest.raises(ValueError, match="argument 2 is longer"):
        function([[1, 2]], [1, 1])


def test_a_model_that_looks_for_padding_is_read_at_the_last_other_token():
    rows = [[1, 2, 3, 9], [9, 9], [1, 2, 9, 9], [1, 2, 3, 4]]
    row = pack_sequences(rows, [2, 0, 2, 2], pad_token_id=9)
    # The shared prompt 1 2, three responses of two tokens; then the row of padding, read at its first token.
    assert row.pooled_positions.tolist() == [2, 8, 1, 7]


def test_a_long_prompt_is_not_computed_for_every_response():
    prompt = list(range(100, 200))
    sequences = [[*prompt, 5, reply] for reply in range(300)]
    batches = packed_batches(*split_at(sequences, [100] * 300), tokens_per_batch=50)
    assert [len(batch) for batch in batches] == [150, 150]  # 400 tokens: the prompt and 150 responses of 2


@settings(max_examples=15, deadline=None)
@given(rows=trees())
def test_a_row_holds_each_prompt_once_and_every_response(rows):
    sequences, lengths = [ids for ids, _ in rows], [length for _, length in rows]
    packed = pack_sequences(sequences, lengths)
    ids, positions = packed.input_ids[0].tolist(), packed.position_ids[0].tolist()
    prompts = {tuple(ids[:length]) for ids, length in rows}
    assert sum(map(sum, packed.segments)) == len(ids) == len(positions)
    assert all(all(tree[1:]) and len(tree) != 2 for tree in packed.segments)  # of one response it is one segment
    assert len(ids) == sum(map(len, prompts)) + sum(len(ids) - length for ids, length in rows)
    for sequence, place in zip(sequences, packed.pooled_positions.tolist(), strict=True):
        assert ids[place] == sequence[-1] and positions[place] == len(sequence) - 1


@settings(max_examples=20, deadline=None)
@given(
    segments=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=3),
    window=st.none() | st.integers(1, 8),
)
def test_attention_equals_dense_attention_under_a_mask_written_token_by_token(segments, window):
    owner = []  # (tree, segment of the tree, position) of each token
    for tree, lengths in enumerate(segments):
        for segment, length in enumerate(lengths):
            owner += [(tree, segment, position + (lengths[0] if segment else 0)) for position in range(length)]

    def sees(one, other):
        same = one[0] == other[0] and other[1] in (0, one[1])
        return same and other[2] <= one[2] and (window is None or one[2] - other[2] < window)

    mask = torch.tensor([[sees(one, other) for other in owner] for one in owner])
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, len(owner), 8, generator=generator)
    key, value = torch.randn(2, 1, 2, len(owner), 8, generator=generator).unbind()
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    output, _ = packed_attention(
        torch.nn.Module(), query, key, value, None, scaling=0.3, sliding_window=window, packed_segments=segments
    )
    torch.testing.assert_close(output, expected.transpose(1, 2), atol=1e-6, rtol=1e-5)


def test_prompts_are_computed_once(mistral):
    tokens = []
    handle = mistral.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        RewardScorer(mistral)
        tokens.clear()  # those of the check
        prompt = list(range(10, 60))
        RewardScorer(mistral, batching="packed").score_encoded(
            [[*prompt, 5, reply] for reply in range(100, 116)], prompt_lengths=[50] * 16
        )
    finally:
        handle.remove()
    assert tokens[-1] == 50 + 16 * 2


SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BertConfig(**SIZES, intermediate_size=48), "attention in both directions"),
        (Gemma2Config(**SIZES, intermediate_size=48, num_key_value_heads=2, head_dim=8), "softcap"),
        (
            BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, pad_token_id=3),
            "attention of its own",
        ),
        (FalconConfig(**SIZES, pad_token_id=0), "attention of its own"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_a_model_that_cannot_share_prompts_is_run_padded_with_one_log_line(config, reason, caplog):
    model = build(config, "transformers", "eager")
    before = model.config._attn_implementation
    with caplog.at_level(logging.WARNING, logger="inform_rm"):
        scorer = RewardScorer(model)
    assert scorer.batching == "padded"
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("inform_rm")]
    assert len(ours) == 1 and reason in ours[0]
    assert model.config._attn_implementation == before
    sequences = [[10, 11, 12, 13], [10, 11, 20], [30, 31]]
    with torch.no_grad():
        expected = rewards_alone(model, sequences)
    torch.testing.assert_close(scorer.score_encoded(sequences, [2, 2, 1]), expected, atol=1e-5, rtol=0)


def test_layers_of_unknown_kind_are_not_packed(backbone_configs):
    model = build(backbone_configs["qwen2"])
    model.config.text_config.layer_types = ["full_attention", "linear_attention", "chunked_attention"]
    assert why_not_packed(model) == "layers of type chunked_attention, linear_attention"


def test_padding_is_not_among_the_tokens_that_are_tried():
    # Transformers' own class would be read at the last other token, and of two tokens one is padding.
    config = LlamaConfig(**{**SIZES, "vocab_size": 2}, intermediate_size=48, pad_token_id=1)
    assert why_not_packed(build(config, "transformers")) is None


def test_a_reason_is_given_where_a_model_names_no_padding_or_fails(backbone_configs):
    rwkv = RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)
    assert not hasattr(rwkv, "pad_token_id") and "attention" in why_not_packed(build(rwkv, attention="eager"))
    model = build(backbone_configs["llama"])

    def fail(*_):
        raise RuntimeError("no\n" + 200 * "x")

    model.register_forward_pre_hook(fail)
    assert why_not_packed(model) == "RuntimeError: no " + 117 * "x"


def test_packing_is_tried_on_the_models_device(backbone_configs):
    model, devices = build(backbone_configs["llama"]).to("meta"), []  # stands for a GPU
    model.register_forward_pre_hook(
        lambda module, args, named: devices.append(named["input_ids"].device.type), with_kwargs=True
    )
    why_not_packed(model)
    assert devices and set(devices) == {"meta"}


def test_a_layer_that_hides_its_sliding_window_is_not_packed(backbone_configs):
    model = build(backbone_configs["llama"])
    model.config.text_config.sliding_window = 4
    assert why_not_packed(model).endswith(" cannot do a sliding window that the layer does not hand over")


@pytest.mark.parametrize(
    ("dtype", "size", "difference", "is_refused"),
    [
        (torch.float32, 0.0, 0.9e-5, False), (torch.float32, 0.0, 1.5e-5, True), (torch.bfloat16, 0.0, 0.04, False),
        (torch.bfloat16, 0.0, 0.06, True), (torch.float32, 100.0, 0.9e-3, False), (torch.float32, 100.0, 1.5e-3, True),
    ],
)  # fmt: skip
def test_what_rounding_may_change_is_told_from_what_packing_does(
    backbone_configs, monkeypatch, dtype, size, difference, is_refused
):
    model = build(backbone_configs["llama"], kind="foreign").to(dtype)
    torch.nn.init.zeros_(model.score.weight)  # all rewards are ``size``
    model.score.register_forward_hook(lambda module, inputs, output: output + size)
    monkeypatch.setattr(
        packing, "packed_rewards", lambda model, row: (torch.full((3,), size, dtype=torch.float64) + difference, None)
    )
    reason = why_not_packed(model)
    assert (reason is not None) == is_refused
    assert not is_refused or reason.startswith("packed rewards differ by ")


def test_a_model_set_to_packed_rows_refuses_others(backbone_configs):
    model = build(backbone_configs["llama"])
    use_packed_attention(model)
    with pytest.raises(NotImplementedError, match=r"cannot do rows that are not packed$"):
        model(input_ids=torch.tensor([[5, 6, 7]]))


def test_dropout_is_refused_under_block_masks_alone():
    tokens = torch.randn(3, 1, 2, 5, 16).unbind()
    with pytest.raises(NotImplementedError, match=r"cannot do attention dropout$"):
        packed_attention(torch.nn.Module(), *tokens, None, dropout=0.1, packed_segments={None: None})
    packed_attention(torch.nn.Module(), *tokens, None, dropout=0.1, packed_segments=[[5]])
    with pytest.raises(NotImplementedError, match=r"cannot do s_aux, rows that are not packed$"):
        packed_attention(torch.nn.Module(), *tokens, tokens[0], packed_segments=[[5]], s_aux=1, use_cache=True)


def test_the_engine_line_names_device_dtype_rows_and_reason(backbone_configs, monkeypatch):
    model = build(backbone_configs["llama"])
    packed = "packed rows (they give the model's own rewards), "
    slower = "SDPA a segment at a time, which is faster on a CPU"
    assert engine_line(model, None) == f"cpu in float32, {packed}{slower}"
    assert engine_line(model.bfloat16(), "no") == "cpu in bfloat16, padded rows (no), attention sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    there = engine_line(model, None, torch.device("cuda", 1))
    assert there == f"cuda:1 (card 1) in bfloat16, {packed}one FlexAttention kernel a layer"


def test_the_check_leaves_attention_and_modes_as_they_were(backbone_configs):
    model = build(backbone_configs["llama"], attention="eager").train()
    model.model.eval()
    assert why_not_packed(model) is None
    assert model.config._attn_implementation == model.config.text_config._attn_implementation == "eager"
    assert model.training and not model.model.training


def test_a_batch_is_smaller_on_a_cpu(backbone_configs):
    model = build(backbone_configs["llama"])
    assert default_tokens_per_batch(model) == CPU_TOKENS_PER_BATCH
    assert default_tokens_per_batch(model.to("meta")) == 8192


def test_a_sequence_that_is_all_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt_lengths: 2 of sequence 1"):
        pack_sequences([[1, 2], [3, 4]], [1, 2])


def test_the_head_sees_pooled_places_alone_and_scoring_keeps_nothing_for_gradients(backbone_configs):
    for kind in ("inform", "transformers"):
        model = build(backbone_configs["llama"], kind)
        seen = []
        model.score.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(given[0]))
        for layer in model.model.layers:  # of a prompt's keys and values, too, no graph is kept
            layer.self_attn.k_proj.register_forward_hook(lambda module, given, keys, seen=seen: seen.append(keys))
        caches = []
        model.model.register_forward_hook(lambda *call, caches=caches: caches.append(call[-1].past_key_values))
        RewardScorer(model).score_encoded(SEQUENCES, PROMPT_LENGTHS)
        assert caches[-1] is None
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert not any(tensor.requires_grad for tensor in seen)
        assert seen[-1].shape == (len(SEQUENCES), model.config.get_text_config().hidden_size)


def test_activations_that_are_computed_again_give_the_same_gradients(backbone_configs):
    model = build(backbone_configs["mistral"]).train()
    row = pack_sequences(SEQUENCES, PROMPT_LENGTHS)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        calls = []
        hooks = [layer.mlp.register_forward_pre_hook(lambda *given, calls=calls: calls.append(1))
                 for layer in model.model.layers]  # fmt: skip
        torch.manual_seed(0)  # the latent noise
        with packed_attention_of(model):
            packed_rewards(model, row)[0].square().sum().backward()
        found.append((len(calls), {name: value.grad for name, value in model.named_parameters()}))
        for hook in hooks:
            hook.remove()
    assert found[1][0] == 2 * found[0][0]  # that it was computed again
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, msg=name)


def gradients_of(model, rewards):
    model.zero_grad()
    (rewards * torch.linspace(-1, 1, len(rewards)).exp()).sum().backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def skipped_parts(layer):
    """What of a last layer takes each token by itself and is computed where it is read alone."""
    attention = getattr(layer, "self_attn", None)
    return [layer.mlp] if attention is None else [layer.mlp, attention.q_proj, attention.o_proj]


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("name", ("llama", "mistral", "qwen3", "gpt_neox", "gpt2"))
def test_the_last_layer_computed_where_it_is_read_alone_changes_no_gradient(backbone_configs, name, checkpointing):
    model = build(
        backbone_configs[name]
        if name != "qwen3"
        else Qwen3Config(**backbone_configs["qwen2"].to_dict() | {"head_dim": 8})
    )
    expected = rewards_alone(model, SEQUENCES)
    expected_gradients = gradients_of(model, expected)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    row = pack_sequences(SEQUENCES, PROMPT_LENGTHS)
    layers = [skipped_parts(layer) for layer in model.modules() if hasattr(layer, "mlp")]
    seen, last = {module: [] for parts in layers for module in parts}, layers[-1]
    noise = torch.zeros(len(SEQUENCES), model.config.latent_dim)
    with packed_attention_of(model), last_layer_at(model.model, row.pooled_positions):
        for module, lengths in seen.items():  # pre: where a layer is computed again its last steps are left out
            module.register_forward_pre_hook(lambda module, given, lengths=lengths: lengths.append(given[0].shape[1]))
        inputs = packed_inputs(model, row)
        rewards = model(**inputs, pooled_positions=row.pooled_positions, latent_noise=noise).logits.flatten()
        gradients = gradients_of(model, rewards)
    passes = 1 + checkpointing
    assert len(last) == (1 if name.startswith("gpt") else 3)
    assert [seen.pop(module) for module in last] == [[len(SEQUENCES)] * passes] * len(last)
    assert all(lengths == [row.input_ids.shape[1]] * passes for lengths in seen.values())
    assert expected.std() > 0.1  # otherwise the comparison shows nothing
    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=0)
    assert gradients.keys() == expected_gradients.keys()
    for name, value in expected_gradients.items():
        torch.testing.assert_close(gradients[name], value, atol=1e-4 * value.abs().max().item(), rtol=0, msg=name)


@pytest.mark.parametrize("name", ("llama", "gpt_neox", "gpt2"))
def test_without_gradient_the_last_layer_is_computed_where_it_is_read_alone(backbone_configs, name):
    model = build(backbone_configs[name])
    row = pack_sequences([*SEQUENCES, SEQUENCES[0]], [*PROMPT_LENGTHS, PROMPT_LENGTHS[0]])
    seen = []
    for module in model.modules():
        if hasattr(module, "mlp"):
            module.mlp.register_forward_hook(lambda mlp, given, found, seen=seen: seen.append(given[0].shape[1]))
    with packed_attention_of(model):
        expected, _ = packed_rewards(model, row)
        with torch.no_grad():
            rewards, _ = packed_rewards(model, row)
    torch.testing.assert_close(rewards, expected, atol=1e-6, rtol=1e-5)
    layers, tokens = len(seen) // 2, row.input_ids.shape[1]
    assert seen == [tokens] * (2 * layers - 1) + [len(row.pooled_positions.unique())]
