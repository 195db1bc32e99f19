"""The MoE block of one layer: loading router, experts and shared experts, and running them on tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.families import ClampedSwiglu
from megatron_moe2dense.surgery.packing import finite_tensors, read_ffn
from megatron_moe2dense.surgery.routing import RouterWeights, Routing
from megatron_moe2dense.surgery.source import MoeSource
from megatron_moe2dense.surgery.types import DenseFfn

# gate and up projections to the input of the down projection
Gating = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Elements of the projections that are alive at once. On the CPU 8 MiB in float32, which stay in the cache and need no new pages;
# elsewhere all experts at once, one launch each.
_BLOCK_ELEMENTS = {"cpu": 2**21}


def gating(source: MoeSource, config: PretrainedConfig) -> Gating:
    """The family's gating; act(gate) * up with the config's hidden_act unless it says otherwise."""
    if source.spec.clamped_swiglu is not None:
        return _clamped(source.spec.clamped_swiglu(source.index.config))
    activation = ACT2FN[config.hidden_act]
    return lambda gate, up: activation(gate) * up


def _clamped(swiglu: ClampedSwiglu) -> Gating:
    def apply(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate = gate.clamp(max=swiglu.limit)
        return (up.clamp(-swiglu.limit, swiglu.limit) + 1) * (gate * torch.sigmoid(gate * swiglu.alpha))

    return apply


@dataclass(frozen=True)
class Experts:
    """Stacked weights of E gated FFNs; `gate_up` holds gate rows, then up rows. f_e(x) = down(gating(gate x, up x)), each
    projection with its bias where the family has them."""

    gate_up_EWD: torch.Tensor
    down_EDI: torch.Tensor
    gating: Gating
    gate_up_bias_EW: torch.Tensor | None = None
    down_bias_ED: torch.Tensor | None = None

    def all_outputs(self, x_TD: torch.Tensor, out_ETD: torch.Tensor | None = None) -> torch.Tensor:
        """f_ETD: every expert on every token, gates not applied. out_ETD: memory to put it in, used again for every chunk."""
        experts, width, hidden = self.gate_up_EWD.shape
        f_ETD = x_TD.new_empty(experts, len(x_TD), hidden) if out_ETD is None else out_ETD
        at_once = max(1, _BLOCK_ELEMENTS.get(x_TD.device.type, 2**30) // (len(x_TD) * width))
        for start in range(0, experts, at_once):
            block = slice(start, start + at_once)
            projected_ETW = torch.matmul(x_TD, self.gate_up_EWD[block].transpose(1, 2))
            if self.gate_up_bias_EW is not None:
                projected_ETW += self.gate_up_bias_EW[block, None]
            torch.bmm(self.gating(*projected_ETW.chunk(2, dim=-1)), self.down_EDI[block].transpose(1, 2), out=f_ETD[block])
        return f_ETD if self.down_bias_ED is None else f_ETD.add_(self.down_bias_ED[:, None])

    def selected_outputs(self, x_TD: torch.Tensor, routing: Routing) -> torch.Tensor:
        """f_TAD: the selected experts of each token, gates not applied."""
        f_TAD = x_TD.new_empty(*routing.experts_TA.shape, x_TD.shape[1])
        for expert in routing.experts_TA.unique().tolist():
            token, place = torch.where(routing.experts_TA == expert)
            output = self._activations(expert, x_TD[token]) @ self.down_EDI[expert].T
            f_TAD[token, place] = output if self.down_bias_ED is None else output + self.down_bias_ED[expert]
        return f_TAD

    def gated_energies(self, x_TD: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Of every neuron the sum over the tokens that selected its expert of (gate times activation)^2, [E, I], float64."""
        energy_EI = self.down_EDI.new_zeros(self.down_EDI.shape[0], self.down_EDI.shape[2], dtype=torch.float64)
        for expert in routing.experts_TA.unique().tolist():
            token, place = torch.where(routing.experts_TA == expert)
            h_TI = self._activations(expert, x_TD[token]).double()
            energy_EI[expert] = (routing.gates_TA[token, place, None].double() * h_TI).square_().sum(0)
        return energy_EI

    def activations(self, x_TD: torch.Tensor, expert_C: torch.Tensor, neuron_C: torch.Tensor) -> torch.Tensor:
        """h_TC: chosen neurons of chosen experts on every token, gates not applied."""
        parts = []
        for offset in (0, self.down_EDI.shape[2]):
            projected_TC = x_TD @ self.gate_up_EWD[expert_C, neuron_C + offset].T
            parts.append(projected_TC if self.gate_up_bias_EW is None else projected_TC + self.gate_up_bias_EW[expert_C, neuron_C + offset])
        return self.gating(*parts)

    def _activations(self, expert: int, x_TD: torch.Tensor) -> torch.Tensor:
        """h_TI: all neurons of one expert."""
        projected_TW = x_TD @ self.gate_up_EWD[expert].T
        if self.gate_up_bias_EW is not None:
            projected_TW += self.gate_up_bias_EW[expert]
        return self.gating(*projected_TW.chunk(2, dim=-1))


