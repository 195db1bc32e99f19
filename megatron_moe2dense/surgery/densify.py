"""Experts and a layer's plan to one dense FFN (method.md sections 0, 4, 5): groups stacked along the neuron axis, the factor of
each group folded into its down projection."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_moe2dense.surgery.merge import weighted_mean
from megatron_moe2dense.surgery.types import DenseFfn, LayerPlan

# expert number -> its gate [I, D], up [I, D] and down [D, I], in the dtype of the source
ReadExpert = Callable[[int], tuple[torch.Tensor, ...]]


def densify(plan: LayerPlan, read: ReadExpert) -> DenseFfn:
    """The dense FFN of one layer, F = G * I. Merging and scaling compute in float64 and round once to the source's dtype."""
    gates, ups, downs = [], [], []
    for group, scale in enumerate(plan.scales):
        members = [i for i, of in enumerate(plan.group_of) if of == group]
        weights = [plan.merge_weights[i] for i in members]
        gate, up, down = zip(*(read(plan.experts[i]) for i in members), strict=True)
        gates.append(weighted_mean(gate, weights).to(gate[0].dtype))
        ups.append(weighted_mean(up, weights).to(up[0].dtype))
        downs.append((weighted_mean(down, weights).double() * scale).to(down[0].dtype))
    return DenseFfn(torch.cat(gates), torch.cat(ups), torch.cat(downs, dim=1))


def pad_width(ffn: DenseFfn, width: int) -> DenseFfn:
    """The same function with `width` neurons: the added ones have zero weights, so they add exactly nothing."""
    rows = width - len(ffn.gate_FD)
    if rows == 0:
        return ffn
    below, beside = (0, 0, 0, rows), (0, rows)
    pad = torch.nn.functional.pad
    return DenseFfn(pad(ffn.gate_FD, below), pad(ffn.up_FD, below), pad(ffn.down_DF, beside))
