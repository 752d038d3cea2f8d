"""What of a gap comes from the responses alone (arXiv:2504.06020): gap grid, prompt-free gap, likelihoods.

Imports `scoring` and what is below it.
"""

from inform_rm.decomposition.prompt_free_gap import prompt_free_gap

__all__ = ["prompt_free_gap"]
