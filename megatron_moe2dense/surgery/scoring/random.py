"""Random selection (ours): the control every score has to beat."""

from __future__ import annotations

import hashlib

import numpy as np

from megatron_moe2dense.common.config import key
from megatron_moe2dense.surgery.scoring import scorers
from megatron_moe2dense.surgery.stats import LayerStats
from megatron_moe2dense.surgery.types import PointwiseScorer


@scorers.register("random")
class Random(PointwiseScorer):
    """A uniform number in (0, 1) per expert, hashed from `seed` and the expert's own statistics.

    So renumbering the experts renumbers the choice, and layers differ. The probability is rounded to four digits, far above
    the rounding noise of how the calibration set was split.
    """

    seed: int = key(0, "another seed, another choice")

    def needs(self) -> tuple[str, ...]:
        """The statistics it reads."""
        return ("selected_count", "prob_sum")

    def scores(self, stats: LayerStats) -> np.ndarray:
        """scores_E."""
        keys = (f"{self.seed}:{count:.0f}:{prob:.3e}" for count, prob in zip(stats["selected_count"], stats["prob_sum"], strict=True))
        words = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little") for text in keys]
        return (np.array(words, np.float64) + 0.5) / 2.0**48
