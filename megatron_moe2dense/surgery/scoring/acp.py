"""Activation-weighted conditional probability (paper)."""

from __future__ import annotations

import numpy as np

from megatron_moe2dense.surgery.scoring import scorers
from megatron_moe2dense.surgery.scoring.cp import ConditionalProbability
from megatron_moe2dense.surgery.stats import LayerStats
from megatron_moe2dense.surgery.types import PointwiseScorer


@scorers.register("acp")
class ActivationWeightedConditionalProbability(PointwiseScorer):
    """cp_e times the root mean square output norm of the expert over all tokens: cp_e * sqrt(gram_ee / tokens)."""

    def needs(self) -> tuple[str, ...]:
        """The statistics it reads."""
        return (*ConditionalProbability().needs(), "gram")

    def scores(self, stats: LayerStats) -> np.ndarray:
        """scores_E."""
        return ConditionalProbability().scores(stats) * np.sqrt(np.diag(stats["gram"]) / stats.tokens)
