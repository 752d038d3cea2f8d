"""Sequences that begin with the same prompt, computed as one row: the prompt once, no padding.

A packed row is ``[prompt | response | response | ... | prompt | response | ...]``. Everything in a decoder but
attention works on single tokens, so only attention has to know the layout: a prompt sees itself, a response sees its
prompt and itself, and positions go on from the prompt. Token ids, positions and what each token sees are those of the
separate sequences; so are rewards and gradients, up to rounding.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from inform_rm.scoring.packed_flex import flex_packed_attention, for_device

ATTENTION_NAME = "inform_rm_packed"
# Keywords of an attention call that do not change what a token sees. Any other one (soft caps, sinks, position biases)
# is refused, because leaving it out would give other rewards.
_HARMLESS_KEYWORDS = {
    "position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "return_dict",
    "num_items_in_batch", "is_causal",
}  # fmt: skip
# What FlexAttention does itself.
_FLEX_KEYWORDS = {"softcap", "s_aux"}
_NOT_GIVEN = -1
# On a CPU longer rows take more memory and are no faster (docs/results/performance.md).
CPU_TOKENS_PER_BATCH = 2048


@dataclass(frozen=True)
class PackedRow:
    """Sequences in one row without padding.

    Attributes:
        input_ids: ``(1, T)`` token ids.
        position_ids: ``(1, T)`` position of each token in its own sequence.
        segments: per prompt its number of tokens, then those of each response to it; they add up to T.
        pooled_positions: ``(N,)`` place in the row of each sequence's last token, in the order the sequences came.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: list[list[int]]
    pooled_positions: Tensor


def pack_sequences(
    sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int], pad_token_id: int | None = None
) -> PackedRow:
    """Put sequences into one row; those that begin with the same prompt tokens share them.

    Args:
        sequences: N rows of token ids.
        prompt_lengths: how many tokens at the start of each are its prompt; at least one token must be left.
        pad_token_id: for models that read the reward at the last token that is not this id; ``None``: at the last.

    Example:
        >>> row = pack_sequences([[1, 2, 3], [7, 8], [1, 2, 4, 5]], [2, 1, 2])
        >>> row.input_ids.tolist(), row.position_ids.tolist()
        ([[1, 2, 3, 4, 5, 7, 8]], [[0, 1, 2, 2, 3, 0, 1]])
        >>> row.segments, row.pooled_positions.tolist()
        ([[2, 1, 2], [2]], [2, 6, 4])
    """
    tokens: list[int] = []
    positions: list[int] = []
    segments = []
    pooled = [0] * len(sequences)
    for prompt, rows in rows_by_prompt(sequences, prompt_lengths).items():
        if len(rows) == 1:  # nothing to share: one causal segment
            prompt = tuple(sequences[rows[0]])
        start = len(tokens)
        tokens += prompt
        positions += range(len(prompt))
        lengths = [len(prompt)]
        for row in rows:
            last = _last_place(sequences[row], pad_token_id)
            # A place before the response lies in the shared prompt.
            pooled[row] = start + last if last < len(prompt) else len(tokens) + last - len(prompt)
            if len(rows) > 1:
                response = sequences[row][len(prompt) :]
                tokens += response
                positions += range(len(prompt), len(prompt) + len(response))
                lengths.append(len(response))
        segments.append(lengths)
    return PackedRow(torch.tensor([tokens]), torch.tensor([positions]), segments, torch.tensor(pooled))


