"""Conditional probability (paper, Eq 3)."""

from __future__ import annotations

import numpy as np

from megatron_moe2dense.surgery.scoring import ratio_where_selected, scorers
from megatron_moe2dense.surgery.stats import LayerStats
from megatron_moe2dense.surgery.types import PointwiseScorer


@scorers.register("cp")
class ConditionalProbability(PointwiseScorer):
    """The mean router probability given selection: selected_prob_sum / selected_count, 0 if never selected.

    The probability is the softmax over all E experts, not renormalised over the selected ones.
    """

    def needs(self) -> tuple[str, ...]:
        """The statistics it reads."""
        return ("selected_prob_sum", "selected_count")

    def scores(self, stats: LayerStats) -> np.ndarray:
        """scores_E."""
        return ratio_where_selected(stats["selected_prob_sum"], stats)
