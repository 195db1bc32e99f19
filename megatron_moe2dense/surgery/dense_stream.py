"""Many dense models of one MoE in one pass, layer by layer: the stock layers of the MoE with each plan's dense FFN in the place of
the MoE block. Nothing is written. Plans with equal first layers share their hidden states as far as they are equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.common.progress import progress
from megatron_moe2dense.families.ffn import Ffn
from megatron_moe2dense.surgery.dense_block import mapped, placed
from megatron_moe2dense.surgery.densify import Units, merged, stacked
from megatron_moe2dense.surgery.hidden import HiddenPlace
from megatron_moe2dense.surgery.observe import Observer
from megatron_moe2dense.surgery.refit.store import FittedLayers
from megatron_moe2dense.surgery.source import MoeSource
from megatron_moe2dense.surgery.stream import Call, Compute, StreamedModel
from megatron_moe2dense.surgery.types import LayerPlan, NeuronPlan


@dataclass(frozen=True)
class Head:
    """Final norm and output matrix, the same in the MoE and in all dense models made of it."""

    norm: nn.Module
    weight_VD: torch.Tensor

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.weight_VD.device

    def logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        """[T, V], float32, from hidden states after the last layer."""
        return (self.norm(x_TD.to(self.weight_VD)) @ self.weight_VD.T).float()


@dataclass(frozen=True)
class DenseModel:
    """One of the dense models. layers: as in ConversionPlan.layers. fits: its down projections, where the plan has a refit."""

    layers: tuple[LayerPlan | NeuronPlan, ...]
    fits: FittedLayers | None = None


@dataclass(frozen=True)
class _DenseLayer:
    plan: LayerPlan | NeuronPlan
    fits: FittedLayers | None

    def ffn(self, slices: Sequence[Ffn], shared: Ffn | None, units: Units) -> Ffn:
        """From the slices that the plan's `merged` gives, on their device."""
        ffn = stacked(self.plan, slices, shared, units)
        return ffn if self.fits is None else self.fits[self.plan.layer].applied(ffn)


@dataclass
class _States:
    """Distinct hidden states [N, S, D] in memory, and which of them each plan is at."""

    distinct: list[torch.Tensor]
    of_plan: list[int]
    pending: list[int] = field(default_factory=list)

    def branch(self, layers: Sequence[_DenseLayer]) -> dict[_DenseLayer, dict[int, list[int]]]:
        """Layer to state to the models that are there: what has to run. Plans that differ in their scales only stand together."""
        order = sorted(range(len(layers)), key=lambda i: layers[i].plan.unscaled)
        found: dict[_DenseLayer, dict[int, list[int]]] = {}
        for model in order:
            found.setdefault(layers[model], {}).setdefault(self.of_plan[model], []).append(model)
        self.pending = [0] * len(self.distinct)
        for states in found.values():
            for state in states:
                self.pending[state] += 1
        return found

    def target(self, state: int) -> torch.Tensor:
        """Memory for what comes after the state: its own when nothing else starts from it."""
        self.pending[state] -= 1
        return self.distinct[state] if self.pending[state] == 0 else torch.empty_like(self.distinct[state])


class DenseStream(StreamedModel):
    """The dense models that plans make of a MoE checkpoint, and the MoE itself as their teacher; one layer in memory at a time."""

    def __init__(self, source: MoeSource, reader: CheckpointReader, compute: Compute):
        super().__init__(source, reader, compute)
        self._checkpoint = source

    def head(self) -> Head:
        """Final norm and output matrix, on the compute device."""
        norm, model = self._norm, self._stock.model
        path = next(name for name, module in model.named_modules() if module is norm)
        self._load(norm, self._read(f"{path}.", list(norm.state_dict())))
        head = model.get_output_embeddings() if not self._checkpoint.dims.tied_embeddings else model.get_input_embeddings()
        name = next(name for name, module in model.named_modules() if module is head)
        return Head(norm, self._disk.tensor(f"{name}.weight", self._tensor).to(self._like))

    @torch.no_grad()
    def teacher_states(self, windows_NS: np.ndarray) -> torch.Tensor:
        """The MoE's hidden states after its last layer, [N, S, D], on the CPU. Every weight of the model is read and checked."""
        states = self.run(windows_NS, Observer(self._checkpoint, ()))
        *_, last = progress(states, "teacher", "layer", len(self._layers), each=True, reached=lambda hidden: hidden.layer)
        return torch.cat(list(last))

    @torch.no_grad()
    def dense_states(self, windows_NS: np.ndarray, models: Sequence[DenseModel]) -> list[torch.Tensor]:
        """The dense models' hidden states after the last layer, [N, S, D] each, on the CPU; equal models have the same tensor."""
        hidden, calls = self._embed(windows_NS, HiddenPlace(), 0)
        states = _States([torch.cat(list(hidden))], [0] * len(models))
        del hidden
        by_layer = [{plan.layer: _DenseLayer(plan, model.fits) for plan in model.layers} for model in models]
        doing = f"{len(models)} dense model{'s' * (len(models) > 1)}"
        for number, layer in enumerate(progress(self._layers, doing, "layer", len(self._layers), each=True)):
            here = [found[number] for found in calls]
            if number not in self._checkpoint.layers:
                self._assemble_with(number, None)
                for state_NSD in states.distinct:
                    self._advance(layer, here, state_NSD, state_NSD)
            else:
                states = self._moe_layer(number, here, states, [layers[number] for layers in by_layer])
            self._release(number)
        return [states.distinct[state] for state in states.of_plan]

    def _moe_layer(self, number: int, calls: Sequence[Call], states: _States, layers: Sequence[_DenseLayer]) -> _States:
        layer = self._layers[number]
        block = self._dense_block(number)
        self._assemble_with(number, block)
        after = _States([], [-1] * len(layers))
        shared = self._shared(number)
        experts: dict[int, Ffn] = {}
        key, slices = None, []
        for dense, starts in states.branch(layers).items():
            if dense.plan.unscaled != key:
                key, slices = dense.plan.unscaled, list(merged(dense.plan, lambda expert: self._expert(number, expert, experts)))
            block.ffn = placed(dense.ffn(slices, shared, self._checkpoint.seam_units), self._like)
            for state, members in starts.items():
                x_NSD, y_NSD = states.distinct[state], states.target(state)
                self._advance(layer, calls, x_NSD, y_NSD)
                for member in members:
                    after.of_plan[member] = len(after.distinct)
                after.distinct.append(y_NSD)
        return after

    def _advance(self, layer: nn.Module, calls: Sequence[Call], x_NSD: torch.Tensor, y_NSD: torch.Tensor) -> None:
        """A layer over all windows of one state; y may be x."""
        batch = self._compute.batch
        for i, start in enumerate(range(0, len(x_NSD), batch)):
            y_NSD[start : start + batch].copy_(calls[i].run(layer, x_NSD[start : start + batch].to(self._compute.device)))

    def _expert(self, layer: int, expert: int, known: dict[int, Ffn]) -> Ffn:
        """An expert of the layer on the compute device, in the source's dtype, read once a pass."""
        if expert not in known:
            known[expert] = self._to_device(self._checkpoint.expert(self._tensor, layer, expert))
        return known[expert]

    def _shared(self, layer: int) -> Ffn | None:
        found = self._checkpoint.shared(self._tensor, layer) if self._checkpoint.seam == "block" else None
        return None if found is None else self._to_device(found)

    def _to_device(self, ffn: Ffn) -> Ffn:
        return mapped(ffn, lambda tensor: tensor.to(self._compute.device))
