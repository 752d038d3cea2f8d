"""The child process in which a chat template is tried, with little time and memory. Run by its path.

It imports jinja2 and nothing of the package, which takes a tenth of a second. Standard input: the template, as JSON.
Standard output: `STARTED`, and JSON of what is wrong with the template, or ``null``.
"""

import datetime
import json
import sys
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 2  # of processor time; the longest published templates take 0.1
MEMORY = 512 << 20  # bytes of address space; Python and jinja2 take some 50 MB
TURNS, LETTERS, MOST_CHARACTERS = 64, 64, 200_000
TOO_MUCH = (
    f"makes a text, a list or a loop that takes over {SECONDS} s, {MEMORY >> 20} MiB or {MOST_CHARACTERS} characters "
    f"for {TURNS} turns of {LETTERS} letters"
)
STARTED = "started"


class Generation(jinja2.ext.Extension):
    """Lets the ``{% generation %}`` tag of transformers be parsed."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        """The nodes of the block, as if the tag were not there."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def fault_of(template: str) -> str | None:
    """What is wrong with a template, as the end of a sentence: it is no Jinja, or makes too much of 64 turns.

    A template that refuses this conversation may take others; where it is used, the error is reported.
    """
    extensions: list[Any] = [Generation, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, default=str)
    environment.globals["strftime_now"] = datetime.datetime(2024, 7, 26).strftime
    turns = [{"role": role, "content": "a" * LETTERS} for role in ("user", "assistant") * (TURNS // 2)]
    given = {"messages": turns, "tools": None, "documents": None, "bos_token": "a", "eos_token": "a"}
    compiled, size = None, 0
    try:
        compiled = environment.from_string(template)
        for part in compiled.generate(**given, add_generation_prompt=True):
            size += len(part)
            if size > MOST_CHARACTERS:
                return TOO_MUCH
    except MemoryError:
        return TOO_MUCH
    except Exception as error:
        if compiled is None:
            return f"cannot render a conversation ({type(error).__name__}: {str(error)[:200]})"
    return None


def _limit() -> None:
    try:
        import resource
    except ImportError:  # Windows: the parent's clock is the only limit
        return
    for kind, most in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(kind)
        if hard == resource.RLIM_INFINITY or hard > most:
            resource.setrlimit(kind, (most, most))


if __name__ == "__main__":
    _limit()
    print(STARTED, flush=True)
    print(json.dumps(fault_of(json.load(sys.stdin))))
