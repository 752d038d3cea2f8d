"""Tokenizers as they are used here: able to pad, with a chat template that was checked and reads no clock."""

import copy
import functools
import logging
import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from inform_rm.data.messages import Message
from inform_rm.errors import InputError
from inform_rm.safety.chat_templates import (
    TEMPLATE_DATE,
    check_rendered,
    check_template,
    templates_of,
    with_fixed_date,
)
from inform_rm.safety.checkpoints import check_code_is_own, check_files, warn_unpinned

logger = logging.getLogger(__name__)

PLAIN_FORM = "\n\nHuman: ...\n\nAssistant: ..."
_PLAIN_TEMPLATE = (
    "BOS{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ message['content'] }}"
    "{%- elif message['role'] == 'user' -%}{{ '\n\nHuman: ' + message['content'] }}"
    "{%- else -%}{{ '\n\nAssistant: ' + message['content'] }}{%- if loop.last -%}EOS{%- endif -%}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '\n\nAssistant:' }}{%- endif -%}"
)


def load_tokenizer(
    model_path: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
) -> Any:
    r"""A tokenizer that can pad (on the right) and, if asked, has another chat template.

    The date in a template that reads the clock is `chat_templates.TEMPLATE_DATE`, see `fix_date`. The chat template
    ``None`` keeps the tokenizer's own; ``"plain"`` is ``\n\nHuman: ...\n\nAssistant: ...``; else it is the path of a
    Jinja file, or Jinja text.

    Raises:
        InputError: No tokenizer there, an unusable template, or no token that could serve for padding.
    """
    check_files(model_path)
    if trust_remote_code:
        warn_unpinned(str(model_path), revision)
    try:
        if trust_remote_code:
            check_code_is_own(model_path, revision=revision)
        hub = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(str(model_path), **hub)
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
    for template in templates_of(tokenizer.chat_template):
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
    return _with_template(tokenizer, fixed)


def _with_template(tokenizer: Any, template: Any) -> Any:
    tokenizer = copy.copy(tokenizer)  # the one that was passed stays as it is
    tokenizer.chat_template = template
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
    return _with_template(tokenizer, _read_template(tokenizer, "plain"))


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


def render(tokenizer: Any, conversations: list[list[Message]], tokenize: bool = True, **options: Any) -> list:
    """Token ids of conversations under the tokenizer's chat template, or their text without `tokenize`.

    Raises:
        InputError: if the template cannot render one of them, or makes far more text of it than it holds.
    """
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
    return ids_of_rendered(tokenizer, texts) if tokenize else texts


def ids_of_rendered(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of rendered text, as `apply_chat_template` makes them: the special tokens are in the text."""
    return tokenizer(texts, add_special_tokens=False, padding=False, truncation=False)["input_ids"]


def special_tokens_in(tokenizer: Any, texts: list[str]) -> list[str | None]:
    """Of each text the first special token's name that stands in it, which the tokenizer makes that token."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    names = _pattern(tuple(sorted({*tokenizer.all_special_tokens, *added} - {""}, key=len, reverse=True)))
    found = {text: names.search(text) for text in set(texts)}  # responses to one prompt bring it each time
    return [hit and hit[0] for hit in map(found.get, texts)]


@functools.lru_cache(maxsize=8)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the names, the longest first; nothing without names."""
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def _read_template(tokenizer: Any, chat_template: str) -> str:
    if chat_template == "plain":
        adds_bos = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        bos = "{{ bos_token }}" if adds_bos else ""
        eos = "{{ eos_token }}" if tokenizer.eos_token_id is not None else ""
        return _PLAIN_TEMPLATE.replace("BOS", bos).replace("EOS", eos)
    if "{" in chat_template:
        return chat_template
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(
            f"chat_template: {chat_template!r} is neither 'plain', nor Jinja text, nor a readable file ({error})."
        ) from error
