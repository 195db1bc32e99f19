"""How close the all-experts pass of `moe2dense calibrate` comes to the machine's own GEMM rate at the shapes of a Qwen3-30B-A3B layer,
both measured in turns in one run: prints `name value unit goal`. MOE2DENSE_BENCH_EXPERTS takes fewer experts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch

from megatron_moe2dense.families import Router
from megatron_moe2dense.surgery.experts import Experts, MoeWeights
from megatron_moe2dense.surgery.observe import Observer
from megatron_moe2dense.surgery.routing import RouterWeights
from megatron_moe2dense.surgery.stats import STATISTICS

GOAL = 0.7
EXPERTS = int(os.environ.get("MOE2DENSE_BENCH_EXPERTS", "128"))
HIDDEN, WIDTH, ACTIVE, TOKENS, ROUNDS = 2048, 768, 8, 256, 4


class BareGemms:
    """The matrix products of the pass and nothing else, into memory that is there."""

    def __init__(self, experts: Experts, x_TD: torch.Tensor):
        self._experts, self._x_TD = experts, x_TD
        self._projected_TW, self._h_TI = torch.empty(TOKENS, 2 * WIDTH), torch.randn(TOKENS, WIDTH)
        self._f_ETD, self._gram_EE = torch.empty(EXPERTS, TOKENS, HIDDEN), torch.empty(EXPERTS, EXPERTS)

    def run(self) -> None:
        """Gate and up, down, gram."""
        for e in range(EXPERTS):
            torch.mm(self._x_TD, self._experts.gate_up_EWD[e].T, out=self._projected_TW)
            torch.mm(self._h_TI, self._experts.down_EDI[e].T, out=self._f_ETD[e])
        f_EN = self._f_ETD.flatten(1)
        torch.mm(f_EN, f_EN.T, out=self._gram_EE)


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    """A chunk of tokens at a time: the bare products, then the whole pass with routing and all statistics."""
    torch.manual_seed(0)
    gate_up_EWD, down_EDI = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN).mul_(0.02), torch.randn(EXPERTS, HIDDEN, WIDTH).mul_(0.02)
    experts = Experts(gate_up_EWD, down_EDI, lambda gate, up: torch.nn.functional.silu(gate) * up)
    weights = MoeWeights(RouterWeights(torch.randn(EXPERTS, HIDDEN), None, None), experts, None)
    dims = SimpleNamespace(experts=EXPERTS, active=ACTIVE, hidden_size=HIDDEN, expert_width=WIDTH)
    source = SimpleNamespace(dims=dims, router=Router(score="softmax", renormalize=True))
    observer = Observer(source, tuple(STATISTICS))  # type: ignore[arg-type]
    x_TD = torch.randn(TOKENS, HIDDEN)
    bare = BareGemms(experts, x_TD)
    bare.run()
    observer.observe(x_TD, weights)
    spent = [0.0, 0.0]
    for _ in range(ROUNDS):
        spent[0] += seconds(bare.run)
        spent[1] += seconds(lambda: observer.observe(x_TD, weights))
    flops = ROUNDS * 2 * TOKENS * EXPERTS * (3 * HIDDEN * WIDTH + EXPERTS * HIDDEN)
    print(f"calibrate_all_experts {flops / spent[1] / 1e9:.1f} GFLOP/s -")
    print(f"calibrate_all_experts_over_gemm {spent[0] / spent[1]:.3f} ratio {GOAL}")


if __name__ == "__main__":
    main()
