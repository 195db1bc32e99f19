"""A dense FFN that runs in the place of a MoE block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import nn

from megatron_moe2dense.surgery.experts import Gating
from megatron_moe2dense.surgery.types import DenseFfn


class DenseBlock(nn.Module):
    """Stands where the stock decoder layer calls its MoE block; `ffn` is set from plan to plan."""

    def __init__(self, gating: Gating, returns_scores: bool):
        super().__init__()
        self._gating, self._returns_scores = gating, returns_scores
        self.ffn: DenseFfn | None = None

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, None]:
        """[..., D] to the same shape."""
        ffn = self.ffn
        assert ffn is not None, "an FFN is set before the layer runs"
        y_BSD = nn.functional.linear(neurons(self._gating, ffn, x_BSD), ffn.down_DF, ffn.down_bias_D)
        return (y_BSD, None) if self._returns_scores else y_BSD


def neurons(gating: Gating, ffn: DenseFfn, x_D: torch.Tensor) -> torch.Tensor:
    """[..., D] to the input of the down projection, [..., F]."""
    linear = nn.functional.linear
    return gating(linear(x_D, ffn.gate_FD, ffn.gate_bias_F), linear(x_D, ffn.up_FD, ffn.up_bias_F))


def placed(ffn: DenseFfn, like: torch.Tensor) -> DenseFfn:
    """In the compute type and on its device: the rounded weights of the dense checkpoint, as a stock model would load them."""
    return mapped(ffn, lambda tensor: tensor.to(like))


def mapped(ffn: DenseFfn, change: Callable[[torch.Tensor], torch.Tensor]) -> DenseFfn:
    """Every tensor of it changed."""
    present = {item.name: getattr(ffn, item.name) for item in fields(DenseFfn)}
    return replace(ffn, **{name: change(tensor) for name, tensor in present.items() if tensor is not None})
