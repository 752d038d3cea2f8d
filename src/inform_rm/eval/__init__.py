"""Evaluation of reward models: accuracy on preference pairs, and reports."""
