"""The experts of one MoE layer: loading them, and running them on tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.families.ffn import Gating
from megatron_moe2dense.surgery.routing import Routing
from megatron_moe2dense.surgery.source import MoeSource

# Elements of the projections that are alive at once. On the CPU 8 MiB in float32, which stay in the cache and need no new pages;
# elsewhere all experts at once, one launch each.
_BLOCK_ELEMENTS = {"cpu": 2**21}


@dataclass(frozen=True)
class Experts:
    """Stacked weights of E FFNs; `rows` holds gate rows, then up rows (up rows alone without a gate). f_e(x) = down(gating(gate x, up x)),
    each projection with its bias where the family has them."""

    rows_EWD: torch.Tensor
    down_EDI: torch.Tensor
    gating: Gating
    rows_bias_EW: torch.Tensor | None = None
    down_bias_ED: torch.Tensor | None = None

    def all_outputs(self, x_TD: torch.Tensor, out_ETD: torch.Tensor | None = None) -> torch.Tensor:
        """f_ETD: every expert on every token, gates not applied. out_ETD: memory to put it in, used again for every chunk."""
        experts, width, hidden = self.rows_EWD.shape
        f_ETD = x_TD.new_empty(experts, len(x_TD), hidden) if out_ETD is None else out_ETD
        at_once = max(1, _BLOCK_ELEMENTS.get(x_TD.device.type, 2**30) // (len(x_TD) * width))
        for start in range(0, experts, at_once):
            block = slice(start, start + at_once)
            projected_ETW = torch.matmul(x_TD, self.rows_EWD[block].transpose(1, 2))
            if self.rows_bias_EW is not None:
                projected_ETW += self.rows_bias_EW[block, None]
            torch.bmm(self._gated(projected_ETW), self.down_EDI[block].transpose(1, 2), out=f_ETD[block])
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
        """Of every neuron the sum over the tokens that selected its expert of (weight times activation)^2, [E, I], float64."""
        energy_EI = self.down_EDI.new_zeros(self.down_EDI.shape[0], self.down_EDI.shape[2], dtype=torch.float64)
        weights_TA = routing.weights_TA
        for expert in routing.experts_TA.unique().tolist():
            token, place = torch.where(routing.experts_TA == expert)
            h_TI = self._activations(expert, x_TD[token]).double()
            energy_EI[expert] = (weights_TA[token, place, None] * h_TI).square_().sum(0)
        return energy_EI

    def activations(self, x_TD: torch.Tensor, expert_C: torch.Tensor, neuron_C: torch.Tensor) -> torch.Tensor:
        """h_TC: chosen neurons of chosen experts on every token, gates not applied."""
        parts = []
        for offset in range(0, self.rows_EWD.shape[1], self.down_EDI.shape[2]):
            projected_TC = x_TD @ self.rows_EWD[expert_C, neuron_C + offset].T
            parts.append(projected_TC if self.rows_bias_EW is None else projected_TC + self.rows_bias_EW[expert_C, neuron_C + offset])
        return self.gating(parts[0] if len(parts) == 2 else None, parts[-1])

    def _activations(self, expert: int, x_TD: torch.Tensor) -> torch.Tensor:
        """h_TI: all neurons of one expert."""
        projected_TW = x_TD @ self.rows_EWD[expert].T
        if self.rows_bias_EW is not None:
            projected_TW += self.rows_bias_EW[expert]
        return self._gated(projected_TW)

    def _gated(self, projected: torch.Tensor) -> torch.Tensor:
        if projected.shape[-1] == self.down_EDI.shape[2]:
            return self.gating(None, projected)
        gate, up = projected.chunk(2, dim=-1)
        return self.gating(gate, up)


def load_experts(source: MoeSource, reader: CheckpointReader, layer: int, like: torch.Tensor) -> Experts:
    """The experts of one layer on the device and in the dtype of `like`.

    Raises:
        UserError: a tensor holds a NaN or infinite value.
    """
    dims, place, read = source.dims, source.stock.moe[layer].experts, source.reader(reader)
    parts = 2 if place.gated else 1
    channels = place.sizes(source.stock.layer_shapes[layer])[1]
    rows_EWD = like.new_empty(dims.experts, parts * dims.expert_width, channels)
    down_EDI = like.new_empty(dims.experts, channels, dims.expert_width)
    has_biases = place.down_bias is not None
    rows_bias_EW = like.new_empty(rows_EWD.shape[:2]) if has_biases else None
    down_bias_ED = like.new_empty(down_EDI.shape[:2]) if has_biases else None
    for expert in range(dims.experts):
        ffn = source.expert(read, layer, expert)
        if ffn.gate_FD is not None:
            rows_EWD[expert, : dims.expert_width] = ffn.gate_FD
        rows_EWD[expert, -dims.expert_width :] = ffn.up_FD
        down_EDI[expert] = ffn.down_DF
        if rows_bias_EW is not None and down_bias_ED is not None:
            biases = [bias for bias in (ffn.gate_bias_F, ffn.up_bias_F) if bias is not None]
            rows_bias_EW[expert] = torch.cat(biases)
            assert ffn.down_bias_D is not None, "a layout with biases has all of them"
            down_bias_ED[expert] = ffn.down_bias_D
    return Experts(rows_EWD, down_EDI, source.gating(layer), rows_bias_EW, down_bias_ED)
