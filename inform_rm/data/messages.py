r"""Conversations in the ways that people write them -> lists of ``{"role", "content"}`` messages.

Read are message lists, also as JSON text, as a dict of lists or as ShareGPT turns, and transcripts
(``\n\nHuman: ...\n\nAssistant: ...``, also ``User:``, in capitals, or with ``### `` before the name). What only looks
like one of these is refused with what was found and what is expected: read as plain text, its markers would be words
of a user. `Fault` says what is wrong before the place of a row is known.
"""

import json
import math
import re
import unicodedata
from typing import Any

from inform_rm.errors import InputError, shortened, shown

Message = dict[str, str]

ROLES = ("system", "user", "assistant")
_ROLE_HINTS = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
# The names of the ShareGPT layout, and what they are called everywhere else.
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
# Parts of a message that a chat template would render; leaving them out would change the text without a word.
_RENDERED_KEYS = ("tool_calls", "tool_call_id", "name", "thinking", "reasoning_content", "images", "audio")

_JSON_MESSAGES = re.compile(r"""\s*"?\s*(\[\s*)?\{\s*\\?["'](role|content|from|value)\\?["']\s*:""")
_ROLE_FIRST = re.compile(r"""\s*\[\s*\{\s*["']role["']\s*:""")
_MESSAGE_KEYS = ({"role", "content"}, {"from", "value"})
_FIRST_MARKER = re.compile(r"\s*(### ?)?(Human|HUMAN|User|USER):")
_RENDERED_START = re.compile(
    r"\s*(<\|im_start\|>|<\|start_header_id\|>|<\|begin_of_text\|>|<start_of_turn>|<\|user\|>|<\|system\|>|"
    r"<\|assistant\|>|<\|start\|>|<\|START_OF_TURN_TOKEN\|>|<\|start_of_role\|>|(<s>|<bos>)?\s*\[INST\])"
)


# What ends a text that another template's markers went into, a reply or a prompt that asks for one.
_END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<end_of_turn>", "<|end|>", "</s>")
_ASKS_FOR_REPLY = ("ASSISTANT:", "### Response:", "### Assistant:")


class Fault(Exception):
    """What is wrong with a row, before its place is known; ``kind`` is for counting."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


def to_messages(prompt: str | list[Message]) -> list[Message]:
    r"""The messages of a prompt: text is one user turn, a transcript or message list as JSON text several.

    Raises:
        InputError: The prompt is empty, has an unknown role, or ends with an assistant turn.

    Example:
        >>> to_messages("Human: Hello.\n\nAssistant: Hi!\n\nHuman: Who are you?\n\nAssistant:")[-1]
        {'role': 'user', 'content': 'Who are you?'}
    """
    try:
        return prompt_messages("'prompt'", prompt)
    except Fault as fault:
        raise InputError(f"prompt: {fault}") from None


def prompt_messages(where: str, prompt: Any) -> list[Message]:
    """The messages of a prompt in any form; the last one is a user turn."""
    messages = conversation(where, prompt, is_prompt=True)
    if messages is not None:
        return checked_prompt(messages)
    if not isinstance(prompt, str):
        raise Fault("wrong type", f"{where} is {found(prompt)}; expected text or a list of messages.")
    check_text(where, prompt)
    return [{"role": "user", "content": prompt}]


def conversation(where: str, value: Any, is_prompt: bool = False) -> list[Message] | None:
    """The messages of a message list (in any of its forms) or a transcript; ``None`` for any other value."""
    if isinstance(value, str):
        listed = json_messages(where, value)
        return transcript(where, value, is_prompt) if listed is None else _messages(where, listed)
    if isinstance(value, dict) and any(keys <= value.keys() for keys in _MESSAGE_KEYS):
        value = _listed(where, value)
    return _messages(where, value) if isinstance(value, list) else None


def json_messages(where: str, text: str) -> list[Any] | None:
    """The list in text that is a message list as JSON; ``None`` for other text, JSON that is none included."""
    if not _JSON_MESSAGES.match(text):
        return None
    if not _ROLE_FIRST.match(text) and not any(all(key in text for key in keys) for keys in _MESSAGE_KEYS):
        return None
    try:
        value = json.loads(text)
    except RecursionError:
        raise Fault("unreadable", f"{where} is a message list that is nested too deeply. Remove the row.") from None
    except ValueError as error:
        raise Fault(
            "unreadable", f"{where} looks like a message list but is not JSON ({error}). Write it with json.dumps."
        ) from None
    if isinstance(value, str):
        raise Fault("unreadable", f"{where} is a message list that was written as JSON twice. Write it once.")
    listed = _listed(where, value)
    if not all(isinstance(item, dict) and any(keys <= item.keys() for keys in _MESSAGE_KEYS) for item in listed):
        return None  # JSON of something else, which a response may well be
    if isinstance(value, dict) and (
        not listed or listed[0].get("role", listed[0].get("from")) not in (*ROLES, *_SHAREGPT_ROLES)
    ):
        return None
    return listed


def checked_prompt(messages: list[Message]) -> list[Message]:
    """The messages, of which the last must be the user's."""
    if messages[-1]["role"] != "user":
        raise Fault("invalid roles", f"the last turn of the prompt is {messages[-1]['role']!r}; expected 'user'.")
    return messages


