"""Neuron alignment before merging (ours): the neurons of an expert have no order of their own, so those of the experts of a group
are matched to those of its best expert first (docs/method.md#groups-merging-scaling, `align: hungarian`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment

from megatron_moe2dense.families.ffn import Ffn


def aligned(experts: Sequence[Ffn]) -> list[Ffn]:
    """The same functions, each with its neurons in the order of those of the first expert that they match."""
    best, *others = experts
    return [best, *(reorder(other, matching(best, other)) for other in others)]


def matching(reference: Ffn, other: Ffn) -> torch.Tensor:
    """order_I: the neuron of `other` for each neuron of `reference`, one to one, with the largest total cosine."""
    similarity_II = _directions(reference) @ _directions(other).T
    _, order_I = linear_sum_assignment(similarity_II.numpy(), maximize=True)
    return torch.from_numpy(order_I)


def _directions(expert: Ffn) -> torch.Tensor:
    """[I, 3D] float32: [gate row; up row; down column] of each neuron (2D without a gate), of length 1 (0 for a dead one)."""
    gate = [] if expert.gate_FD is None else [expert.gate_FD]
    return torch.nn.functional.normalize(torch.cat([*gate, expert.up_FD, expert.down_DF.T], dim=1).float(), dim=1)


def reorder(expert: Ffn, order_I: torch.Tensor) -> Ffn:
    """The same function with neuron order_I[i] in place i."""
    return Ffn(
        gate_FD=None if expert.gate_FD is None else expert.gate_FD[order_I],
        up_FD=expert.up_FD[order_I],
        down_DF=expert.down_DF[:, order_I],
        gate_bias_F=None if expert.gate_bias_F is None else expert.gate_bias_F[order_I],
        up_bias_F=None if expert.up_bias_F is None else expert.up_bias_F[order_I],
        down_bias_D=expert.down_bias_D,
    )
