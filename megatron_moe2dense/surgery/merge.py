"""Merging the experts of one group into one (paper): a score-weighted mean in float64 that is rounded once, by the caller."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def weighted_mean(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """sum_e w_e tensor_e in float64. A group of one is returned as it is, in its own dtype: it is copied bit for bit."""
    if len(tensors) == 1:
        return tensors[0]
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor.double(), alpha=weight)
    return total
