"""Scaling methods of the down projection (docs/method.md#groups-merging-scaling), found by name (`scale: {method: NAME}`). numpy only."""

from __future__ import annotations

import numpy as np

from megatron_moe2dense.common.registry import Registry
from megatron_moe2dense.surgery.stats import LayerStats
from megatron_moe2dense.surgery.types import Grouping, Scaler, Selection

scalers: Registry[Scaler] = Registry("scale", __name__)


def mean_routing_weight(stats: LayerStats) -> float:
    """m of docs/method.md#groups-merging-scaling: the mean total routing weight of a token; 1 when the router renormalises its top-k."""
    return float(stats["gate_sum"].sum() / stats.tokens)


@scalers.register("uniform")
class Uniform(Scaler):
    """alpha_g = m / G, with m the mean total routing weight of a token: 1/k in the paper for routers that renormalise, the average
    conditional probability for DeepSeek-V2-Lite."""

    def needs(self) -> tuple[str, ...]:
        """The statistics it reads."""
        return ("gate_sum",)

    def scales(self, selection: Selection, grouping: Grouping, stats: LayerStats) -> np.ndarray:  # noqa: ARG002
        """scales_G."""
        return np.full(grouping.groups, mean_routing_weight(stats) / grouping.groups)


@scalers.register("proportional")
class Proportional(Scaler):
    """alpha_g = m * (sum of scores in group g) / (sum of scores of all kept); equal shares when all kept scores are 0.

    The paper's idea, formula (ours)."""

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
