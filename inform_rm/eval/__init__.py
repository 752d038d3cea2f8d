"""Evaluation of reward models. Imports `decomposition`, `scoring` and what is below them; not `training`."""
