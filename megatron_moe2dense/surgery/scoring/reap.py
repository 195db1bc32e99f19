"""Router-weighted activation: formula of arXiv 2510.13999; (ours) as one of the seven."""

from __future__ import annotations

import numpy as np

from megatron_moe2dense.surgery.scoring import ratio_where_selected, scorers
from megatron_moe2dense.surgery.stats import LayerStats
from megatron_moe2dense.surgery.types import PointwiseScorer


@scorers.register("reap")
class RouterWeightedActivation(PointwiseScorer):
    """The mean of gate times output norm given selection: gated_norm_sum / selected_count, 0 if never selected."""

    def needs(self) -> tuple[str, ...]:
        """The statistics it reads."""
        return ("gated_norm_sum", "selected_count")

    def scores(self, stats: LayerStats) -> np.ndarray:
        """scores_E."""
        return ratio_where_selected(stats["gated_norm_sum"], stats)
