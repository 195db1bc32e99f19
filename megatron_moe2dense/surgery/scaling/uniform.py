"""Uniform scaling: 1/k in the paper for renormalising routers, the average conditional probability for DeepSeek-V2-Lite."""

from __future__ import annotations

import numpy as np

from megatron_moe2dense.surgery.scaling import mean_routing_weight, scalers
from megatron_moe2dense.surgery.stats import LayerStats
from megatron_moe2dense.surgery.types import Grouping, Scaler, Selection


@scalers.register("uniform")
class Uniform(Scaler):
    """alpha_g = m / G, with m the mean total routing weight of a token."""

    def needs(self) -> tuple[str, ...]:
        """The statistics it reads."""
        return ("gate_sum",)

    def scales(self, selection: Selection, grouping: Grouping, stats: LayerStats) -> np.ndarray:  # noqa: ARG002
        """scales_G."""
        return np.full(grouping.groups, mean_routing_weight(stats) / grouping.groups)
