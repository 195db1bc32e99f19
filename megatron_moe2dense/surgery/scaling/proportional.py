"""Proportional scaling: the paper's idea, formula (ours)."""

from __future__ import annotations

import numpy as np

from megatron_moe2dense.surgery.scaling import mean_routing_weight, scalers
from megatron_moe2dense.surgery.stats import LayerStats
from megatron_moe2dense.surgery.types import Grouping, Scaler, Selection


@scalers.register("proportional")
class Proportional(Scaler):
    """alpha_g = m * (sum of scores in group g) / (sum of scores of all kept); equal shares when all kept scores are 0."""

    def needs(self) -> tuple[str, ...]:
        """The statistics it reads."""
        return ("gate_sum",)

    def scales(self, selection: Selection, grouping: Grouping, stats: LayerStats) -> np.ndarray:
        """scales_G."""
        kept_K = selection.scores_E[selection.experts_K]
        share_G = np.bincount(grouping.group_of_K, weights=kept_K, minlength=grouping.groups)
        if share_G.sum() == 0:
            share_G = np.ones(grouping.groups)
        return mean_routing_weight(stats) * share_G / share_G.sum()
