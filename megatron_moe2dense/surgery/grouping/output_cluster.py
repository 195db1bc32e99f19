"""Clusters of experts with similar outputs (ours; HC-SMoE in spirit)."""

from __future__ import annotations

from megatron_moe2dense.surgery.grouping import average_linkage, cosine, groupers
from megatron_moe2dense.surgery.stats import LayerStats
from megatron_moe2dense.surgery.types import FlatWeights, Grouper, Grouping, Selection


@groupers.register("output_cluster")
class OutputCluster(Grouper):
    """Average linkage on 1 - cosine of the experts' outputs on the calibration tokens (`gram`)."""

    def needs(self) -> tuple[str, ...]:
        """The statistics it reads."""
        return ("gram",)

    def group(self, selection: Selection, weights: FlatWeights, stats: LayerStats, groups: int) -> Grouping:  # noqa: ARG002
        """`groups` clusters."""
        return average_linkage(cosine(stats["gram"], selection.experts_K), groups)