def transcript(where: str, text: str, is_prompt: bool = False) -> list[Message] | None:
    """The messages of a transcript whose turns can be told apart with certainty; ``None`` for other text.

    The end of a prompt's transcript that asks for a reply (``Assistant:``) is no turn.

    Raises:
        Fault: it begins like one, or was rendered by a chat template already, and cannot be read as one.
    """
    check_not_rendered(where, text)
    text = one_line_end(text)
    first = _FIRST_MARKER.match(text)
    if first is None:
        return None
    prefix, user = first[1] or "", first[2]
    assistant = "ASSISTANT" if user.isupper() else "Assistant"
    if f"\n\n{prefix}{assistant}:" not in text:
        if f"{prefix}{assistant}:" in text and (prefix or f"\n{assistant}:" in text):
            raise Fault(
                "transcript",
                f"{where} begins with {first[0].strip()!r} and has {assistant + ':'!r} without an empty line before "
                "it: a transcript whose turns cannot be told apart. Put an empty line before each turn, or give a "
                "list of messages.",
            )
        # A prompt of one turn. Without a blank after the marker it may as well be words ("User:innen").
        if prefix or not re.match(r"\s*Human:(\s|\Z)", text):
            raise Fault(
                "transcript",
                f"{where} begins with {first[0].strip()!r} but no {assistant + ':'!r} follows: a turn of a "
                "transcript, or words? Give a list of messages.",
            )
    parts = re.split(rf"(?:\A\s*|\n\n){re.escape(prefix)}({user}|{assistant}):", text)[1:]
    spoken = list(zip(parts[::2], parts[1::2], strict=True))
    if is_prompt and len(spoken) > 1 and spoken[-1][0] == assistant and not spoken[-1][1].strip():
        spoken.pop()  # asks for the reply
    messages = []
    for number, (speaker, content) in enumerate(spoken, start=1):
        if not has_text(content):
            raise Fault("empty field", f"{where}: empty {speaker} turn (turn {number}). Fill it or remove the row.")
        check_unicode(where, content)
        messages.append({"role": "user" if speaker == user else "assistant", "content": content.strip()})
    return messages


def check_not_rendered(where: str, text: str) -> None:
    """Raise `Fault` for text that begins as a chat template's rendering does."""
    if _RENDERED_START.match(text):
        start = shortened(repr(text.strip()), 40)
        raise Fault(
            "rendered text",
            f"{where} begins with {start}: text that a chat template has rendered already. Give its messages.",
        )


def end_token(text: str) -> str | None:
    """The end token of a chat template that a reply ends with, which the model's own will write again."""
    return next((token for token in _END_TOKENS if text.rstrip().endswith(token)), None)


def asks_for_reply(text: str) -> bool:
    """Whether a prompt ends as those do that were written for another template, and are read as a user's words."""
    return text.rstrip().endswith(_ASKS_FOR_REPLY)


def check_text(where: str, text: Any) -> None:
    """Raise `Fault` unless a value is text that holds something and can be encoded."""
    if text is None:
        raise Fault("missing field", f"{where} is missing. Add it or remove the row.")
    if not isinstance(text, str):
        raise Fault("wrong type", f"{where} is {found(text)}; expected text.")
    if not has_text(text):
        what = "empty" if not text else "only whitespace or invisible characters"
        raise Fault("empty field", f"{where} is {what}. Fill it or remove the row.")
    check_unicode(where, text)


