"""Folders for the Hub: export, model cards, folding, averaged weights, reports of runs.

Imports `eval` and what is below it.
"""
