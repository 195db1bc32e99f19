"""The experts of one layer: loading them, and running all of them, or the selected ones, on tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.surgery.routing import Routing
from megatron_moe2dense.surgery.source import MoeSource

Activation = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Experts:
    """Stacked weights of E gated FFNs; `gate_up` holds gate rows, then up rows. f_e(x) = down(act(gate x) * up x)."""

    gate_up_EWD: torch.Tensor
    down_EDI: torch.Tensor
    activation: Activation

    def all_outputs(self, x_TD: torch.Tensor) -> torch.Tensor:
        """f_ETD: every expert on every token, gates not applied. One GEMM for all gate and up projections."""
        experts, width, hidden = self.gate_up_EWD.shape
        projected_TEW = (x_TD @ self.gate_up_EWD.view(experts * width, hidden).T).view(-1, experts, width)
        gate_TEI, up_TEI = projected_TEW.chunk(2, dim=-1)
        return torch.bmm((self.activation(gate_TEI) * up_TEI).transpose(0, 1), self.down_EDI.transpose(1, 2))

    def selected_outputs(self, x_TD: torch.Tensor, routing: Routing) -> torch.Tensor:
        """f_TAD: the selected experts of each token, gates not applied."""
        f_TAD = x_TD.new_empty(*routing.experts_TA.shape, x_TD.shape[1])
        for expert in routing.experts_TA.unique().tolist():
            token, place = torch.where(routing.experts_TA == expert)
            gate, up = (x_TD[token] @ self.gate_up_EWD[expert].T).chunk(2, dim=-1)
            f_TAD[token, place] = (self.activation(gate) * up) @ self.down_EDI[expert].T
        return f_TAD


def load_experts(
    source: MoeSource, reader: CheckpointReader, layer: int, activation: Activation, like: torch.Tensor
) -> tuple[torch.Tensor, Experts]:
    """Router matrix [E, D] (float32 at least) and experts of one layer, on the device and in the dtype of `like`.

    Raises:
        UserError: a tensor holds a NaN or infinite value.
    """
    dims = source.dims
    gate_up_EWD = like.new_empty(dims.experts, 2 * dims.expert_width, dims.hidden_size)
    down_EDI = like.new_empty(dims.experts, dims.hidden_size, dims.expert_width)
    for expert in range(dims.experts):
        gate, up, down = (reader.finite(name) for name in source.expert_names(layer, expert))
        gate_up_EWD[expert, : dims.expert_width] = gate
        gate_up_EWD[expert, dims.expert_width :] = up
        down_EDI[expert] = down
    router_ED = reader.finite(source.router_name(layer)).to(like.device, torch.promote_types(like.dtype, torch.float32))
    return router_ED, Experts(gate_up_EWD, down_EDI, activation)
