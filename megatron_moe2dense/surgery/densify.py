"""Experts and a layer's plan to one dense FFN (docs/method.md#from-an-moe-layer-to-a-dense-ffn, docs/method.md#groups-merging-scaling):
groups stacked along the neuron axis, the factor of each group folded into its down projection and bias, shared experts behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from megatron_moe2dense.families.ffn import Ffn
from megatron_moe2dense.surgery.align import aligned
from megatron_moe2dense.surgery.merge import weighted_mean
from megatron_moe2dense.surgery.types import LayerPlan, NeuronPlan

# expert number -> its weights, in the dtype of the source
ReadExpert = Callable[[int], Ffn]


@dataclass(frozen=True)
class Units:
    """What a plan's scales of routed experts, and of shared ones, are multiplied by."""

    routed: float = 1.0
    shared: float = 1.0


PLAIN = Units()


def densify(plan: LayerPlan | NeuronPlan, read: ReadExpert, shared: Ffn | None = None, units: Units = PLAIN) -> Ffn:
    """The dense FFN of one layer, F = G * I and the neurons of the shared experts. Merging and scaling compute in float64 and round
    once to the source's dtype; the down bias is sum_g alpha_g bias_g."""
    return stacked(plan, merged(plan, read), shared, units)


def merged(plan: LayerPlan | NeuronPlan, read: ReadExpert) -> Iterator[Ffn]:
    """The mean expert of each group, or the chosen neurons of each expert, one after the other, not scaled yet: the same for plans that
    differ in their scales only."""
    if isinstance(plan, NeuronPlan):
        return _picked(plan, read)
    return (_merge(plan, group, read) for group in range(len(plan.scales)))


def stacked(plan: LayerPlan | NeuronPlan, experts: Iterable[Ffn], shared: Ffn | None = None, units: Units = PLAIN) -> Ffn:
    """The dense FFN from the slices of `merged` and the plan's scales."""
    slices = [_scaled(expert, scale * units.routed) for expert, scale in zip(experts, plan.scales, strict=True)]
    if shared is not None:
        slices.append(_scaled(shared, plan.shared_scale * units.shared))
    return side_by_side(slices)


def side_by_side(slices: Sequence[Ffn]) -> Ffn:
    """One FFN whose output is the sum of theirs."""
    biases = [ffn.down_bias_D for ffn in slices if ffn.down_bias_D is not None]
    return Ffn(
        gate_FD=_joined([ffn.gate_FD for ffn in slices]),
        up_FD=torch.cat([ffn.up_FD for ffn in slices]),
        down_DF=torch.cat([ffn.down_DF for ffn in slices], dim=1),
        gate_bias_F=_joined([ffn.gate_bias_F for ffn in slices]),
        up_bias_F=_joined([ffn.up_bias_F for ffn in slices]),
        down_bias_D=torch.stack(biases).sum(0).to(slices[0].up_FD.dtype) if biases else None,
    )


def _picked(plan: NeuronPlan, read: ReadExpert) -> Iterator[Ffn]:
    """The chosen neurons expert by expert, in the order of each expert's best; of its down bias the share of them that was chosen."""
    for expert in dict.fromkeys(plan.experts):
        ffn, chosen = read(expert), [neuron for of, neuron in zip(plan.experts, plan.neurons, strict=True) if of == expert]
        yield replace(
            ffn,
            gate_FD=None if ffn.gate_FD is None else _of_scaled_input(ffn.gate_FD[chosen], plan).to(ffn.up_FD.dtype),
            up_FD=_of_scaled_input(ffn.up_FD[chosen], plan).to(ffn.up_FD.dtype),
            down_DF=ffn.down_DF[:, chosen],
            gate_bias_F=None if ffn.gate_bias_F is None else ffn.gate_bias_F[chosen],
            up_bias_F=None if ffn.up_bias_F is None else ffn.up_bias_F[chosen],
            down_bias_D=None if ffn.down_bias_D is None else ffn.down_bias_D.double() * (len(chosen) / len(ffn.up_FD)),
        )


