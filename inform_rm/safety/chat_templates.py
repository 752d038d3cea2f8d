"""Chat templates from strangers: refused before they are compiled, where they would run away.

A template is a small program. transformers runs it in jinja2's immutable sandbox: no attribute that begins with an
underscore, no file, no import, no call that changes what it is given, ``range`` up to 100,000. The sandbox does not
bound time or memory, and constant expressions such as ``'a' * 10**10`` are computed when the template is compiled.
`check_template` refuses the ways to ask for much in a few characters, and then renders a conversation of 64 turns in a
sandbox that measures every text and list on its way: one that grows by itself, whatever the code for it, is refused.
`check_rendered` bounds what is handed to the tokenizer. Not bounded is a template that waits for certain words in a
message before it grows a text: nothing but another process could stop it. Read the template of a model that you do not
trust, or pass one of your own (``chat_template``).
"""

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes, visitor
from jinja2.sandbox import ImmutableSandboxedEnvironment

from inform_rm.errors import InputError

# The longest published chat templates have some 20,000 characters.
_MOST_TEMPLATE_CHARACTERS = 1 << 20
# Templates count messages and indent by a few spaces.
_MOST_CONSTANT = 1_000_000
_MOST_FACTOR = 1000
# A step takes some 50 ns.
_MOST_LOOP_STEPS = 1_000_000
# Tool descriptions and a system message of the template's own, beside each message's few words.
_SPARE_CHARACTERS = 1_000_000
_SPARE_FACTOR = 20

# Of the conversation that is tried, whose messages have one letter.
_TRIED_TURNS = 64
_MOST_TRIED_SIZE = 200_000
# Of the sizes of all that a filter or method is given: `replace` could make as much.
_MOST_TRIED_PRODUCT = 50_000_000

# What the templates that read the clock (Llama 3.2, gpt-oss, SmolLM3) are told. The template of Llama 3.2 itself falls
# back to this day where there is no clock.
TEMPLATE_DATE = datetime.datetime(2024, 7, 26)
_CLOCK = "strftime_now"
_CLOCK_CALL = re.compile(_CLOCK + r"""\(\s*(?:format\s*=\s*)?(?:"([^"\\]*)"|'([^'\\]*)')\s*\)""")
_DATE_NOTE = f"{{# its date is fixed to {TEMPLATE_DATE:%Y-%m-%d} #}}"

_WIDTH = re.compile(r"[%:][^%:a-zA-Z}]{0,4}\d{6,}")  # '%1000000s', '{:>1000000}'


