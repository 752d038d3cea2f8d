"""From rows as people have them to token ids: columns, messages, pairs, sources, encoding.

Imports `safety` and what is below it.
"""
