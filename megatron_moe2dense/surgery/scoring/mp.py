"""Marginal probability (ours; equals the soft counting of SEER-MoE)."""

from __future__ import annotations

import numpy as np

from megatron_moe2dense.surgery.scoring import scorers
from megatron_moe2dense.surgery.stats import LayerStats
from megatron_moe2dense.surgery.types import PointwiseScorer


@scorers.register("mp")
class MarginalProbability(PointwiseScorer):
    """The mean probability where selected, 0 elsewhere: selected_prob_sum / tokens."""

    def needs(self) -> tuple[str, ...]:
        """The statistics it reads."""
        return ("selected_prob_sum",)

    def scores(self, stats: LayerStats) -> np.ndarray:
        """scores_E."""
        return stats["selected_prob_sum"] / stats.tokens
