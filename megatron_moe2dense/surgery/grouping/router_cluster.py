"""Clusters of experts that the router likes on the same tokens (ours; M-SMoE in spirit)."""

from __future__ import annotations

from megatron_moe2dense.surgery.grouping import average_linkage, cosine, groupers
from megatron_moe2dense.surgery.stats import LayerStats
from megatron_moe2dense.surgery.types import FlatWeights, Grouper, Grouping, Selection


@groupers.register("router_cluster")
class RouterCluster(Grouper):
    """Average linkage on 1 - cosine of the experts' router probabilities over the calibration tokens (`prob_gram`)."""

    def needs(self) -> tuple[str, ...]:
        """The statistics it reads."""
        return ("prob_gram",)

    def group(self, selection: Selection, weights: FlatWeights, stats: LayerStats, groups: int) -> Grouping:  # noqa: ARG002
        """`groups` clusters."""
        return average_linkage(cosine(stats["prob_gram"], selection.experts_K), groups)
