"""A reward model behind HTTP: ``inform-rm serve``.

Needs the extra ``serve``; importing this package does not. Imports `scoring` and what is below it.
"""