class _Generation(jinja2.ext.Extension):
    """Lets the ``{% generation %}`` tag of transformers be parsed."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def check_template(template: str, where: str) -> None:
    """Refuse a chat template that is no Jinja, or that asks for more in a few characters than any conversation needs.

    Refused are powers; products unless one factor is a constant of at most 1000 and the other no product (a text may
    be repeated only by such a constant); whole numbers above 1,000,000, also as a width in a format; loops over
    ``range`` within each other of more than 1,000,000 steps; a template of over a million characters; and one that
    makes a text or list of over 200,000 of a conversation of 64 turns of one letter.

    Raises:
        InputError: naming `where` and what is refused.
    """
    if not isinstance(template, str):
        raise InputError(f"{where}: the chat template is a {type(template).__name__}; expected text.")
    if len(template) > _MOST_TEMPLATE_CHARACTERS:
        raise InputError(f"{where}: the chat template has {len(template)} characters; it is no such file.")
    environment = jinja2.Environment(extensions=[_Generation, jinja2.ext.loopcontrols])
    try:
        tree = environment.parse(template)
        fault = next(_faults(tree), None)
    except (jinja2.TemplateError, RecursionError, ValueError, MemoryError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise InputError(
            f"{where}: the chat template cannot render a conversation ({reason}). Pass another chat_template."
        ) from None
    if fault is None:
        fault = _growth(template)
    if fault is not None:
        raise InputError(
            f"{where}: the chat template {fault}, which no conversation needs and which can take any time or memory. "
            "Pass another chat_template (a file, or 'plain')."
        )


def with_fixed_date(template: str, where: str) -> str:
    """The template with `TEMPLATE_DATE` in place of what the clock says, so that a text has one reward on all days.

    Each call ``strftime_now("<format>")`` becomes the date in that format, as text, for whoever renders the template;
    a comment in front of it says so. A template that does not read the clock is returned as it is.

    Raises:
        InputError: the clock is read in another way than by calls with a constant format.
    """
    if _CLOCK not in template:
        return template
    fixed = _CLOCK_CALL.sub(lambda call: json.dumps(TEMPLATE_DATE.strftime(call[1] or call[2] or "")), template)
    tree = jinja2.Environment(extensions=[_Generation, jinja2.ext.loopcontrols]).parse(fixed)
    tests = [test.node for test in tree.find_all(nodes.Test) if test.name in ("defined", "undefined", "callable")]
    if any(name.name == _CLOCK and all(name is not tested for tested in tests) for name in tree.find_all(nodes.Name)):
        raise InputError(
            f"{where}: the chat template reads the clock ({_CLOCK}) in a way that cannot be replaced by a fixed date, "
            f"so that a reward would change from day to day. Write {_CLOCK}('%d %b %Y') with a constant format, or "
            "pass another chat_template (a file, or 'plain')."
        )
    if fixed == template:
        return template  # it only asks whether there is a clock
    # Lines that begin with a tag are trimmed (trim_blocks, lstrip_blocks): nothing of that may change.
    return _DATE_NOTE + ("\n" if template[0].isspace() else "") + fixed


def has_fixed_date(template: Any) -> bool:
    """Whether `with_fixed_date` has changed this template, or one of these named ones."""
    templates = template.values() if isinstance(template, dict) else [template]
    return any(text is not None and text.startswith(_DATE_NOTE) for text in templates)


def check_rendered(text: str, conversation: list[dict[str, str]]) -> None:
    """Refuse text that is out of all proportion to the conversation that it was made from.

    Raises:
        InputError: over 20 characters for each of the conversation's, and a million more.
    """
    if len(text) <= _SPARE_CHARACTERS:
        return
    given = sum(len(message["content"]) + len(message["role"]) for message in conversation)
    if len(text) > _SPARE_CHARACTERS + _SPARE_FACTOR * given:
        raise InputError(
            f"the chat template makes {len(text)} characters of a conversation of {given}. Pass another chat_template "
            "(a file, or 'plain')."
        )


def _faults(node: nodes.Node, steps: int = 1) -> Iterator[str]:
    """What is wrong with a part of a template that is run `steps` times by the loops around it."""
    if isinstance(node, nodes.Pow):
        yield "computes a power"
    elif isinstance(node, nodes.Mul) and not (_is_factor(node.left, node.right) or _is_factor(node.right, node.left)):
        yield "multiplies what may be large"
    elif isinstance(node, nodes.Const):
        if isinstance(node.value, int) and abs(node.value) > _MOST_CONSTANT:
            yield "holds a number above a million"
        if isinstance(node.value, str) and _WIDTH.search(node.value):
            yield "formats to a width of a hundred thousand or more"
    elif isinstance(node, nodes.For):
        inner = steps * _range_steps(node.iter)
        if inner > _MOST_LOOP_STEPS:
            yield "loops over more than a million numbers, one range in another"
        for part in (node.iter, node.test, *node.else_):
            if part is not None:
                yield from _faults(part, steps)
        for part in node.body:
            yield from _faults(part, inner)
        return
    for child in node.iter_child_nodes():
        yield from _faults(child, steps)


class _Grows(Exception):
    """A text or list of the tried conversation became too large."""


class _Measured(ImmutableSandboxedEnvironment):
    """The sandbox in which chat templates run, with a limit on what each operation makes."""

    intercepted_binops = frozenset(("+", "*", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols],
            finalize=_measured_value,
        )  # fmt: skip
        self.globals |= {
            "raise_exception": _stop, "strftime_now": lambda format: format, "measured_join": self._join
        }  # fmt: skip
        self.filters["tojson"] = lambda value, **options: json.dumps(value, default=str)
        self.filters = {name: _measured(made) for name, made in self.filters.items()}

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator != "+" and not (_is_number(left) and _is_number(right)):
            _check_product([left, right])
        return _measured_value(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # as in jinja2
        subject = getattr(__obj, "__self__", None)  # the text whose method is called
        _check_product([subject, *args, *kwargs.values()])
        return _measured_value(super().call(__context, __obj, *args, **kwargs))

    def _join(self, *parts: Any) -> str:
        _measured_value(parts)
        return "".join(map(str, parts))

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Joins().visit(source), *args, **kwargs)


class _Joins(visitor.NodeTransformer):
    """``a ~ b``, which a sandbox cannot intercept, as a call of `_Measured._join`."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Call(nodes.Name("measured_join", "load"), node.nodes, [], None, None).set_lineno(node.lineno)


