"""An exact sum of a tensor's bits."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {2: torch.int16, 4: torch.int32}
_CHUNK = 256 * 1024  # values summed at once: their 64-bit copy stays in the cache


@torch.no_grad()
def bit_sum(values: Tensor) -> int:
    """Sum of the values' bits as signed integers, modulo 2^64, as a signed integer."""
    step = _CHUNK if values.device.type == "cpu" else values.numel() or 1
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for part in values.detach().reshape(-1).view(_BITS[values.element_size()]).split(step):
        total += part.sum(dtype=torch.int64)
    return int(total)
