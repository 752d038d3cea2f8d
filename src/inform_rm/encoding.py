"""(prompt, response) -> token ids: the one place where text becomes what a model reads.

With a chat template the ids are exactly those of `tokenizer.apply_chat_template`, so they match what TRL and servers
feed. Without one, the ids are those of prompt + response as one text, with the end token added.

A special token's name in a message (``</s>``, ``<|assistant|>``) becomes that token, as it does in
`apply_chat_template`: who writes a response can end a turn in it and open another. `inform-rm check-data` counts such
rows and names the first ones; remove or rewrite them where the text is not your own.
"""

import copy
import json
import logging
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from transformers import AutoTokenizer

from inform_rm.chat_templates import TEMPLATE_DATE, check_rendered, check_template, with_fixed_date
from inform_rm.errors import InputError
from inform_rm.messages import Message, to_messages
from inform_rm.preferences import FEATURES, BadRow
from inform_rm.rendered_text import NotRenderedError, partly_rendered, warn_of_loss, what_is_lost
from inform_rm.untrusted import check_code_is_own, check_files

logger = logging.getLogger(__name__)

OVERLONG_POLICIES = ("error", "drop", "truncate_prompt")
BAD_ROW_POLICIES = ("error", "skip")

PLAIN_FORM = "\n\nHuman: ...\n\nAssistant: ..."
_PLAIN_TEMPLATE = (
    "BOS{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ message['content'] }}"
    "{%- elif message['role'] == 'user' -%}{{ '\n\nHuman: ' + message['content'] }}"
    "{%- else -%}{{ '\n\nAssistant: ' + message['content'] }}{%- if loop.last -%}EOS{%- endif -%}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '\n\nAssistant:' }}{%- endif -%}"
)

_ENCODED_FEATURES = Features(
    {
        "chosen_input_ids": [Value("int32")],
        "rejected_input_ids": [Value("int32")],
        "prompt_length": Value("int32"),
        "length": Value("int32"),
        "margin": Value("float64"),
        "subset": Value("string"),
        "id": Value("string"),
        "chosen_characters": Value("int32"),
        "rejected_characters": Value("int32"),
        "truncated": Value("bool"),
        "lost": Value("string"),
    }
)
_FAULT = "fault"  # column of `encode_pairs` alone: a bad row as JSON, or null

