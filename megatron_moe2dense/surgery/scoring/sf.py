"""Selection frequency. Name (paper), formula standard."""

from __future__ import annotations

import numpy as np

from megatron_moe2dense.surgery.scoring import scorers
from megatron_moe2dense.surgery.stats import LayerStats
from megatron_moe2dense.surgery.types import PointwiseScorer


@scorers.register("sf")
class SelectionFrequency(PointwiseScorer):
    """How often the router selects the expert: selected_count / tokens."""

    def needs(self) -> tuple[str, ...]:
        """The statistics it reads."""
        return ("selected_count",)

    def scores(self, stats: LayerStats) -> np.ndarray:
        """scores_E."""
        return stats["selected_count"] / stats.tokens
