"""Round robin (ours): a balanced control that looks at the ranks alone."""

from __future__ import annotations

import numpy as np

from megatron_moe2dense.surgery.grouping import groupers
from megatron_moe2dense.surgery.stats import LayerStats
from megatron_moe2dense.surgery.types import FlatWeights, Grouper, Grouping, Selection


@groupers.register("round_robin")
class RoundRobin(Grouper):
    """The expert of rank r (best first) joins group r mod G, odd rounds in reverse (snake): groups hold like shares of the score."""

    def needs(self) -> tuple[str, ...]:
        """The statistics it reads: none."""
        return ()

    def group(self, selection: Selection, weights: FlatWeights, stats: LayerStats, groups: int) -> Grouping:  # noqa: ARG002
        """`groups` groups whose sizes differ by one at most."""
        round_K, place_K = np.divmod(np.arange(len(selection.experts_K)), groups)
        return Grouping(np.where(round_K % 2 == 0, place_K, groups - 1 - place_K), groups)
