"""Fixtures for hostile inputs: what reads them, with little memory and time."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def read_all():
    """Function from ``[(name, operation, arguments)]`` to the reports of `reader.py`."""
    spec = importlib.util.spec_from_file_location("reader", Path(__file__).with_name("reader.py"))
    reader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reader)

    def read(cases):
        return {name: reader.run_forked(operation, map(str, arguments)) for name, operation, arguments in cases}

    return read
