"""(prompt, response) -> token ids: the one place where text becomes what a model reads.

With a chat template the ids are exactly those of `tokenizer.apply_chat_template`, so they match what TRL and servers
feed. Without one, the ids are those of prompt + response as one text, with the end token added.

A special token's name in a message (``</s>``, ``<|assistant|>``) becomes that token, as it does in
`apply_chat_template`: who writes a response can end a turn in it and open another. Such rows are counted and named,
with those of which the template deletes text; remove or rewrite them where the text is not your own.
"""

import json
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, Value

from inform_rm.data.messages import Message, to_messages
from inform_rm.data.pairs import BadRow, shared_prefix_length, skippable
from inform_rm.data.preferences import FEATURES
from inform_rm.data.rendered_text import (
    NotRenderedError,
    is_reasoning_alone,
    not_as_written,
    warn_of_text,
    what_is_lost,
)
from inform_rm.data.tokenizer import ids_of_rendered, render, special_tokens_in
from inform_rm.errors import InputError, check_choice, check_whole_number

logger = logging.getLogger(__name__)

OVERLONG_POLICIES = ("error", "drop", "truncate_prompt")
BAD_ROW_POLICIES = ("error", "skip")
_SHARED_COLUMNS = {
    "prompt_length": Value("int32"), "length": Value("int32"), "margin": Value("float64"), "subset": Value("string"),
    "id": Value("string"),
}  # fmt: skip
_ENCODED_PAIRS = {
    "chosen_input_ids": [Value("int32")], "rejected_input_ids": [Value("int32")], **_SHARED_COLUMNS,
    "chosen_characters": Value("int32"), "rejected_characters": Value("int32"),
}  # fmt: skip
ENCODED_GROUPS = {
    "responses_input_ids": [[Value("int32")]], "labels": [Value("float64")], **_SHARED_COLUMNS,
    "characters": [Value("int32")],
}  # fmt: skip
# Columns of `encode_pairs` alone; the last is a bad row as JSON, or null.
_FAULT = "fault"
_OWN_COLUMNS = {"truncated": Value("bool"), "not_as_written": Value("string"), _FAULT: Value("string")}
_TEXT_COLUMNS = ("prompt", "chosen", "rejected", "file", "row")


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt and of the response that follows it.

    ``lost`` is text that the template deleted, ``special`` names of special tokens that became those tokens.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    lost: str | None = None
    special: str | None = None

    @property
    def input_ids(self) -> list[int]:
        """What the model reads: prompt and response."""
        return self.prompt_ids + self.response_ids

    @property
    def not_as_written(self) -> str | None:
        """What the model does not read as it stands."""
        return "; ".join(filter(None, (self.lost, self.special))) or None


@dataclass(frozen=True)
class EncodedPairs:
    """Encoded pairs or groups and what happened to the over-long ones.

    Attributes:
        dataset: Columns chosen_input_ids, rejected_input_ids, prompt_length (tokens at the start that all responses
            share), length (tokens of the longest), margin, subset, id, chosen_characters, rejected_characters. Of
            groups responses_input_ids and characters (one entry a response, in the order of the row) in place of both
            sides', and labels; there is no margin.
        counts: ``pairs`` given, ``overlong`` among them, and of those ``dropped`` or ``truncated`` (the others are bad
            rows); ``not_as_written``: ``n`` that the model does not read as they stand, and up to 5 ``examples``.
        bad_rows: the pairs left out under ``on_bad_row="skip"``, in order.
    """

    dataset: Dataset
    counts: dict[str, Any]
    bad_rows: list[BadRow]


def encode(tokenizer: Any, prompt: str | list[Message], response: str) -> Encoded:
    """Token ids of one prompt and response; see `encode_many`."""
    return encode_many(tokenizer, [prompt], [response])[0]