_TEXT_COLUMNS = ("prompt", "chosen", "rejected", "file", "row")


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt and of the response that follows it; ``lost`` is text that the template deleted."""

    prompt_ids: list[int]
    response_ids: list[int]
    lost: str | None = None

    @property
    def input_ids(self) -> list[int]:
        """What the model reads: prompt and response."""
        return self.prompt_ids + self.response_ids


@dataclass(frozen=True)
class EncodedPairs:
    """Encoded pairs and what happened to the over-long ones.

    Attributes:
        dataset: Columns chosen_input_ids, rejected_input_ids, prompt_length (tokens at the start that both sides
            share), length (tokens of the longer side), margin, subset, id, chosen_characters, rejected_characters.
        counts: ``pairs`` given, ``overlong`` among them, and how many of those were ``dropped`` or ``truncated``; the
            others are bad rows. ``partly_rendered``: ``n`` of the pairs in ``dataset`` of which the chat template
            deleted text, and up to 5 ``examples``.
        bad_rows: the pairs left out under ``on_bad_row="skip"``, in order.
    """

    dataset: Dataset
    counts: dict[str, Any]
    bad_rows: list[BadRow]


def load_tokenizer(
    model_path: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
) -> Any:
    r"""A tokenizer that can pad (on the right) and, if asked, has another chat template.

    The date in a template that reads the clock is `chat_templates.TEMPLATE_DATE`, see `fix_date`.

    Args:
        model_path: Folder or Hub id.
        revision: Branch, tag or commit of a Hub id.
        trust_remote_code: Run tokenizer code that comes with the model.
        chat_template: None keeps the tokenizer's own; ``"plain"`` is ``\n\nHuman: ...\n\nAssistant: ...``; else the
            path of a Jinja file, or Jinja text.

    Raises:
        InputError: No tokenizer there, an unusable template, or no token that could serve for padding.
    """
    check_files(model_path)
    if trust_remote_code and revision is None and not os.path.isdir(model_path):
        logger.warning("%s: trust_remote_code without a pinned revision runs whatever is there today.", model_path)
    try:
        if trust_remote_code:
            check_code_is_own(model_path, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(
            str(model_path), revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except InputError:
        raise
    except Exception as error:  # OSError, ValueError, KeyError, JSON and Hub errors, and tokenizers' bare Exception
        raise InputError(
            f"{model_path}: no loadable tokenizer ({type(error).__name__}: {str(error).partition(chr(10))[0][:400]}). "
            "Name a folder or Hub id that holds one (tokenizer.json)."
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise InputError(f"{model_path}: its tokenizer has no vocabulary. Name a folder that holds tokenizer.json.")
    if chat_template is not None:
        tokenizer.chat_template = _read_template(tokenizer, chat_template)
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {"": tokenizer.chat_template}
    for template in named.values():
        if template is not None:
            check_template(template, str(model_path))
    tokenizer = fix_date(tokenizer, str(model_path))
    if chat_template is not None:
        render(tokenizer, [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]], tokenize=False)
    if tokenizer.pad_token_id is None:
        name = next((name for name in ("unk_token", "eos_token") if getattr(tokenizer, name) is not None), None)
        if name is None:
            raise InputError(f"{model_path}: the tokenizer has no pad, unk or eos token. Set pad_token in its config.")
        tokenizer.pad_token = getattr(tokenizer, name)
        logger.warning("%s: no pad token; its %s %r is used for padding.", model_path, name, tokenizer.pad_token)
    tokenizer.padding_side = "right"
    return tokenizer


def fix_date(tokenizer: Any, name: str) -> Any:
    """The tokenizer, or a copy of it whose chat template reads no clock; a log line says which date it has instead.

    The template goes with the tokenizer where that is saved, and is part of its fingerprint.

    Raises:
        InputError: see `chat_templates.with_fixed_date`.
    """
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        fixed: Any = {key: text and with_fixed_date(text, name) for key, text in template.items()}
    else:
        fixed = template and with_fixed_date(template, name)
    if fixed == template:
        return tokenizer
    date = f"{TEMPLATE_DATE:%d %b %Y}"
    logger.warning("%s: the chat template reads the clock; its date is fixed to %s.", name, date)
    tokenizer = copy.copy(tokenizer)  # the one that was passed stays as it is
    tokenizer.chat_template = fixed
    return tokenizer


def with_plain_template(tokenizer: Any, name: str) -> Any:
    """The tokenizer, or where it has no chat template a copy with the plain one, and a log line that says so.

    For training: a new model learns where turns begin, and keeps the template with its tokenizer.
    """
    if tokenizer.chat_template is not None:
        return tokenizer
    logger.warning(
        "%s: the tokenizer has no chat template. Training uses the plain one, %r, and keeps it with the model. Pass "
        "chat_template (a file) for another.",
        name, PLAIN_FORM,
    )  # fmt: skip
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = _read_template(tokenizer, "plain")
    return tokenizer


def warn_of_no_template(tokenizer: Any, name: str) -> None:
    """Log what a model without chat template reads, which is what it was trained on only where that was glued too."""
    if tokenizer is not None and tokenizer.chat_template is None:
        logger.warning(
            "%s: the tokenizer has no chat template: nothing is put between prompt and response. If the model was "
            "trained otherwise, pass chat_template ('plain' for %r, or a file).",
            name, PLAIN_FORM,
        )  # fmt: skip


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raise `InputError` when the tokenizer has ids for which a model of `vocab_size` has no embedding."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise InputError(
            f"tokenizer: its ids go up to {largest}, but the model embeds only {vocab_size}. "
            "Use the model's own tokenizer, or resize the model's embeddings first."
        )


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
    if len(prompts) != len(responses):
        raise InputError(f"{len(prompts)} prompts but {len(responses)} responses; expected one response a prompt.")
    if not prompts:
        return []
    conversations = [to_messages(prompt) for prompt in prompts]
    losses: list[str | None] = [None] * len(prompts)
    if tokenizer.chat_template is None:
        for messages in conversations:
            if len(messages) > 1:
                raise InputError(
                    f"a prompt of {len(messages)} messages needs a chat template and the tokenizer has none. "
                    "Pass chat_template='plain' or a template file."
                )
        texts = [messages[0]["content"] for messages in conversations]
        starts = tokenizer(texts)["input_ids"]
        full = tokenizer([text + response for text, response in zip(texts, responses, strict=True)])["input_ids"]
        if tokenizer.eos_token_id is not None:
            full = [ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id] for ids in full]
    else:
        replies = [{"role": "assistant", "content": response} for response in responses]
        # Both sides of a pair, and many cells of a gap grid, have one prompt: it is rendered once.
        keys = [json.dumps(messages) for messages in conversations]
        distinct = dict(zip(keys, conversations, strict=True))
        rendered = render(tokenizer, list(distinct.values()), add_generation_prompt=True)
        start_of = dict(zip(distinct, rendered, strict=True))
        starts = [start_of[key] for key in keys]
        dialogues = [[*turns, reply] for turns, reply in zip(conversations, replies, strict=True)]
        texts = render(tokenizer, dialogues, tokenize=False)
        losses = [what_is_lost(dialogue, text) for dialogue, text in zip(dialogues, texts, strict=True)]
        full = _ids_of_rendered(tokenizer, texts)
    encoded = []
    for start, ids, lost in zip(starts, full, losses, strict=True):
        shared = shared_prefix_length(start, ids)
        if shared == len(ids):
            raise InputError("a response leaves no token after its prompt: the template or tokenizer discards it.")
        encoded.append(Encoded(list(ids[:shared]), list(ids[shared:]), lost))
    return encoded


def encode_groups(
    tokenizer: Any,
    prompts: Sequence[str | list[Message]],
    groups: Sequence[Sequence[str]],
    refusal: Callable[[int, InputError], InputError],
) -> list[list[Encoded]]:
    """Token ids of prompts with several responses each: `encode_many` of all at once, with the fault's place named.

    Args:
        tokenizer: see `encode_many`.
        prompts: N prompts.
        groups: the responses to each.
        refusal: makes the error to raise for the first prompt, by its place, that cannot be encoded, of its fault.
    """
    try:
        flat = iter(
            encode_many(
                tokenizer,
                [prompt for prompt, responses in zip(prompts, groups, strict=True) for _ in responses],
                [response for responses in groups for response in responses],
            )
        )
        return [[next(flat) for _ in responses] for responses in groups]
    except InputError:
        for place, (prompt, responses) in enumerate(zip(prompts, groups, strict=True)):
            try:
                encode_many(tokenizer, [prompt] * len(responses), responses)
            except InputError as error:
                raise refusal(place, error) from error
        raise


def shared_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens at the start that two sequences have in common.

    Example:
        >>> shared_prefix_length([1, 2, 3], [1, 2, 4, 3])
        2
    """
    for position, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return position
    return min(len(first), len(second))


