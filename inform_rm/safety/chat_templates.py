"""Chat templates from strangers: tried in a process of little time and memory before they are used.

A template is a small program. transformers runs it in jinja2's immutable sandbox: no attribute that begins with an
underscore, no file, no import, no call that changes what it is given. The sandbox does not bound time or memory, and
constant expressions such as ``'a' * 10**10`` are computed when the template is compiled. So `check_template` has a
child process compile it and render a conversation of 64 turns there, and refuses what takes 2 s, 512 MiB or makes
200,000 characters; `check_rendered` bounds what is handed to the tokenizer. Not bounded is a template that waits for
certain words in a message before it grows a text. Read the template of a model that you do not trust, or pass one of
your own (``chat_template``).
"""

import datetime
import functools
import json
import re
import subprocess
import sys
from typing import Any

from inform_rm.errors import InputError
from inform_rm.safety import template_trial

_MOST_WAITING_SECONDS = 60  # by the clock, where the machine is busy or knows no limit of processor time
# Without site: what a sitecustomize or a .pth file imports (coverage, torch) would count as the template's.
_TRIAL = "import runpy, sys; sys.path += sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"
# Tool descriptions and a system message of the template's own, beside each message's few words.
_SPARE_CHARACTERS = 1_000_000
_SPARE_FACTOR = 20

# What the templates that read the clock (Llama 3.2, gpt-oss, SmolLM3) are told. The template of Llama 3.2 itself falls
# back to this day where there is no clock.
TEMPLATE_DATE = datetime.datetime(2024, 7, 26)
_CLOCK_CALL = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(?:"([^"\\]*)"|'([^'\\]*)')\s*\)""")
# A comment, or whether there is a clock, which is the same on all days.
_NO_CLOCK = re.compile(r"\{#.*?#\}|strftime_now\s+is\s+(not\s+)?(defined|undefined|callable)", re.DOTALL)
_DATE_NOTE = f"{{# its date is fixed to {TEMPLATE_DATE:%Y-%m-%d} #}}"


def check_template(template: str, where: str) -> None:
    """Refuse a chat template that is no Jinja, or that asks for more than any conversation needs."""
    fault = _fault(template) if isinstance(template, str) else f"is a {type(template).__name__}; expected text"
    if fault is not None:
        raise InputError(f"{where}: the chat template {fault}. Pass another chat_template (a file, or 'plain').")


@functools.lru_cache(maxsize=256)
def _fault(template: str) -> str | None:
    try:
        tried = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRIAL, template_trial.__file__, *filter(None, sys.path)],
            input=json.dumps(template), capture_output=True, text=True, timeout=_MOST_WAITING_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return template_trial.TOO_MUCH
    started, _, fault = tried.stdout.partition("\n")
    if started != template_trial.STARTED:
        raise RuntimeError(f"no process could be started to try a chat template: {tried.stderr[-400:]}")
    return template_trial.TOO_MUCH if tried.returncode else json.loads(fault)  # a limit killed it


def with_fixed_date(template: str, where: str) -> str:
    """The template with `TEMPLATE_DATE` in place of what the clock says, so that a text has one reward on all days.

    Each call ``strftime_now("<format>")`` becomes the date in that format, as text, for whoever renders the template;
    a comment in front of it says so. A template that does not read the clock is returned as it is.

    Raises:
        InputError: the clock is read in another way than by calls with a constant format.
    """
    fixed = _CLOCK_CALL.sub(lambda call: json.dumps(TEMPLATE_DATE.strftime(call[1] or call[2] or "")), template)
    if "strftime_now" in _NO_CLOCK.sub("", fixed):
        raise InputError(
            f"{where}: the chat template reads the clock (strftime_now) in a way that cannot be replaced by a fixed "
            "date, so that a reward would change from day to day. Write strftime_now('%d %b %Y') with a constant "
            "format, or pass another chat_template (a file, or 'plain')."
        )
    if fixed == template:
        return template  # it only asks whether there is a clock
    # Lines that begin with a tag are trimmed (trim_blocks, lstrip_blocks): nothing of that may change.
    return _DATE_NOTE + ("\n" if template[0].isspace() else "") + fixed


def templates_of(chat_template: Any) -> list[Any]:
    """The templates of a tokenizer: none, one, or several with names."""
    named = chat_template.values() if isinstance(chat_template, dict) else [chat_template]
    return [template for template in named if template is not None]


def has_fixed_date(chat_template: Any) -> bool:
    """Whether `with_fixed_date` has changed a template of a tokenizer."""
    return any(template.startswith(_DATE_NOTE) for template in templates_of(chat_template))


def check_rendered(text: str, conversation: list[dict[str, str]]) -> None:
    """Refuse text of more than 20 characters for each of the conversation it was made from, and a million."""
    if len(text) <= _SPARE_CHARACTERS:
        return
    given = sum(len(message["content"]) + len(message["role"]) for message in conversation)
    if len(text) > _SPARE_CHARACTERS + _SPARE_FACTOR * given:
        raise InputError(
            f"the chat template makes {len(text)} characters of a conversation of {given}. Pass another chat_template "
            "(a file, or 'plain')."
        )
