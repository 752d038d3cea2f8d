"""Bridges to other people's trainers; each module names the optional extra that it needs.

Imports `eval` and what is below it.
"""