def _scaled(ffn: Ffn, scale: float) -> Ffn:
    """down times `scale`, rounded to the dtype of up; the down bias, which is still to be summed, stays in float64."""

    def times_scale(tensor: torch.Tensor) -> torch.Tensor:
        # In place: on meta tensors, which convert runs this on for the shapes, `*` imports torch's Python decompositions, for seconds.
        return tensor.to(torch.float64, copy=True).mul_(scale)

    bias = None if ffn.down_bias_D is None else times_scale(ffn.down_bias_D)
    return replace(ffn, down_DF=times_scale(ffn.down_DF).to(ffn.up_FD.dtype), down_bias_D=bias)


def _merge(plan: LayerPlan, group: int, read: ReadExpert) -> Ffn:
    """The mean expert of one group: gate and up rounded to the source's dtype, what is still to be scaled in float64."""
    members = [i for i, of in enumerate(plan.group_of) if of == group]
    weights = [plan.merge_weights[i] for i in members]
    experts = [read(plan.experts[i]) for i in members]
    if plan.align == "hungarian":
        experts = aligned(experts)
    dtype = experts[0].up_FD.dtype

    def mean(name: str) -> torch.Tensor | None:
        tensors = [getattr(expert, name) for expert in experts]
        if tensors[0] is None:
            return None
        total = weighted_mean(tensors, weights)
        if name in ("gate_FD", "up_FD"):
            total = _of_scaled_input(total, plan)
        return total if name.startswith("down") else total.to(dtype)

    merged: dict[str, Any] = {field.name: mean(field.name) for field in fields(Ffn)}
    return Ffn(**merged)


def _of_scaled_input(rows_FD: torch.Tensor, plan: LayerPlan | NeuronPlan) -> torch.Tensor:
    """Gate or up rows that see their input times the plan's scale, in float64 where there is one."""
    return rows_FD if plan.input_scale == 1.0 else rows_FD.double() * plan.input_scale


def _joined(biases: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [bias for bias in biases if bias is not None]
    return torch.cat(present) if present else None


def rescaled(ffn: Ffn, factor: float) -> Ffn:
    """Its output times `factor`, rounded once."""
    if factor == 1.0:
        return ffn
    scaled = _scaled(ffn, factor)
    return replace(scaled, down_bias_D=None if scaled.down_bias_D is None else scaled.down_bias_D.to(ffn.up_FD.dtype))


def neurons_of(ffn: Ffn, start: int, stop: int) -> Ffn:
    """Some of its neurons; the down bias goes with the first."""

    def part(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[start:stop]

    bias = None if ffn.down_bias_D is None else ffn.down_bias_D if start == 0 else torch.zeros_like(ffn.down_bias_D)
    parts = (part(ffn.gate_FD), ffn.up_FD[start:stop], ffn.down_DF[:, start:stop], part(ffn.gate_bias_F), part(ffn.up_bias_F))
    return Ffn(*parts, bias)


def pad_width(ffn: Ffn, width: int) -> Ffn:
    """The same function with `width` neurons: the added ones have zero weights and biases, so they add exactly nothing."""
    rows = width - len(ffn.up_FD)
    if rows == 0:
        return ffn
    below, beside = (0, 0, 0, rows), (0, rows)
    pad = torch.nn.functional.pad
    return replace(
        ffn,
        gate_FD=None if ffn.gate_FD is None else pad(ffn.gate_FD, below),
        up_FD=pad(ffn.up_FD, below),
        down_DF=pad(ffn.down_DF, beside),
        gate_bias_F=None if ffn.gate_bias_F is None else pad(ffn.gate_bias_F, beside),
        up_bias_F=None if ffn.up_bias_F is None else pad(ffn.up_bias_F, beside),
    )
