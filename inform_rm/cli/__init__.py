"""The command line, ``inform-rm``: parses, calls the function of the same name, turns errors into exit codes."""

from inform_rm.cli.dispatch import main

__all__ = ["main"]