def encode_many(tokenizer: Any, prompts: Sequence[str | list[Message]], responses: Sequence[str]) -> list[Encoded]:
    """Token ids of prompts with their responses.

    With a chat template: exactly `apply_chat_template(prompt + [reply])`, tokens after the end token included; the
    prompt's share is the longest prefix that it has in common with the rendering that asks for a reply. Without one:
    the tokenizer's ids of prompt + response (with whatever special tokens it adds), then the end token unless it is
    there already.

    Raises:
        InputError: Several turns without a template, a conversation that the template refuses or of which it leaves
            out a message (`NotRenderedError`), or a response that leaves no token.
    """
    if not prompts:
        return []
    conversations = [to_messages(prompt) for prompt in prompts]
    losses: list[str | None] = [None] * len(prompts)
    if tokenizer.chat_template is None:
        if (most := max(map(len, conversations))) > 1:
            raise InputError(
                f"a prompt of {most} messages needs a chat template and the tokenizer has none. "
                "Pass chat_template='plain' or a template file."
            )
        texts = [messages[0]["content"] for messages in conversations]
        starts = tokenizer(texts)["input_ids"]
        full = tokenizer([text + response for text, response in zip(texts, responses, strict=True)])["input_ids"]
        if tokenizer.eos_token_id is not None:
            full = [ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id] for ids in full]
    else:
        # Both sides of a pair, and many cells of a gap grid, have one prompt: it is rendered once.
        keys = [json.dumps(messages) for messages in conversations]
        distinct = dict(zip(keys, conversations, strict=True))
        rendered = render(tokenizer, list(distinct.values()), add_generation_prompt=True)
        start_of = dict(zip(distinct, rendered, strict=True))
        starts = [start_of[key] for key in keys]
        dialogues = [
            [*turns, {"role": "assistant", "content": response}]
            for turns, response in zip(conversations, responses, strict=True)
        ]
        texts = render(tokenizer, dialogues, tokenize=False)
        losses = [what_is_lost(dialogue, text) for dialogue, text in zip(dialogues, texts, strict=True)]
        full = ids_of_rendered(tokenizer, texts)
    encoded = []
    for start, ids, lost, special in zip(
        starts, full, losses, _special_tokens(tokenizer, conversations, responses), strict=True
    ):
        shared = shared_prefix_length(start, ids)
        if shared == len(ids):
            raise InputError("a response leaves no token after its prompt: the template or tokenizer discards it.")
        encoded.append(Encoded(list(ids[:shared]), list(ids[shared:]), lost, special))
    return encoded


def _special_tokens(
    tokenizer: Any, conversations: Sequence[Sequence[Message]], responses: Sequence[str]
) -> list[str | None]:
    """Of each conversation with its response which messages hold a special token's name."""
    in_turns = iter(special_tokens_in(tokenizer, [turn["content"] for turns in conversations for turn in turns]))
    found = []
    for turns, in_response in zip(conversations, special_tokens_in(tokenizer, list(responses)), strict=True):
        names = [(f"turn {number} ({turn['role']})", next(in_turns)) for number, turn in enumerate(turns, start=1)]
        held = [f"{name} with {token!r}, which becomes that token"
                for name, token in [*names, ("the response", in_response)] if token]  # fmt: skip
        found.append("; ".join(held) or None)
    return found


def encode_groups(
    tokenizer: Any, prompts: Sequence[str | list[Message]], groups: Sequence[Sequence[str]]
) -> list[list[Encoded] | InputError]:
    """Token ids of N prompts with several responses each; in place of a group that cannot be encoded, its fault.

    All go through `encode_many` at once; one by one only where they cannot.
    """
    repeated = [prompt for prompt, responses in zip(prompts, groups, strict=True) for _ in responses]
    try:
        flat = iter(encode_many(tokenizer, repeated, [text for responses in groups for text in responses]))
        return [[next(flat) for _ in responses] for responses in groups]
    except InputError as error:
        if len(prompts) == 1:
            return [error]
    return [encode_groups(tokenizer, prompts[at : at + 1], groups[at : at + 1])[0] for at in range(len(prompts))]