@dataclass(frozen=True)
class SharedExperts:
    """The experts every token goes through, as one FFN; gate_1D: their own sigmoid gate, where the family has one."""

    ffn: DenseFfn
    gating: Gating
    gate_1D: torch.Tensor | None

    def outputs(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """s_TD without the gate, and the gate [T, 1]."""
        s_TD = self.gating(x_TD @ self.ffn.gate_FD.T, x_TD @ self.ffn.up_FD.T) @ self.ffn.down_DF.T
        return s_TD, None if self.gate_1D is None else torch.sigmoid(x_TD @ self.gate_1D.T)


@dataclass(frozen=True)
class MoeWeights:
    """One MoE block on the compute device."""

    router: RouterWeights
    experts: Experts
    shared: SharedExperts | None


def load_moe(source: MoeSource, reader: CheckpointReader, layer: int, gate: Gating, like: torch.Tensor) -> MoeWeights:
    """The MoE block of one layer on the device and in the dtype of `like`, the router in float32 at least.

    Raises:
        UserError: a tensor holds a NaN or infinite value.
    """
    dims, tensors, read = source.dims, source.tensors, finite_tensors(reader)
    gate_up_EWD = like.new_empty(dims.experts, 2 * dims.expert_width, dims.hidden_size)
    down_EDI = like.new_empty(dims.experts, dims.hidden_size, dims.expert_width)
    has_biases = tensors.experts.down_bias is not None
    gate_up_bias_EW = like.new_empty(gate_up_EWD.shape[:2]) if has_biases else None
    down_bias_ED = like.new_empty(down_EDI.shape[:2]) if has_biases else None
    for expert in range(dims.experts):
        ffn = read_ffn(read, tensors.experts, layer, expert)
        gate_up_EWD[expert, : dims.expert_width] = ffn.gate_FD
        gate_up_EWD[expert, dims.expert_width :] = ffn.up_FD
        down_EDI[expert] = ffn.down_DF
        if gate_up_bias_EW is not None and down_bias_ED is not None:
            assert ffn.gate_bias_F is not None, "a layout with biases has all of them"
            assert ffn.up_bias_F is not None, "a layout with biases has all of them"
            assert ffn.down_bias_D is not None, "a layout with biases has all of them"
            gate_up_bias_EW[expert] = torch.cat((ffn.gate_bias_F, ffn.up_bias_F))
            down_bias_ED[expert] = ffn.down_bias_D
    exact = torch.promote_types(like.dtype, torch.float32)
    names = (tensors.router, tensors.router_bias, tensors.correction)
    router = (None if name is None else reader.finite(name.format(layer=layer)).to(like.device, exact) for name in names)
    experts = Experts(gate_up_EWD, down_EDI, gate, gate_up_bias_EW, down_bias_ED)
    return MoeWeights(RouterWeights(*router), experts, _load_shared(source, reader, layer, gate, like))  # type: ignore[arg-type]


def _load_shared(source: MoeSource, reader: CheckpointReader, layer: int, gate: Gating, like: torch.Tensor) -> SharedExperts | None:
    tensors = source.tensors
    if tensors.shared is None:
        return None
    ffn = read_ffn(finite_tensors(reader), tensors.shared, layer)
    on_device = DenseFfn(ffn.gate_FD.to(like), ffn.up_FD.to(like), ffn.down_DF.to(like))
    own_gate = None if tensors.shared_gate is None else reader.finite(tensors.shared_gate.format(layer=layer)).to(like)
    return SharedExperts(on_device, gate, own_gate)
