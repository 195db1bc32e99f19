"""A dense FFN that runs in the place of a MoE block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import nn

from megatron_moe2dense.families.ffn import Ffn, Gating


class DenseBlock:
    """Runs where a stock decoder layer calls its MoE block, or the experts in it; `ffn` is set from plan to plan."""

    def __init__(self, gating: Gating):
        self._gating = gating
        self.ffn: Ffn | None = None

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        """[..., D] to the same shape."""
        ffn = self.ffn
        assert ffn is not None, "an FFN is set before the layer runs"
        return nn.functional.linear(neurons(self._gating, ffn, x_TD), ffn.down_DF, ffn.down_bias_D)


def neurons(gating: Gating, ffn: Ffn, x_D: torch.Tensor) -> torch.Tensor:
    """[..., D] to the input of the down projection, [..., F]."""
    linear = nn.functional.linear
    gate = None if ffn.gate_FD is None else linear(x_D, ffn.gate_FD, ffn.gate_bias_F)
    return gating(gate, linear(x_D, ffn.up_FD, ffn.up_bias_F))


def placed(ffn: Ffn, like: torch.Tensor) -> Ffn:
    """In the compute type and on its device: the rounded weights of the dense checkpoint, as a stock model would load them."""
    return mapped(ffn, lambda tensor: tensor.to(like))


def mapped(ffn: Ffn, change: Callable[[torch.Tensor], torch.Tensor]) -> Ffn:
    """Every tensor of it changed."""
    present = {item.name: getattr(ffn, item.name) for item in fields(Ffn)}
    return replace(ffn, **{name: change(tensor) for name, tensor in present.items() if tensor is not None})
