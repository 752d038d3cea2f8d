"""What is checked before it is read or sent: checkpoints, chat templates, YAML, uploads.

Imports `errors` and `util`.
"""