def check_unicode(where: str, text: str) -> None:
    """Raise `Fault` for half a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        reason = f"{where} has an unpaired surrogate at character {error.start + 1}. Repair the text."
        raise Fault("bad encoding", reason) from None


def has_text(text: str) -> bool:
    """Whether there is anything to see in a text."""
    return any(not c.isspace() and unicodedata.category(c) not in ("Cc", "Cf") for c in text)  # Cf: zero-width


def found(value: Any) -> str:
    """Type and value, for a message."""
    return "null" if value is None else f"{type(value).__name__} {shown(value, 60)}"


def reply_text(where: str, response: Any) -> Any:
    """The text in a list of one assistant message, as an API gives a reply; any other value as it is."""
    listed = conversation(where, response) if not isinstance(response, str) else None
    if listed is None:
        return response
    if len(listed) > 1 or listed[0]["role"] != "assistant":
        raise Fault(
            "no reply",
            f"{where} holds several messages, or none of the assistant; expected one reply. Earlier turns belong into "
            "'prompt'.",
        )
    return listed[0]["content"]


def finite_number(value: Any) -> float | None:
    """A number, also as text in a cell of a CSV file; ``None`` for what is none."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def one_line_end(text: str) -> str:
    """The text with line feeds only."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _listed(where: str, value: Any) -> list[Any]:
    """A list of messages from one message, or from a dict of lists (the columns of a table of messages)."""
    if not isinstance(value, dict):
        return value
    columns = {key: column for key, column in value.items() if isinstance(column, list)}
    if not columns:
        return [value]
    sizes = {len(column) for column in columns.values()}
    if len(columns) < len(value) or len(sizes) > 1:
        raise Fault(
            "wrong type",
            f"{where} is a dict of lists of unequal lengths, {shown(value, 60)}; expected a list of messages.",
        )
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _messages(where: str, messages: list) -> list[Message]:
    if not messages:
        raise Fault("empty field", f"{where} is an empty list; expected at least one message.")
    checked = []
    for number, message in enumerate(messages, start=1):
        place = f"message {number} of {where}"
        if isinstance(message, dict) and "role" not in message and {"from", "value"} <= message.keys():
            message = _from_sharegpt(place, message)
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Fault("wrong type", f"{place} is {found(message)}; expected an object with 'role' and 'content'.")
        role, content = message["role"], message.get("content")
        if role not in ROLES:
            hint = f" Rename it {_ROLE_HINTS[role]!r}." if role in _ROLE_HINTS else ""
            raise Fault(
                "invalid roles",
                f"{place} has the role {shortened(repr(role))}; expected one of {', '.join(ROLES)}.{hint}",
            )
        if role == "system" and number > 1:
            raise Fault("invalid roles", f"{place} is a system message; only the first message can be one.")
        for key in _RENDERED_KEYS:
            if message.get(key):
                raise Fault("unsupported", f"{place} has {key!r}, which is not encoded. Write it into 'content'.")
        if isinstance(content, list):
            content = _text_of_parts(place, content)
        if role == "system" and (content is None or (isinstance(content, str) and not has_text(content))):
            continue  # says nothing; templates would put their own words around it
        check_text(f"the content of {place}", content)
        checked.append({"role": role, "content": content})
    if not checked:
        raise Fault("empty field", f"{where} holds nothing but an empty system message; expected a user turn.")
    return checked


def _from_sharegpt(place: str, message: dict[str, Any]) -> dict[str, Any]:
    role = message["from"]
    if role not in _SHAREGPT_ROLES:
        raise Fault("invalid roles", f"{place} is from {shown(role)}; expected one of {', '.join(_SHAREGPT_ROLES)}.")
    return {**message, "role": _SHAREGPT_ROLES[role], "content": message["value"]}


def _text_of_parts(place: str, parts: list[Any]) -> str:
    """The text of a content that is a list with one part of text; of several, templates make different things."""
    if len(parts) == 1 and isinstance(parts[0], dict) and isinstance(parts[0].get("text"), str):
        if parts[0].get("type", "text") == "text":
            return parts[0]["text"]
    raise Fault(
        "wrong type",
        f"the content of {place} is {found(parts)}; expected text (or a list of one part of type 'text').",
    )
