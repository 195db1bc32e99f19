"""Tokens through a MoE layer, in chunks: the block's output and the sums of docs/method.md#statistics, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from megatron_moe2dense.surgery.experts import Experts
from megatron_moe2dense.surgery.routing import Routing
from megatron_moe2dense.surgery.seam import MoeWatcher
from megatron_moe2dense.surgery.source import MoeSource
from megatron_moe2dense.surgery.stats import INPUT_GATE_STATISTICS, SHARED_GATE_STATISTICS, STATISTICS, LayerStats

# Elements of the largest temporary tensor of one chunk, where that leaves tokens enough for a GEMM. On the CPU 8 MiB in
# float32: larger ones go back to the system after every chunk, and page faults then cost more than the arithmetic.
_CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**27}
_CHUNK_TOKENS = 256


def chunk_tokens(experts: int, widest: int, device: torch.device) -> int:
    """How many tokens a chunk has, so that the outputs of all experts stay small. widest: the larger of 2*I and D."""
    return max(_CHUNK_TOKENS, _CHUNK_ELEMENTS.get(device.type, 2**27) // (experts * widest))


def runs_every_expert(names: Iterable[str]) -> bool:
    """Whether one of the statistics needs every expert on every token."""
    return any(name in STATISTICS and STATISTICS[name].every_expert for name in names)


class Observation:
    """What one chunk gives: routing, the outputs of the selected experts and, where a statistic needs it, of all.

    out_ETD: memory for the latter, which the next chunk may use again.
    """

    def __init__(self, x_TD: torch.Tensor, routing: Routing, experts: Experts, names: Iterable[str], out_ETD: torch.Tensor | None = None):
        self._names = tuple(names)
        self._x_TD, self._experts = x_TD, experts
        self._routing = routing
        self._chosen_TA = (routing.gates_TA != 0).double()  # a weight of 0 stands for a choice that is no expert
        self._selected_TE = torch.zeros_like(routing.probs_TE, dtype=torch.float64).scatter_add_(1, routing.experts_TA, self._chosen_TA)
        self._probs_TE = routing.probs_TE.double()
        self._f_ETD: torch.Tensor | None = None
        if runs_every_expert(self._names):
            self._f_ETD = experts.all_outputs(x_TD, out_ETD)
            token_T1 = torch.arange(len(x_TD), device=x_TD.device)[:, None]
            self._f_TAD = self._f_ETD[routing.experts_TA, token_T1]
        else:
            self._f_TAD = experts.selected_outputs(x_TD, routing)

    def output(self) -> torch.Tensor:
        """The sum over the selected experts of gate times output, [T, D]."""
        gates_TA1 = self._routing.gates_TA.to(self._f_TAD.dtype)[..., None]
        return (gates_TA1 * self._f_TAD).sum(1)

    def sums(self) -> dict[str, torch.Tensor]:
        """The chosen statistics of this chunk, float64."""
        return {name: _SUMS[name](self) for name in self._names}

    def scatter(self, value_TA: torch.Tensor) -> torch.Tensor:
        """Sum a value per selected expert over tokens: [T, A] to [E]."""
        zeros_TE = torch.zeros_like(self._probs_TE)
        return zeros_TE.scatter_add_(1, self._routing.experts_TA, value_TA.double()).sum(0)

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
        return self.scatter(self._routing.weights_TA)

    def norms_TA(self) -> torch.Tensor:
        """||f_e(t)||_2 of the selected experts."""
        return torch.linalg.vector_norm(self._f_TAD.to(torch.promote_types(self._f_TAD.dtype, torch.float32)), dim=-1).double()

    def gated_norm_sum(self) -> torch.Tensor:
        """g_e(t) ||f_e(t)||_2."""
        return self.scatter(self._routing.weights_TA * self.norms_TA())

    def selected_norm_sum(self) -> torch.Tensor:
        """||f_e(t)||_2 1[e in S(t)]."""
        return self.scatter(self.norms_TA() * self._chosen_TA)

    def gram(self) -> torch.Tensor:
        """<f_i(t), f_j(t)>: one GEMM over tokens and hidden size, in float32 at least (bfloat16 would round the sums)."""
        f_EN = self._every_expert().flatten(1)
        if f_EN.is_cuda and f_EN.dtype.itemsize == 2:
            return torch.mm(f_EN, f_EN.T, out_dtype=torch.float32).double()  # type: ignore[call-overload]
        f_EN = f_EN.to(torch.promote_types(f_EN.dtype, torch.float32))
        return (f_EN @ f_EN.T).double()

    def output_sum(self) -> torch.Tensor:
        """f_e(t), within the chunk in float32 at least."""
        f_ETD = self._every_expert()
        return f_ETD.sum(1, dtype=torch.promote_types(f_ETD.dtype, torch.float32)).double()

    def prob_gram(self) -> torch.Tensor:
        """p_i(t) p_j(t)."""
        return self._probs_TE.T @ self._probs_TE

    def neuron_energy(self) -> torch.Tensor:
        """g_e(t)^2 h_ei(t)^2, h what goes into the down projection."""
        return self._experts.gated_energies(self._x_TD, self._routing)

    def _every_expert(self) -> torch.Tensor:
        assert self._f_ETD is not None, "a statistic of every expert is marked so in the table"
        return self._f_ETD


_SUMS: dict[str, Callable[[Observation], torch.Tensor]] = {name: getattr(Observation, name) for name in STATISTICS}


def _shared_sums(s_TD: torch.Tensor, gate_T1: torch.Tensor) -> dict[str, torch.Tensor]:
    """||s(t)||_2^2 and h(t) ||s(t)||_2^2 of shared experts with a gate of their own."""
    squares_T = s_TD.to(torch.promote_types(s_TD.dtype, torch.float32)).square().sum(1, dtype=torch.float64)
    return {"shared_square_sum": squares_T.sum()[None], "shared_gated_square_sum": (gate_T1[:, 0].double() * squares_T).sum()[None]}


class Observer(MoeWatcher):
    """Runs experts on batches of tokens, chunk by chunk, and adds up their statistics until they are taken.

    Args:
        source: the model. names: the statistics.
    """

    def __init__(self, source: MoeSource, names: Iterable[str]):
        self._source, self._names = source, tuple(names)
        self._of_shared = [name for name in self._names if name in SHARED_GATE_STATISTICS]
        self._of_inputs = [name for name in self._names if name in INPUT_GATE_STATISTICS]
        self._sums: dict[str, torch.Tensor] = {}
        self._out_ETD: torch.Tensor | None = None

    def routed(self, layer: int, x_TD: torch.Tensor, routing: Routing, experts: Experts) -> torch.Tensor:
        """The routed experts' part of the block's output, [T, D]."""
        del layer
        chunk, names = self._chunk(x_TD), [name for name in self._names if name in STATISTICS]
        y_TD = torch.empty_like(x_TD)
        for chunk_TD, part, output_TD in zip(x_TD.split(chunk), routing.split(chunk), y_TD.split(chunk), strict=True):
            observation = Observation(chunk_TD, part, experts, names, self._memory(chunk_TD))
            self._add(observation.sums())
            output_TD.copy_(observation.output())
        return y_TD

    def shared(self, layer: int, s_TD: torch.Tensor, gate_T1: torch.Tensor) -> None:
        """Sums of a sigmoid gate, where they are asked for."""
        del layer
        if self._of_shared:
            chunk = self._chunk(s_TD)
            for part_TD, part_T1 in zip(s_TD.split(chunk), gate_T1.split(chunk), strict=True):
                self._add(_shared_sums(part_TD, part_T1))

    def gated(self, layer: int, gate_T: torch.Tensor) -> None:
        """The sum of gates of inputs, where it is asked for."""
        del layer
        if self._of_inputs:
            self._add({"input_gate_sum": gate_T.sum(dtype=torch.float64)[None]})

    def take(self) -> LayerStats:
        """The sums since the last call."""
        stats = LayerStats({name: self._sums[name].cpu().numpy() for name in self._names if name in self._sums})
        self._sums = {}
        return stats

    def _add(self, found: dict[str, torch.Tensor]) -> None:
        for name, value in found.items():
            self._sums[name] = self._sums[name].add_(value) if name in self._sums else value

    def _chunk(self, x_TD: torch.Tensor) -> int:
        dims = self._source.dims
        return chunk_tokens(dims.experts, max(2 * dims.expert_width, dims.hidden_size), x_TD.device)

    def _memory(self, chunk_TD: torch.Tensor) -> torch.Tensor | None:
        """The same memory for every chunk: asking the system for new pages each time costs more than the arithmetic on them."""
        if not runs_every_expert(self._names):
            return None
        dims, tokens = self._source.dims, len(chunk_TD)
        if self._out_ETD is None or self._out_ETD.shape[1] != tokens:
            self._out_ETD = chunk_TD.new_empty(dims.experts, tokens, chunk_TD.shape[1])
        return self._out_ETD
