"""Groups around the best experts (ours)."""

from __future__ import annotations

import numpy as np

from megatron_moe2dense.surgery.grouping import cosine, groupers
from megatron_moe2dense.surgery.stats import LayerStats
from megatron_moe2dense.surgery.types import FlatWeights, Grouper, Grouping, Selection


@groupers.register("anchor")
class Anchor(Grouper):
    """The G best experts are anchors; each other expert joins the anchor whose outputs (`gram`) have the highest cosine
    with its own. Ties go to the better anchor."""

    def needs(self) -> tuple[str, ...]:
        """The statistics it reads."""
        return ("gram",)

    def group(self, selection: Selection, weights: FlatWeights, stats: LayerStats, groups: int) -> Grouping:  # noqa: ARG002
        """`groups` groups, each with one anchor."""
        cosine_KK = cosine(stats["gram"], selection.experts_K)
        return Grouping(np.concatenate([np.arange(groups), cosine_KK[groups:, :groups].argmax(axis=1)]), groups)
