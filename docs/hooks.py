"""What the build of the site adds to the pages: equations, and what is read from the code.

- An equation in LaTeX becomes MathML, which browsers draw by themselves: a page loads nothing from elsewhere.
- Docstrings are read as Markdown.
- ``<!-- settings -->``, ``<!-- commands -->`` and ``<!-- result: module.Class -->`` become tables of the settings, the
  commands and the fields of a result, so that they cannot differ from the code.
"""

import argparse
import contextlib
import dataclasses
import html
import importlib
import inspect
import io
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import griffe
from latex2mathml.converter import convert

_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_MARKER = re.compile(r"^<!-- (settings|commands|result)(?:: (\S+))? -->$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Docstrings as they are written here, for a reader of Markdown: one example, literal blocks, roles."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called with each module, class and function that is read."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", inspect.cleandoc(obj.docstring.value), flags=re.MULTILINE)
            text = re.sub(r" ?::$", ":", text, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r":(?:func|meth|class):(?=`)", "", text)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with each page before it becomes HTML."""
    made = {"settings": settings_tables, "commands": command_sections, "result": result_table}
    return _MARKER.sub(lambda marker: made[marker[1]](*([marker[2]] if marker[2] else [])), markdown)


def on_page_content(html_text: str, **_: Any) -> str:
    """Called by mkdocs with the HTML of each page."""
    return _EQUATION.sub(_mathml, html_text)


def _mathml(equation: re.Match[str]) -> str:
    latex = html.unescape(equation[3]).strip()
    drawn = convert(latex, display="block" if equation[2] == "[" else "inline")
    return f'<div class="equation">{drawn}</div>' if equation[2] == "[" else drawn


def settings_tables() -> str:
    """Every setting of a training run that is ours, by group, as ``inform-rm train --help`` has it."""
    from inform_rm.training.arguments import GROUPS, OUR_SETTINGS

    starts = {first: heading for heading, first in GROUPS.items()}
    lines: list[str] = []
    for name, spec in OUR_SETTINGS.items():
        if name in starts:
            lines += [
                "",
                f"## {starts[name][0].upper()}{starts[name][1:]}",
                "",
                "| setting | default | |",
                "|---|---|---|",
            ]
        lines.append(f"| `{name}` | {_default(spec.default)} | {_cell(spec.metadata['help'])} |")
    return "\n".join(lines)


def command_sections() -> str:
    """Every command with its flags, as its ``--help`` has them."""
    return "\n".join(_command_lines())


def _command_lines() -> Iterator[str]:
    from inform_rm.cli.dispatch import make_parser

    (commands,) = (action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction))
    texts = {choice.dest: choice.help for choice in commands._choices_actions}
    for name, parser in commands.choices.items():
        yield from ("", f"## inform-rm {name}", "", f"{str(texts[name])[:1].upper()}{str(texts[name])[1:]}.", "")
        flags = [action for action in parser._actions if action.option_strings and action.help != argparse.SUPPRESS]
        if name == "train":  # which reads its flags itself, as plan does
            yield "Its flags are the [settings](settings.md)."
            continue
        if not flags:
            yield from ("```text", _help_of(name), "```")
            continue
        yield from ("| flag | |", "|---|---|")
        for action in flags:
            if "--help" not in action.option_strings:
                yield f"| `{action.option_strings[-1]}`{_needed(action)} | {_cell(_help(action))} |"


def _help_of(command: str) -> str:
    from inform_rm.cli.dispatch import parse

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        arguments = parse([command, "--help"])
        arguments.run(arguments)
    return shown.getvalue().strip()


def _needed(action: argparse.Action) -> str:
    return " (required)" if action.required else ""


def _help(action: argparse.Action) -> str:
    text = (action.help or "") % {"default": action.default}
    choices = f" One of {', '.join(map(str, action.choices))}." if action.choices else ""
    return text + ("." if choices and not text.endswith(".") else "") + choices


def result_table(path: str) -> str:
    """The fields of a result as they stand in its ``result.json``, with the words of its class."""
    kind = named(path)
    texts = attribute_texts(kind)
    lines = ["| field | type | |", "|---|---|---|"]
    for each in dataclasses.fields(kind):
        if each.metadata.get("written", True):
            lines.append(f"| `{each.name}` | `{_type(each.type)}` | {_cell(texts[each.name])} |")
    return "\n".join(lines)


def named(path: str) -> Any:
    """What ``module.name`` names."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def attribute_texts(kind: type) -> dict[str, str]:
    """Name of a field -> its text under ``Attributes`` in the docstring of the class or of one that it extends."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        _, _, section = (inspect.cleandoc(base.__doc__ or "")).partition("\nAttributes:\n")
        section = re.split(r"\n\n\S", section)[0]
        for entry in re.split(r"\n(?=\S)", textwrap.dedent(section)):
            name, colon, text = entry.partition(":")
            if colon and name.isidentifier():
                found[name] = " ".join(text.split())
    return found


def _type(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    if typing_args := re.match(r"^\S+\[", str(annotation)):
        text = str(annotation) if typing_args else text
    return text.replace("typing.", "").replace("Any", "...")


def _default(value: Any) -> str:
    if value is None or value == () or value == "":
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else getattr(value, 'value', value)}`"


def _cell(text: str) -> str:
    """One cell of a Markdown table; single quotes, which mark names in help texts, become code."""
    text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return re.sub(r"(?<!\w)'([\w.:-]+)'", r"`\1`", text)
