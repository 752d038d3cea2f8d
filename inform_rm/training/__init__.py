"""Training: settings, losses, selection, the trainer, checkpoints.

Imports `hub` and what is below it, but not `eval`.
"""
