"""One chunk of tokens through a MoE layer: the block's output and the sums of method.md section 1, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from megatron_moe2dense.surgery.experts import MoeWeights
from megatron_moe2dense.surgery.routing import Routing
from megatron_moe2dense.surgery.stats import SHARED_GATE_STATISTICS, STATISTICS

# Elements of the largest temporary tensor of one chunk, where that leaves tokens enough for a GEMM. On the CPU 8 MiB in
# float32: larger ones go back to the system after every chunk, and page faults then cost more than the arithmetic.
_CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**27}
_CHUNK_TOKENS = 256


def chunk_tokens(experts: int, widest: int, device: torch.device) -> int:
    """How many tokens a chunk has, so that the outputs of all experts stay small. widest: the larger of 2*I and D."""
    return max(_CHUNK_TOKENS, _CHUNK_ELEMENTS.get(device.type, 2**27) // (experts * widest))


class Observation:
    """What one chunk gives: routing, the outputs of the selected experts and, where a statistic needs it, of all."""

    def __init__(self, x_TD: torch.Tensor, routing: Routing, weights: MoeWeights, names: Iterable[str]):
        self._names = tuple(names)
        experts = weights.experts
        self._s_TD, self._shared_gate_T1 = (None, None) if weights.shared is None else weights.shared.outputs(x_TD)
        self._routing = routing
        self._selected_TE = torch.zeros_like(routing.probs_TE, dtype=torch.float64).scatter_(1, routing.experts_TA, 1.0)
        self._probs_TE = routing.probs_TE.double()
        self._f_ETD: torch.Tensor | None = None
        if any(name in STATISTICS and STATISTICS[name].every_expert for name in self._names):
            self._f_ETD = experts.all_outputs(x_TD)
            token_T1 = torch.arange(len(x_TD), device=x_TD.device)[:, None]
            self._f_TAD = self._f_ETD[routing.experts_TA, token_T1]
        else:
            self._f_TAD = experts.selected_outputs(x_TD, routing)

    def output(self) -> torch.Tensor:
        """y_TD = sum over the selected experts of gate times output, and the shared experts: what the stock block returns."""
        gates_TA1 = self._routing.gates_TA.to(self._f_TAD.dtype)[..., None]
        y_TD = (gates_TA1 * self._f_TAD).sum(1)
        if self._s_TD is None:
            return y_TD
        return y_TD + (self._s_TD if self._shared_gate_T1 is None else self._shared_gate_T1 * self._s_TD)

    def sums(self) -> dict[str, torch.Tensor]:
        """The chosen statistics of this chunk, float64."""
        return {name: _SUMS[name](self) for name in self._names}

    def scatter(self, value_TA: torch.Tensor) -> torch.Tensor:
        """Sum a value per selected expert over tokens: [T, A] to [E]."""
        zeros_TE = torch.zeros_like(self._probs_TE)
        return zeros_TE.scatter_(1, self._routing.experts_TA, value_TA.double()).sum(0)

    def tokens(self) -> torch.Tensor:
        """1 per token."""
        return torch.tensor([float(len(self._probs_TE))], dtype=torch.float64)

    def selected_count(self) -> torch.Tensor:
        """1[e in S(t)]."""
        return self._selected_TE.sum(0)

    def prob_sum(self) -> torch.Tensor:
        """p_e(t)."""
        return self._probs_TE.sum(0)

    def selected_prob_sum(self) -> torch.Tensor:
        """p_e(t) 1[e in S(t)]."""
        return (self._probs_TE * self._selected_TE).sum(0)

    def gate_sum(self) -> torch.Tensor:
        """g_e(t)."""
        return self.scatter(self._routing.gates_TA)

    def norms_TA(self) -> torch.Tensor:
        """||f_e(t)||_2 of the selected experts."""
        return torch.linalg.vector_norm(self._f_TAD.to(torch.promote_types(self._f_TAD.dtype, torch.float32)), dim=-1).double()

    def gated_norm_sum(self) -> torch.Tensor:
        """g_e(t) ||f_e(t)||_2."""
        return self.scatter(self._routing.gates_TA.double() * self.norms_TA())

    def selected_norm_sum(self) -> torch.Tensor:
        """||f_e(t)||_2 1[e in S(t)]."""
        return self.scatter(self.norms_TA())

    def gram(self) -> torch.Tensor:
        """<f_i(t), f_j(t)>: one GEMM over tokens and hidden size, in float32 at least (bfloat16 would round the sums)."""
        f_EN = self._every_expert().flatten(1)
        f_EN = f_EN.to(torch.promote_types(f_EN.dtype, torch.float32))
        return (f_EN @ f_EN.T).double()

    def output_sum(self) -> torch.Tensor:
        """f_e(t)."""
        return self._every_expert().sum(1, dtype=torch.float64)

    def prob_gram(self) -> torch.Tensor:
        """p_i(t) p_j(t)."""
        return self._probs_TE.T @ self._probs_TE

    def shared_square_sum(self) -> torch.Tensor:
        """||s(t)||_2^2."""
        return self._shared_squares_T().sum()[None]

    def shared_gated_square_sum(self) -> torch.Tensor:
        """h(t) ||s(t)||_2^2."""
        assert self._shared_gate_T1 is not None, "collected where the shared experts have a gate"
        return (self._shared_gate_T1[:, 0].double() * self._shared_squares_T()).sum()[None]

    def _shared_squares_T(self) -> torch.Tensor:
        assert self._s_TD is not None, "collected where there are shared experts"
        return self._s_TD.to(torch.promote_types(self._s_TD.dtype, torch.float32)).square().sum(1, dtype=torch.float64)

    def _every_expert(self) -> torch.Tensor:
        assert self._f_ETD is not None, "a statistic of every expert is marked so in the table"
        return self._f_ETD


_SUMS: dict[str, Callable[[Observation], torch.Tensor]] = {
    name: getattr(Observation, name) for name in (*STATISTICS, *SHARED_GATE_STATISTICS)
}
