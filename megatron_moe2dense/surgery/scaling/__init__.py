"""Scaling methods of the down projection, one file each, found by name (`scale: {method: NAME}`). numpy only."""

from megatron_moe2dense.common.registry import Registry
from megatron_moe2dense.surgery.stats import LayerStats
from megatron_moe2dense.surgery.types import Scaler

scalers: Registry[Scaler] = Registry("scale", __name__)


def mean_routing_weight(stats: LayerStats) -> float:
    """m of docs/method.md#groups-merging-scaling: the mean total routing weight of a token; 1 when the router renormalises its top-k."""
    return float(stats["gate_sum"].sum() / stats.tokens)