@dataclass(frozen=True)
class TokenGroup:
    """Token ids of the responses to a prompt, each with it, and how many at the start all share.

    Of a pair the chosen side comes first. ``not_as_written`` is what the model does not read as it stands, and of
    which response.
    """

    ids: list[list[int]]
    prompt_length: int
    not_as_written: str | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest response, prompt included."""
        return max(map(len, self.ids))


def encode_each(tokenizer: Any, batch: dict[str, list]) -> list[TokenGroup | BadRow]:
    """Encode a batch of pairs or groups; in place of a bad one, its fault.

    Columns are those of `inform_rm.data.preferences.FEATURES` or `inform_rm.data.groups.GROUP_FEATURES`.
    """
    is_pair = "responses" not in batch
    texts = list(zip(batch["chosen"], batch["rejected"], strict=True)) if is_pair else batch["responses"]
    groups = encode_groups(tokenizer, batch["prompt"], texts)
    return [
        _token_group(group, of_row, is_pair, file, row)
        for group, of_row, file, row in zip(groups, texts, batch["file"], batch["row"], strict=True)
    ]


def _token_group(
    group: list[Encoded] | InputError, texts: Sequence[str], is_pair: bool, file: str, row: int
) -> TokenGroup | BadRow:
    if isinstance(group, InputError):
        return not_encodable(file, row, group)
    for number, (encoded, text) in enumerate(zip(group, texts, strict=True), start=1):
        if encoded.lost is not None and is_reasoning_alone(text):
            side = "a side" if is_pair else f"response {number}"
            error = NotRenderedError(
                f"the chat template leaves nothing of {side}: {encoded.lost}. Remove the row, or pass another "
                "chat_template (a file, or 'plain')."
            )
            return not_encodable(file, row, error)
    found = [encoded.not_as_written for encoded in group]
    what = found[0]
    if len(set(found)) > 1:
        names = ("chosen", "rejected") if is_pair else [f"response {number}" for number in range(1, len(group) + 1)]
        what = "; ".join(f"{name}: {each}" for name, each in zip(names, found, strict=True) if each is not None)
    return TokenGroup([encoded.input_ids for encoded in group], min(len(each.prompt_ids) for each in group), what)


def not_encodable(file: str, row: int, error: InputError) -> BadRow:
    """The bad row that `encode_many` refused."""
    kind = "not rendered" if isinstance(error, NotRenderedError) else "not encodable"
    return BadRow(file, row, str(error), kind)


def removable_prompt_tokens(group: TokenGroup, bos_token_id: int | None) -> tuple[int, int]:
    """Leading tokens that truncation keeps (1 for a BOS token, else 0), and prompt tokens that it may remove."""
    keep = int(group.prompt_length > 0 and bos_token_id is not None and group.ids[0][0] == bos_token_id)
    return keep, group.prompt_length - keep


def fit_group(
    group: TokenGroup, max_length: int, overlong: str, bos_token_id: int | None, file: str, row: int
) -> TokenGroup:
    """The group within `max_length` under a policy of `encode_pairs` other than ``"drop"``.

    As few prompt tokens as needed are removed, the same ones for all responses: from the left, after a BOS token.

    Raises:
        BadRow: It is too long under ``"error"``, or even without its prompt.

    Example:
        >>> group = TokenGroup([[1, 5, 6, 7], [1, 5, 6, 8, 9]], prompt_length=3)
        >>> fit_group(group, 4, "truncate_prompt", 1, "pairs.jsonl", 1)
        TokenGroup(ids=[[1, 6, 7], [1, 6, 8, 9]], prompt_length=2, not_as_written=None)
    """
    excess = max(0, group.longest - max_length)
    if excess and overlong == "error":
        raise BadRow(
            file, row, f"{group.longest} tokens, over max_length {max_length}. Raise max_length, or choose "
            "overlong='drop' or 'truncate_prompt'.", "overlong",
        )  # fmt: skip
    keep, removable = removable_prompt_tokens(group, bos_token_id)
    if excess > removable:
        raise BadRow(
            file, row, f"its longer response alone takes {group.longest - removable} of max_length {max_length} "
            "tokens, and responses are never cut. Raise max_length, choose overlong='drop', or remove the row.",
            "overlong",
        )  # fmt: skip
    ids = [each[:keep] + each[keep + excess :] for each in group.ids]
    return TokenGroup(ids, group.prompt_length - excess, group.not_as_written)


def none_usable(number: int, bad_rows: Sequence[BadRow | str], max_length: int | None = None) -> InputError:
    """The error for data of which nothing is left; without bad rows all of it was over-long."""
    if not bad_rows:
        return InputError(f"max_length: {max_length} leaves none of the {number} pairs. Raise it.")
    shown = "; ".join(str(bad) for bad in bad_rows[:3])
    return InputError(f"data: none of the {number} pairs can be used, {len(bad_rows)} are bad rows. {shown}")


def encode_columns(
    batch: dict[str, list],
    tokenizer: Any,
    *,
    max_length: int | None,
    overlong: str,
    on_bad_row: str = "error",
    kept: Sequence[str] = (),
) -> tuple[dict[str, list], list[BadRow]]:
    """Encode a batch of pairs or groups; the arguments, the rules for them and the errors are those of `encode_pairs`.

    Returns:
        The columns of those that fit, with the batch's own in ``kept``, and the bad rows. ``truncated`` says whether
        the prompt was cut, ``not_as_written`` (or None) the place and what the model does not read as it stands.
    """
    places: list[int] = []
    groups: list[TokenGroup] = []
    truncated: list[bool] = []
    bad_rows: list[BadRow] = []
    for place, group in enumerate(encode_each(tokenizer, batch)):
        file, row = batch["file"][place], batch["row"][place]
        is_overlong = isinstance(group, TokenGroup) and max_length is not None and group.longest > max_length
        try:
            if isinstance(group, BadRow):
                raise group
            _check_distinct(group, batch["labels"][place] if "labels" in batch else None, file, row)
            if is_overlong and overlong == "drop":
                continue
            if max_length is not None and is_overlong:
                group = fit_group(group, max_length, overlong, tokenizer.bos_token_id, file, row)
        except BadRow as bad:
            if on_bad_row == "error":
                raise skippable(bad) from None
            bad_rows.append(bad)
            continue
        places.append(place)
        groups.append(group)
        truncated.append(is_overlong)

    def of_batch(name: str) -> list:
        return [batch[name][place] for place in places]

    where = zip(of_batch("file"), of_batch("row"), groups, strict=True)
    columns = {name: of_batch(name) for name in ("subset", "id", *kept)} | {
        "prompt_length": [group.prompt_length for group in groups],
        "length": [group.longest for group in groups],
        "truncated": truncated,
        "not_as_written": [
            group.not_as_written and f"{file}, row {row}: {group.not_as_written}" for file, row, group in where
        ],
    }
    if "responses" in batch:
        characters = [list(map(len, responses)) for responses in of_batch("responses")]
        columns |= {"labels": of_batch("labels"), "margin": [None] * len(places), "characters": characters}
        return columns | {"responses_input_ids": [group.ids for group in groups]}, bad_rows
    columns["margin"] = of_batch("margin")
    for side, name in enumerate(("chosen", "rejected")):
        columns[f"{name}_input_ids"] = [group.ids[side] for group in groups]
        columns[f"{name}_characters"] = list(map(len, of_batch(name)))
    return columns, bad_rows


def _check_distinct(group: TokenGroup, labels: Sequence[float] | None, file: str, row: int) -> None:
    """Raise `BadRow` where responses with different labels, such as both sides of a pair, become the same tokens."""
    label_of: dict[tuple[int, ...], float] = {}
    both = zip(group.ids, (1.0, 0.0) if labels is None else labels, strict=True)
    if all(label_of.setdefault(tuple(ids), label) == label for ids, label in both):
        return
    what, remove = ("both sides", "the row") if labels is None else ("two responses with different labels", "one")
    raise BadRow(
        file, row, f"{what} become the same tokens (trimmed by the template, or unknown to the tokenizer). Remove "
        f"{remove}, or use another tokenizer.", "identical tokens",
    )  # fmt: skip


def _columns_with_faults(batch: dict[str, list], **options: Any) -> dict[str, list]:
    """A batch encoded for `Dataset.map`: bad rows follow, with nothing but their fault."""
    columns, bad_rows = encode_columns(batch, **options)
    columns[_FAULT] = [None] * len(columns["id"])
    for name, values in columns.items():
        is_list = name.endswith("_input_ids") or name in ("labels", "characters")
        empty: Any = [] if is_list else False if name == "truncated" else None
        values += [json.dumps(bad.args) if name == _FAULT else empty for bad in bad_rows]
    return columns


def encode_pairs(
    dataset: Dataset,
    tokenizer: Any,
    *,
    max_length: int | None,
    overlong: str = "error",
    on_bad_row: str = "error",
    keep_text: bool = False,
) -> EncodedPairs:
    """Encode a whole dataset of pairs or groups; a log line says which text the model does not read as it stands.

    Args:
        dataset: Columns as in `preferences.FEATURES` or `groups.GROUP_FEATURES`.
        tokenizer: As `load_tokenizer` returns it.
        max_length: Most tokens of prompt + response, of any response; None for no limit.
        overlong: What happens to a row with a response over `max_length`: ``"error"``, it is a bad row; ``"drop"``,
            counted; ``"truncate_prompt"`` removes the same tokens from the left of all its prompts (after BOS), never
            response tokens.
        on_bad_row: ``"error"`` stops at the first bad row: an over-long one under ``overlong="error"``, responses
            that do not fit alone under ``"truncate_prompt"``, a row that cannot be encoded, or whose responses become
            the same tokens. ``"skip"`` leaves such rows out and returns them.
        keep_text: Of pairs: keep the columns prompt, chosen, rejected, file and row.

    Raises:
        BadRow: The first bad row, under ``"error"``.
        InputError: A wrong argument, or no pair is left.
    """
    if max_length is not None:
        check_whole_number("max_length", max_length)
    check_choice("overlong", overlong, OVERLONG_POLICIES)
    check_choice("on_bad_row", on_bad_row, BAD_ROW_POLICIES)
    kept = {name: FEATURES[name] for name in (_TEXT_COLUMNS if keep_text else ())}
    features = ENCODED_GROUPS if "responses" in dataset.column_names else _ENCODED_PAIRS
    encoded = dataset.map(
        _columns_with_faults,
        fn_kwargs={
            "tokenizer": tokenizer, "max_length": max_length, "overlong": overlong, "on_bad_row": on_bad_row,
            "kept": tuple(kept),
        },
        batched=True,
        batch_size=256,
        remove_columns=dataset.column_names,
        features=Features({**features, **kept, **_OWN_COLUMNS}),
        load_from_cache_file=False,  # a stale encoding would go unnoticed
        new_fingerprint=uuid.uuid4().hex,
        desc="Encoding pairs",
    )  # fmt: skip
    faults, truncated, changed = (
        [value for batch in encoded.select_columns(name).iter(100_000) for value in batch[name]]
        for name in (_FAULT, "truncated", "not_as_written")
    )
    bad_rows = [BadRow(*json.loads(fault)) for fault in faults if fault is not None]
    dropped = len(dataset) - len(encoded)
    if len(bad_rows) == len(encoded):
        raise none_usable(len(dataset), bad_rows, max_length)
    if bad_rows:
        encoded = encoded.select([row for row, fault in enumerate(faults) if fault is None]).flatten_indices()
    told = not_as_written(changed)
    warn_of_text(told, len(encoded))
    overlong_pairs = dropped + sum(truncated) + sum(bad.kind == "overlong" for bad in bad_rows)
    counts = {
        "pairs": len(dataset), "overlong": overlong_pairs, "dropped": dropped, "truncated": sum(truncated),
        "not_as_written": told,
    }  # fmt: skip
    return EncodedPairs(encoded.remove_columns(list(_OWN_COLUMNS)), counts, bad_rows)
