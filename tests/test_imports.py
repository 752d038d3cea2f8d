"""The rooms of the package: imports run one way, as the contracts in pyproject.toml say."""

from pathlib import Path

import pytest


def test_imports_run_one_way(capsys):
    lint_imports = pytest.importorskip("importlinter.cli").lint_imports
    settings = Path(__file__).parents[1] / "pyproject.toml"
    failed = lint_imports(config_filename=str(settings), no_cache=True)
    assert failed == 0, capsys.readouterr().out
