"""Responses of a policy to a set of prompts: of a local model, or of one behind an endpoint."""
