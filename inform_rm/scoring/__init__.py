"""Rewards from any sequence-classification reward model: loading, packing, the scorer.

Imports `data`, the Hub pair and what is below them.
"""

from inform_rm.scoring.scorer import RewardScorer

__all__ = ["RewardScorer"]
