"""The rooms of the package: imports run one way, as the contracts in pyproject.toml say."""

import subprocess
import sys
from pathlib import Path

import pytest


def test_imports_run_one_way():
    pytest.importorskip("importlinter")
    settings = Path(__file__).parents[1] / "pyproject.toml"
    # In a process of its own: it turns off the loggers that are there.
    call = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(sys.argv[1], no_cache=True))"
    found = subprocess.run(
        [sys.executable, "-c", call, settings], capture_output=True, text=True, check=False, cwd=settings.parent
    )
    assert found.returncode == 0, found.stdout + found.stderr
