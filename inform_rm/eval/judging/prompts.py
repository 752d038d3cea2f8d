"""What a judge is asked, and how its answer is read: by its closing line or not at all."""

import hashlib
import importlib.resources
import re

from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from inform_rm.data.messages import Message
from inform_rm.errors import InputError, shortened

PAIR, LABEL = "judge_pair.txt.j2", "judge_label.txt.j2"
_FIELDS = {PAIR: ("prompt", "first", "second"), LABEL: ("prompt", "response")}
VERDICTS = {PAIR: ("1", "2", "tie"), LABEL: ("yes", "no")}
_MOST_CHARACTERS = 1 << 20
_MARKUP = r"[\s*_`#>\"'()\[\]{}.]*"
_VERDICT_LINE = re.compile(
    rf"^{_MARKUP}verdict{_MARKUP}[:=]{_MARKUP}(?:(?:answer|response)\s+)?(\w+){_MARKUP}$", re.IGNORECASE | re.MULTILINE
)
# Reasoning that a server did not take away, or that was cut before it ended.
_THOUGHT = re.compile(r"\A.*</think>|<think>.*\Z", re.DOTALL)


class Unreadable(Exception):
    """An answer that does not end in one verdict."""


class JudgePrompt:
    """The template of a request to the judge.

    It has ``prompt`` (text; of a conversation all its turns), ``first`` and ``second`` (pairs) or ``response``
    (labels), and may use ``mark``, a word that none of these texts holds. It must have the judge end with a line
    ``Verdict: 1``, ``Verdict: 2`` or ``Verdict: tie`` (pairs), ``Verdict: yes`` or ``Verdict: no`` (labels).

    Args:
        kind: `PAIR` or `LABEL`.
        path: Jinja file; `InputError` if it is no such template. ``None`` takes the built-in one.
    """

    def __init__(self, kind: str, path: str | None = None):
        self.kind = kind
        where = "the built-in prompt" if path is None else f"prompt_file: {path}"
        built_in = importlib.resources.files("inform_rm.util") / "templates" / kind
        text = built_in.read_text(encoding="utf-8") if path is None else _read(path)
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=False)
        try:
            used = meta.find_undeclared_variables(environment.parse(text))
            self._template = environment.from_string(text)
        except TemplateError as error:
            raise InputError(f"{where} is no Jinja template ({shortened(str(error), 200)}).") from None
        wanted = set(_FIELDS[kind])
        if not wanted <= used <= wanted | {"mark"}:
            raise InputError(
                f"{where} uses {', '.join(sorted(used)) or 'no variable'}; expected {', '.join(_FIELDS[kind])}, and "
                "perhaps mark."
            )
        if "verdict:" not in text.lower():
            raise InputError(
                f"{where} asks for no line 'Verdict: ...', by which the answer is read: one of "
                f"{', '.join(VERDICTS[kind])}."
            )

    def messages(self, prompt: list[Message], *responses: str) -> list[Message]:
        """The request about one response, or about two in this order."""
        texts = dict(zip(_FIELDS[self.kind], (_as_text(prompt), *responses), strict=True))
        try:
            return [{"role": "user", "content": self._template.render(**texts, mark=_mark(*texts.values()))}]
        except (TemplateError, ValueError, TypeError, OverflowError) as error:
            raise InputError(f"prompt_file: {type(error).__name__}: {shortened(str(error), 200)}.") from None

    def verdict(self, answer: str) -> str:
        """The verdict with which an answer ends; `Unreadable` for none, several, or one that was not asked for."""
        found = {value.lower() for value in _VERDICT_LINE.findall(_THOUGHT.sub("", answer))}
        if not found:
            raise Unreadable("no line 'Verdict: ...'")
        if len(found) > 1:
            raise Unreadable(f"several verdicts: {shortened(', '.join(sorted(found)))}")
        (verdict,) = found
        if verdict not in VERDICTS[self.kind]:
            raise Unreadable(f"the verdict is {shortened(repr(verdict), 40)}")
        return verdict


def _as_text(prompt: list[Message]) -> str:
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)


def _mark(*texts: str) -> str:
    """A word that is in none of the texts, and the same for the same texts."""
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return next(word for start in range(57) if not any((word := digest[start : start + 8]) in text for text in texts))


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MOST_CHARACTERS + 1)
    except (OSError, ValueError) as error:
        raise InputError(f"prompt_file: {path} cannot be read ({error}).") from None
    if len(text) > _MOST_CHARACTERS:
        raise InputError(f"prompt_file: {path} has more than {_MOST_CHARACTERS} characters.")
    return text
