"""Pre-selection probability. Name (paper), formula (ours)."""

from __future__ import annotations

import numpy as np

from megatron_moe2dense.surgery.scoring import scorers
from megatron_moe2dense.surgery.stats import LayerStats
from megatron_moe2dense.surgery.types import PointwiseScorer


@scorers.register("pp")
class PreSelectionProbability(PointwiseScorer):
    """The mean router probability over all tokens, selected or not: prob_sum / tokens."""

    def needs(self) -> tuple[str, ...]:
        """The statistics it reads."""
        return ("prob_sum",)

    def scores(self, stats: LayerStats) -> np.ndarray:
        """scores_E."""
        return stats["prob_sum"] / stats.tokens