def rows_by_prompt(
    sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int]
) -> dict[tuple[int, ...], list[int]]:
    """Prompt tokens -> places in ``sequences`` of the rows that begin with them; see `pack_sequences`."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, (ids, length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        if not 0 <= length < len(ids):
            raise ValueError(f"prompt_lengths: {length} of sequence {row}, which has {len(ids)} tokens.")
        groups.setdefault(tuple(ids[:length]), []).append(row)
    return groups


def split_at(
    sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int]
) -> tuple[list[Sequence[int]], list[int]]:
    """The prompts of sequences, and how many tokens each has besides: what `packed_batches` takes."""
    both = list(zip(sequences, prompt_lengths, strict=True))
    return [ids[:length] for ids, length in both], [len(ids) - length for ids, length in both]


def packed_batches(prompts: Sequence[Sequence[int]], sizes: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Items in batches whose tokens, each prompt counted once, keep a budget; items with the most tokens first.

    Items of one prompt are parted only if they exceed the budget, and then a batch may hold four times as many tokens
    as their prompt: a long prompt would otherwise be computed again for every few responses.

    Args:
        prompts: token ids of each item's prompt.
        sizes: tokens that each item has besides its prompt: those of a response, or of both responses of a pair.
        tokens_per_batch: the budget; an item with more makes a batch of its own.

    Returns:
        Lists of places in ``prompts``; each place is in one of them.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for item, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt), []).append(item)
    batches: list[list[int]] = [[]]
    tokens = 0
    for group, items in sorted(groups.items(), key=lambda pair: -len(pair[0]) - max(sizes[item] for item in pair[1])):
        if batches[-1] and tokens + len(group) + sum(sizes[item] for item in items) > tokens_per_batch:
            batches.append([])
            tokens = 0
        tokens += len(group)
        for place, item in enumerate(items):
            if place and tokens + sizes[item] > max(tokens_per_batch, 4 * len(group)):
                batches.append([])
                tokens = len(group)
            batches[-1].append(item)
            tokens += sizes[item]
    return batches if batches[-1] else []


def default_tokens_per_batch(model: Any) -> int:
    """Tokens of a forward pass without gradient where nobody chose a number."""
    on_cpu = model.get_input_embeddings().weight.device.type == "cpu"
    return CPU_TOKENS_PER_BATCH if on_cpu else 8192


def _last_place(ids: Sequence[int], pad_token_id: int | None) -> int:
    """Place of the last token that is not the padding id; 0 where there is none."""
    last = len(ids) - 1
    while last and ids[last] == pad_token_id:
        last -= 1
    return last


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = _NOT_GIVEN,
    packed_segments: "list[list[int]] | dict[int | None, BlockMask] | None" = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a `PackedRow`, segment by segment: no scores between segments that must not see each other.

    Called as transformers calls attention functions: query, key and value are ``(1, heads, T, size)``, the output
    ``(1, T, heads, size)``. What a layer asks for beyond that and would change the result is refused.

    Args:
        module: the model's attention layer.
        query: key and value may have fewer heads (grouped queries).
        key: see query.
        value: see query.
        attention_mask: must be ``None``.
        scaling: factor of the scores.
        dropout: probability, while training.
        sliding_window: a token sees at most this many tokens, itself among them; a layer whose config has a window
            must say whether it applies there.
        packed_segments: see `PackedRow.segments`; or block masks by sliding window (`inform_rm.scoring.packed_flex`).
        kwargs: further keywords of the layer.
    """
    has_masks = isinstance(packed_segments, dict)
    harmless = _HARMLESS_KEYWORDS | (_FLEX_KEYWORDS if has_masks else set())
    strange = [name for name, given in kwargs.items() if given is not None and name not in harmless]
    if dropout and has_masks:
        strange.append("attention dropout")
    if sliding_window == _NOT_GIVEN:
        sliding_window = None
        if getattr(getattr(module, "config", None), "sliding_window", None) is not None:
            strange.append("a sliding window that the layer does not hand over")
    if not getattr(module, "is_causal", True):
        strange.append("attention in both directions")
    if packed_segments is None or attention_mask is not None:
        strange.append("rows that are not packed")
    if packed_segments is None or strange:
        raise NotImplementedError(f"{type(module).__name__}: packed_attention cannot do {', '.join(strange)}")
    if isinstance(packed_segments, dict):
        mask, softcap, sinks = packed_segments[sliding_window], kwargs.get("softcap"), kwargs.get("s_aux")
        return flex_packed_attention(query, key, value, mask, scaling, softcap, sinks).transpose(1, 2), None
    lengths = [length for tree in packed_segments for length in tree]
    # One split for all segments: its backward pass is one concatenation.
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = _causal_mask(q.shape[2], k.shape[2], sliding_window, q.device)
        is_causal = mask is None and q.shape[2] == k.shape[2]
        return scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )

    outputs = []
    for tree in packed_segments:
        prompt_query, prompt_key, prompt_value = next(parts)
        if tree[0]:
            outputs.append(attend(prompt_query, prompt_key, prompt_value))
        for _ in tree[1:]:
            q, k, v = next(parts)
            outputs.append(attend(q, torch.cat([prompt_key, k], dim=2), torch.cat([prompt_value, v], dim=2)))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _causal_mask(queries: int, keys: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """``(queries, keys)`` of bool for the last ``queries`` of ``keys`` tokens; ``None`` where causality needs none."""
    if (sliding_window is None or keys <= sliding_window) and queries in (1, keys):
        return None
    positions = torch.arange(keys, device=device)
    distance = positions[keys - queries :, None] - positions
    return distance >= 0 if sliding_window is None else (distance >= 0) & (distance < sliding_window)


@contextmanager
def eval_mode_of(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards each module has the mode it had, for a caller that trains the model."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def packed_attention_of(model: Any) -> Iterator[None]:
    """Let a model's layers use `packed_attention` inside the block; afterwards they use what they used before."""
    text_config = model.config.get_text_config()
    before = {"": model.config._attn_implementation}
    if text_config is not model.config:
        before["text_config"] = text_config._attn_implementation
    if ATTENTION_NAME in before.values():
        yield
        return
    try:
        use_packed_attention(model)
        yield
    finally:
        model.set_attn_implementation(before)


def use_packed_attention(model: Any) -> None:
    """Let a model's layers use `packed_attention` from now on; it then runs packed rows only."""
    model.set_attn_implementation(ATTENTION_NAME)
    if model.config.get_text_config()._attn_implementation != ATTENTION_NAME:
        raise NotImplementedError(f"{type(model).__name__} has attention of its own")


def packed_inputs(model: Any, row: PackedRow) -> dict[str, Any]:
    """What a backbone takes of a packed row, on its device: there with block masks where that is a GPU."""
    device = model.get_input_embeddings().weight.device
    inputs = {
        "input_ids": row.input_ids.to(device),
        "position_ids": row.position_ids.to(device),
        "packed_segments": row.segments,
    }
    return for_device(inputs, model.config, device)


def packed_rewards(model: Any, row: PackedRow, reward_samples: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Rewards ``(N,)`` of a packed row and, with ``reward_samples``, their spread; under `packed_attention_of`."""
    inputs = packed_inputs(model, row)
    places = row.pooled_positions.to(inputs["input_ids"].device)
    backbone = getattr(model, model.base_model_prefix)
    # With gradient, activations may be computed again in a backward pass, which is the caller's.
    read = row.pooled_positions.unique().to(places.device)
    with nullcontext() if torch.is_grad_enabled() else last_layer_at(backbone, read):
        if model.config.model_type == "inform":
            output = model(**inputs, pooled_positions=places, reward_samples=reward_samples)
            return output.logits.flatten(), None if reward_samples is None else output.reward_std.flatten()
        hidden = backbone(**inputs, use_cache=False).last_hidden_state
        return model.score(hidden[0, places]).flatten(), None


@contextmanager
def last_layer_at(backbone: Any, places: Tensor) -> Iterator[None]:
    """Inside the block what can be of the last decoder layer is computed at the places that are read alone, each once.

    That is its MLP and, by the names they have in Llama, the projections to queries and of the attention's output:
    they take each token by itself, so that what they give at other places, 0 here, reaches nothing that is read and
    has no gradient. Keys and values are computed everywhere. A backward pass belongs into the block as well:
    checkpointing computes the layer again there.
    """
    names = set(backbone._no_split_modules or ())
    # FSDP2 gives a layer a class of its own, derived from its class.
    layers = [each for each in backbone.modules() if names & {base.__name__ for base in type(each).__mro__}]
    attention = getattr(layers[-1], "self_attn", None) if layers else None
    modules = [getattr(attention, "q_proj", None), getattr(attention, "o_proj", None)]
    modules += [getattr(layers[-1], "mlp", None)] if layers else []
    lengths: list[int] = []

    def take(_module: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        lengths[:] = given[0].shape[:2]
        return (given[0].index_select(1, places), *given[1:])

    def put(_module: Any, given: tuple[Tensor, ...], found: Any) -> Any:
        output = found[0] if isinstance(found, tuple) else found
        whole = output.new_zeros(*lengths, output.shape[-1]).index_copy(1, places, output)
        return (whole, *found[1:]) if isinstance(found, tuple) else whole

    hooks: list[Any] = []
    for module in modules:
        if module is not None:
            hooks += [module.register_forward_pre_hook(take), module.register_forward_hook(put)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def why_not_packed(model: Any) -> str | None:
    """``None`` if packed rows give this reward model's own rewards, tried on a few random tokens; else the reason."""
    text_config = model.config.get_text_config()
    if text_config._attn_implementation == ATTENTION_NAME:
        return None  # tried before it was set
    kinds = set(getattr(text_config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"layers of type {', '.join(sorted(kinds))}"
    pad_id = getattr(text_config, "pad_token_id", None)  # configs of old models have none
    vocabulary = [token for token in range(min(text_config.vocab_size, 1000)) if token != pad_id]
    drawn = random.Random(0).choices(vocabulary, k=24)
    sequences = [drawn[:10], drawn[:7] + drawn[10:18], drawn[18:]]
    try:
        with torch.no_grad(), eval_mode_of(model):
            device = model.get_input_embeddings().weight.device
            alone = [model(input_ids=torch.tensor([ids], device=device)).logits.flatten()[0] for ids in sequences]
            with packed_attention_of(model):
                together, _ = packed_rewards(model, pack_sequences(sequences, [7, 7, 0]))
        expected = torch.stack(alone).float()
        difference = (together.float() - expected).abs().max()
        tolerance = 1e-5 if model.dtype == torch.float32 else 0.05
        if not difference <= tolerance * max(1.0, expected.abs().max().item()):
            return f"packed rewards differ by {difference:.2g}"
    except Exception as error:  # whatever a foreign model raises, it can still be scored in padded batches
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return None


def engine_line(model: Any, why_padded: str | None, device: torch.device | None = None) -> str:
    """Device, dtype, rows and attention that a model runs with, and why, for a log; on ``device`` if it goes there."""
    weight = model.get_input_embeddings().weight
    device = weight.device if device is None else device
    card = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    if why_padded is not None:
        rows = f"padded rows ({why_padded}), attention {model.config.get_text_config()._attn_implementation}"
    elif device.type == "cuda":
        rows = "packed rows (they give the model's own rewards), one FlexAttention kernel a layer"
    else:
        rows = "packed rows (they give the model's own rewards), SDPA a segment at a time, which is faster on a CPU"
    return f"{device}{card} in {str(weight.dtype).removeprefix('torch.')}, {rows}"


AttentionInterface.register(ATTENTION_NAME, packed_attention)
