"""Scoring methods, one file each, found by name (`score: {method: NAME}`). numpy only."""

import numpy as np

from megatron_moe2dense.common.registry import Registry
from megatron_moe2dense.surgery.stats import LayerStats
from megatron_moe2dense.surgery.types import Scorer

scorers: Registry[Scorer] = Registry("score", __name__)
METHODS = ("sf", "pp", "mp", "cp", "reap", "acp", "do_acp")  # the seven of docs/method.md#scores-and-selection


def ratio_where_selected(sum_E: np.ndarray, stats: LayerStats) -> np.ndarray:
    """sum_E / selected_count: the mean over the tokens that selected the expert, 0 for one that was never selected."""
    count_E = stats["selected_count"]
    return np.divide(sum_E, count_E, out=np.zeros_like(count_E), where=count_E > 0)