def _growth(template: str) -> str | None:
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant") * (_TRIED_TURNS // 2)]
    try:
        size = 0
        for part in (
            _Measured()
            .from_string(template)
            .generate(
                messages=turns, tools=None, documents=None, add_generation_prompt=True, bos_token="a", eos_token="a"
            )
        ):
            size += len(part)
            _check_tried(size)
    except _Grows:
        return f"makes a text or list of over {_MOST_TRIED_SIZE} from {_TRIED_TURNS} turns of one letter"
    except Exception:
        return None  # not for this conversation; where it is used, the error is reported
    return None


def _stop(message: str) -> None:
    raise jinja2.TemplateError(message)


def _measured(function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        _check_product([*args, *kwargs.values()])
        return _measured_value(function(*args, **kwargs))

    return call


def _measured_value(value: Any) -> Any:
    _check_tried(_size(value))
    return value


def _size(value: Any) -> int:
    """Characters and items of a text, list or dictionary, what is in it included; counted until it is too much."""
    size, left = 0, [value]
    while left and size <= _MOST_TRIED_SIZE:
        item = left.pop()
        size += len(item) if isinstance(item, str) else 1
        if isinstance(item, dict):
            left += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            left += item
    return size


def _check_tried(size: int) -> None:
    if size > _MOST_TRIED_SIZE:
        raise _Grows


def _check_product(values: list[Any]) -> None:
    """Refuse what a filter, method or ``*`` is given when its sizes, multiplied, are large; numbers count as such."""
    product = 1.0
    for value in values:
        if isinstance(value, tuple):  # widths for '%*d'
            _check_product(list(value))
        if _is_number(value) or isinstance(value, str | dict | list | tuple):
            product *= max(1, abs(value) if _is_number(value) else _size(value))
    if product > _MOST_TRIED_PRODUCT:
        raise _Grows


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _is_factor(one: nodes.Expr, other: nodes.Expr) -> bool:
    if (
        not isinstance(one, nodes.Const)
        or any(True for _ in other.find_all(nodes.Mul))
        or isinstance(other, nodes.Mul)
    ):
        return False
    if isinstance(one.value, str):  # repeated by a number that is not known
        return isinstance(other, nodes.Const) and isinstance(other.value, int) and other.value <= _MOST_FACTOR
    return isinstance(one.value, int | float) and abs(one.value) <= _MOST_FACTOR


def _range_steps(node: nodes.Node) -> int:
    """The largest constant in calls of ``range`` in an expression; 1 where there is none."""
    calls = [node] if isinstance(node, nodes.Call) else []
    steps = 1
    for call in [*calls, *node.find_all(nodes.Call)]:
        if isinstance(call.node, nodes.Name) and call.node.name == "range":
            values = [part.value for part in call.find_all(nodes.Const) if isinstance(part.value, int)]
            steps = max([steps, *(abs(value) for value in values)])
    return steps