@dataclass(frozen=True)
class TokenPair:
    """Token ids of both sides, how many at the start are prompt tokens that they share, and what the template lost."""

    chosen_ids: list[int]
    rejected_ids: list[int]
    prompt_length: int
    lost: str | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longer side, prompt included."""
        return max(len(self.chosen_ids), len(self.rejected_ids))


def encode_sides(tokenizer: Any, batch: dict[str, list]) -> list[TokenPair]:
    """Encode a batch of preference pairs (columns as in `preferences.FEATURES`).

    Raises:
        BadRow: A conversation that cannot be encoded, or two sides that become the same tokens.
    """

    def refusal(place: int, error: InputError) -> BadRow:
        return not_encodable(batch["file"][place], batch["row"][place], error)

    sides = list(zip(batch["chosen"], batch["rejected"], strict=True))
    pairs = []
    for chosen, rejected in encode_groups(tokenizer, batch["prompt"], sides, refusal):
        length = min(len(chosen.prompt_ids), len(rejected.prompt_ids))
        pairs.append(TokenPair(chosen.input_ids, rejected.input_ids, length, _lost_of_sides(chosen, rejected)))
    return pairs


def not_encodable(file: str, row: int, error: InputError) -> BadRow:
    """The bad row that `encode_many` refused."""
    kind = "not rendered" if isinstance(error, NotRenderedError) else "not encodable"
    return BadRow(file, row, str(error), kind)


def _lost_of_sides(chosen: Encoded, rejected: Encoded) -> str | None:
    if chosen.lost == rejected.lost:
        return chosen.lost
    sides = (("chosen", chosen.lost), ("rejected", rejected.lost))
    return "; ".join(f"{side}: {lost}" for side, lost in sides if lost is not None)


def check_sides_differ(pair: TokenPair, file: str, row: int) -> None:
    """Raise `BadRow` when tokenizer or template leave no difference between the sides."""
    if pair.chosen_ids == pair.rejected_ids:
        raise BadRow(
            file, row, "both sides become the same tokens (trimmed by the template, or unknown to the tokenizer). "
            "Remove the row or use another tokenizer.", "identical tokens",
        )  # fmt: skip


def removable_prompt_tokens(pair: TokenPair, bos_token_id: int | None) -> tuple[int, int]:
    """Leading tokens that truncation keeps (1 for a BOS token, else 0), and prompt tokens that it may remove."""
    keep = int(pair.prompt_length > 0 and bos_token_id is not None and pair.chosen_ids[0] == bos_token_id)
    return keep, pair.prompt_length - keep


def truncate_prompt(pair: TokenPair, max_length: int, bos_token_id: int | None) -> TokenPair | None:
    """The pair with as few prompt tokens removed as `max_length` needs, the same ones on both sides.

    They go from the left, after a BOS token. None when the longer response does not fit even without its prompt.

    Example:
        >>> truncate_prompt(TokenPair([1, 5, 6, 7], [1, 5, 6, 8, 9], prompt_length=3), 4, bos_token_id=1)
        TokenPair(chosen_ids=[1, 6, 7], rejected_ids=[1, 6, 8, 9], prompt_length=2, lost=None)
    """
    excess = max(0, pair.longest - max_length)
    keep, removable = removable_prompt_tokens(pair, bos_token_id)
    if excess > removable:
        return None
    chosen, rejected = (ids[:keep] + ids[keep + excess :] for ids in (pair.chosen_ids, pair.rejected_ids))
    return TokenPair(chosen, rejected, pair.prompt_length - excess, pair.lost)


def encode_each(tokenizer: Any, batch: dict[str, list]) -> list[TokenPair | BadRow]:
    """`encode_sides`, with the fault of a pair that cannot be encoded in its place.

    Pairs are encoded one at a time only where the batch as a whole cannot be.
    """
    try:
        return [*encode_sides(tokenizer, batch)]
    except InputError as error:
        if len(batch["row"]) == 1:
            if isinstance(error, BadRow):
                return [error]
            raise
        singles = [{name: values[at : at + 1] for name, values in batch.items()} for at in range(len(batch["row"]))]
        return [found for single in singles for found in encode_each(tokenizer, single)]


def skippable(bad: BadRow) -> BadRow:
    """The same fault for whoever meets it under ``on_bad_row="error"``: its reason names the way round it."""
    reason = f"{bad.reason} (on_bad_row='skip' leaves bad rows out and lists them.)"
    return BadRow(bad.file, bad.row, reason, bad.kind)


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
    """Encode a batch of pairs; the arguments, the rules for them and the errors are those of `encode_pairs`.

    Returns:
        Its columns, ``truncated`` (whether the prompt was cut), ``lost`` (file, row and what the chat template
        deleted, or None) and those named in ``kept``, without the pairs that were dropped or are bad; and the bad
        rows.
    """
    columns: dict[str, list] = {name: [] for name in (*_ENCODED_FEATURES, *kept)}
    bad_rows: list[BadRow] = []
    for index, pair in enumerate(encode_each(tokenizer, batch)):
        file, row = batch["file"][index], batch["row"][index]
        is_overlong = isinstance(pair, TokenPair) and max_length is not None and pair.longest > max_length
        try:
            if isinstance(pair, BadRow):
                raise pair
            check_sides_differ(pair, file, row)
            if is_overlong and overlong == "drop":
                continue
            if max_length is not None:
                pair = fit_pair(pair, max_length, overlong, tokenizer.bos_token_id, file, row)
        except BadRow as bad:
            if on_bad_row == "error":
                raise skippable(bad) from None
            bad_rows.append(bad)
            continue
        values: tuple[Any, ...] = (
            pair.chosen_ids, pair.rejected_ids, pair.prompt_length, pair.longest, batch["margin"][index],
            batch["subset"][index], batch["id"][index], len(batch["chosen"][index]),
            len(batch["rejected"][index]), is_overlong, pair.lost and f"{file}, row {row}: {pair.lost}",
        )  # fmt: skip
        values += tuple(batch[name][index] for name in kept)
        for name, value in zip(columns, values, strict=True):
            columns[name].append(value)
    return columns, bad_rows


def _columns_with_faults(batch: dict[str, list], **options: Any) -> dict[str, list]:
    """`encode_columns` for `Dataset.map`, which may run elsewhere: bad rows follow, with nothing but their fault."""
    columns, bad_rows = encode_columns(batch, **options)
    good = len(columns["id"])
    for name, values in columns.items():
        values += [[] if name.endswith("_input_ids") else False if name == "truncated" else None] * len(bad_rows)
    columns[_FAULT] = [None] * good + [json.dumps([bad.file, bad.row, bad.reason, bad.kind]) for bad in bad_rows]
    return columns


def encode_pairs(
    dataset: Dataset,
    tokenizer: Any,
    *,
    max_length: int | None,
    overlong: str = "error",
    on_bad_row: str = "error",
    num_proc: int | None = None,
    keep_text: bool = False,
) -> EncodedPairs:
    """Encode a whole dataset of preference pairs; a log line says where the chat template deletes text.

    Args:
        dataset: Columns as in `preferences.FEATURES`.
        tokenizer: As `load_tokenizer` returns it.
        max_length: Most tokens of prompt + response on either side; None for no limit.
        overlong: What happens to a pair with a side over `max_length`: ``"error"``, it is a bad row; ``"drop"``,
            counted; ``"truncate_prompt"`` removes the same tokens from the left of both sides' prompt (after BOS),
            never response tokens.
        on_bad_row: ``"error"`` stops at the first bad row: an over-long pair under ``overlong="error"``, responses
            that do not fit alone under ``"truncate_prompt"``, a row that cannot be encoded, or whose sides become the
            same tokens. ``"skip"`` leaves such rows out and returns them.
        num_proc: Processes to encode with.
        keep_text: Keep the columns prompt, chosen, rejected, file and row.

    Raises:
        BadRow: The first bad row, under ``"error"``.
        InputError: A wrong argument, or no pair is left.
    """
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1):
        raise InputError(f"max_length: got {max_length!r}; expected a whole number of tokens, at least 1, or None.")
    for name, value, choices in (
        ("overlong", overlong, OVERLONG_POLICIES),
        ("on_bad_row", on_bad_row, BAD_ROW_POLICIES),
    ):
        if value not in choices:
            raise InputError(f"{name}: got {value!r}; expected one of {', '.join(choices)}.")

    kept = Features({name: FEATURES[name] for name in (_TEXT_COLUMNS if keep_text else ())})
    encoded = dataset.map(
        _columns_with_faults,
        fn_kwargs={
            "tokenizer": tokenizer, "max_length": max_length, "overlong": overlong, "on_bad_row": on_bad_row,
            "kept": tuple(kept),
        },
        batched=True,
        batch_size=256,
        num_proc=num_proc,
        remove_columns=dataset.column_names,
        features=Features({**_ENCODED_FEATURES, **kept, _FAULT: Value("string")}),
        load_from_cache_file=False,  # a stale encoding would go unnoticed
        new_fingerprint=uuid.uuid4().hex,
        desc="Encoding pairs",
    )  # fmt: skip
    faults = [fault for batch in encoded.select_columns(_FAULT).iter(100_000) for fault in batch[_FAULT]]
    bad_rows = [BadRow(*json.loads(fault)) for fault in faults if fault is not None]
    dropped = len(dataset) - len(encoded)
    if len(bad_rows) == len(encoded):
        raise none_usable(len(dataset), bad_rows, max_length)
    if bad_rows:
        encoded = encoded.select([row for row, fault in enumerate(faults) if fault is None]).flatten_indices()
    truncated = sum(sum(batch["truncated"]) for batch in encoded.select_columns("truncated").iter(100_000))
    overlong_pairs = dropped + truncated + sum(bad.kind == "overlong" for bad in bad_rows)
    lost = partly_rendered(loss for batch in encoded.select_columns("lost").iter(100_000) for loss in batch["lost"])
    warn_of_loss(lost, len(encoded))
    counts = {
        "pairs": len(dataset), "overlong": overlong_pairs, "dropped": dropped, "truncated": truncated,
        "partly_rendered": lost,
    }  # fmt: skip
    return EncodedPairs(encoded.remove_columns(["truncated", "lost", _FAULT]), counts, bad_rows)


def fit_pair(
    pair: TokenPair, max_length: int, overlong: str, bos_token_id: int | None, file: str, row: int
) -> TokenPair:
    """The pair within `max_length` under a policy of `encode_pairs` other than ``"drop"``.

    Raises:
        BadRow: It is too long under ``"error"``, or even without its prompt.
    """
    if overlong == "error" and pair.longest > max_length:
        reason = (
            f"{pair.longest} tokens, over max_length {max_length}. Raise max_length, or choose overlong='drop' or "
        )
        raise BadRow(file, row, reason + "'truncate_prompt'.", "overlong")
    fitted = truncate_prompt(pair, max_length, bos_token_id)
    if fitted is None:
        alone = pair.longest - removable_prompt_tokens(pair, bos_token_id)[1]
        reason = (
            f"its longer response alone takes {alone} of max_length {max_length} tokens, and responses are never cut."
        )
        raise BadRow(file, row, f"{reason} Raise max_length, choose overlong='drop', or remove the row.", "overlong")
    return fitted


def render(tokenizer: Any, conversations: list[list[Message]], **options: Any) -> list:
    """Token ids of conversations under the tokenizer's chat template, or their text with ``tokenize=False``.

    Raises:
        InputError: if the template cannot render one of them, or makes far more text of it than it holds.
    """
    tokenize = options.pop("tokenize", True)
    try:
        texts = tokenizer.apply_chat_template(conversations, tokenize=False, **options)
        for text, conversation in zip(texts, conversations, strict=True):
            check_rendered(text, conversation)
    except InputError:
        raise
    except Exception as error:  # jinja2's errors, and whatever the template's own expressions raise
        raise InputError(
            f"the chat template cannot render a conversation ({type(error).__name__}: {str(error)[:400]}). Change the "
            "roles of the messages, or pass another chat_template (a file, or 'plain')."
        ) from error
    return _ids_of_rendered(tokenizer, texts) if tokenize else texts


def _ids_of_rendered(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    # As apply_chat_template does it: the special tokens are in the text.
    return tokenizer(texts, add_special_tokens=False, padding=False, truncation=False)["input_ids"]


def _read_template(tokenizer: Any, chat_template: str) -> str:
    if chat_template == "plain":
        adds_bos = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        bos = "{{ bos_token }}" if adds_bos else ""
        eos = "{{ eos_token }}" if tokenizer.eos_token_id is not None else ""
        return _PLAIN_TEMPLATE.replace("BOS", bos).replace("EOS", eos)
    if "{" in chat_template:
        return chat_template
    try:
        if not Path(chat_template).is_file():
            raise FileNotFoundError("no such file")
        return Path(chat_template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(
            f"chat_template: {chat_template!r} is neither 'plain', nor Jinja text, nor a readable file ({error})."
        ) from error
