"""Choosing neurons, refit and reconstruction beside the machine's own rates, measured in turns in one run; from these shares, on paper,
minutes a layer of Qwen3-30B-A3B on one H100 (data sheet: 67 TFLOP/s in float64 as in float32, 3.35 TB/s). Prints `name value unit goal`."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from megatron_moe2dense.compute.ranks import Ranks
from megatron_moe2dense.surgery.config import ReconstructConfig
from megatron_moe2dense.surgery.hidden import HiddenPlace, HiddenStates
from megatron_moe2dense.surgery.refit.forward import ForwardSelection
from megatron_moe2dense.surgery.refit.layer import FitReport, LayerFit
from megatron_moe2dense.surgery.refit.normal import Sums, solve
from megatron_moe2dense.surgery.refit.reconstruct import LayerText, Reconstruction
from megatron_moe2dense.surgery.types import DenseFfn

CANDIDATES, WIDTH, HIDDEN, TOKENS, WINDOW = 3072, 768, 256, 4096, 256
H100_FLOPS, H100_BYTES = 67e12, 3.35e12
# Qwen3-30B-A3B: eight experts of 768 neurons, four times as many candidates, one million tokens of calibration, 24 passes over them.
LARGE = {"candidates": 24_576, "width": 6_144, "hidden": 2_048, "tokens": 1_048_576, "epochs": 24}


def seconds(run: Callable[[], object], rounds: int = 3) -> float:
    """The best wall time."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def gemm_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a product as large as those measured."""
    left, right = torch.randn(WIDTH, TOKENS, dtype=dtype), torch.randn(TOKENS, CANDIDATES, dtype=dtype)
    return 2 * WIDTH * TOKENS * CANDIDATES / seconds(lambda: left @ right)


def stream_rate() -> float:
    """Bytes/s of adding one large tensor to another: two reads, a write."""
    one, other = torch.randn(1 << 25), torch.randn(1 << 25)
    return 3 * one.nbytes / seconds(lambda: one.add_(other))


def sums_flops(candidates: int, hidden: int, tokens: int) -> int:
    """Of the normal equations."""
    return 2 * tokens * candidates * (candidates + hidden)


def choice_bytes(candidates: int, width: int, hidden: int) -> int:
    """Of choosing one by one: the rows of the factor so far, and the residual twice, of all candidates at every choice (float64)."""
    return 8 * width * candidates * (2 * hidden + width // 2)


def pass_flops(width: int, hidden: int, tokens: int) -> int:
    """Of a pass of the reconstruction: three products forward, six backward."""
    return 18 * tokens * width * hidden


def reconstruction() -> float:
    """Seconds of one pass over the text."""
    kept = [HiddenStates((TOKENS // WINDOW, WINDOW, HIDDEN), torch.float32, 4, HiddenPlace()) for _ in range(2)]
    held_out_N = torch.zeros(TOKENS // WINDOW, dtype=torch.bool)
    text = LayerText(kept[0], kept[1], held_out_N)
    for batch in range(len(kept[0])):
        text.put(batch, torch.randn(4, WINDOW, HIDDEN), torch.randn(4, WINDOW, HIDDEN))
    text.complete()
    ffn = DenseFfn(torch.randn(WIDTH, HIDDEN) * 0.05, torch.randn(WIDTH, HIDDEN) * 0.05, torch.randn(HIDDEN, WIDTH) * 0.05)
    start = LayerFit({"down_DF": ffn.down_DF}, FitReport(0, 0.0, 0, 0, 0.0, 0.0, 0.0))
    whole = Reconstruction(lambda gate, up: torch.nn.functional.silu(gate) * up, ffn, 0, ReconstructConfig(epochs=1), Ranks())
    return seconds(lambda: whole.train(start, text, 0))


def main() -> None:
    """Shares of the machine's rates, then minutes on paper."""
    torch.manual_seed(0)
    h_TC, y_TD = torch.randn(TOKENS, CANDIDATES, dtype=torch.float64), torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    sums = Sums.zeros(CANDIDATES, HIDDEN, h_TC.device)
    double, single, stream = gemm_rate(torch.float64), gemm_rate(torch.float32), stream_rate()
    summing = sums_flops(CANDIDATES, HIDDEN, TOKENS) / seconds(lambda: sums.add(h_TC, y_TD)) / double

    def choose(block: int) -> None:
        selection = ForwardSelection(sums, WIDTH, 1e-6, 0)
        while len(selection.chosen) < WIDTH and selection.choose(min(block, WIDTH - len(selection.chosen))):
            pass

    one_by_one = seconds(lambda: choose(1), 1)
    choosing = choice_bytes(CANDIDATES, WIDTH, HIDDEN) / one_by_one / stream
    chosen = Sums(sums.gram_FF[:WIDTH, :WIDTH].contiguous(), sums.cross_FD[:WIDTH].contiguous(), sums.square, sums.tokens)
    solving = (WIDTH**3 / 3 + 2 * WIDTH**2 * HIDDEN) / seconds(lambda: solve(chosen, 1e-4)) / double
    training = pass_flops(WIDTH, HIDDEN, TOKENS) / reconstruction() / single
    print(f"neurons_sums_of_gemm {summing:.2f} ratio 0.7")
    print(f"neurons_choice_of_stream {choosing:.2f} ratio 0.3")
    print(f"neurons_blocks_of_16 {one_by_one / seconds(lambda: choose(16), 1):.1f} x -")
    print(f"refit_solve_of_gemm {solving:.2f} ratio -")
    print(f"reconstruct_of_gemm {training:.2f} ratio 0.5")
    size = {name: LARGE[name] for name in ("candidates", "hidden", "tokens")}
    print(f"h100_minutes_sums {sums_flops(**size) / (summing * H100_FLOPS) / 60:.2f} min/layer -")
    moved = choice_bytes(LARGE["candidates"], LARGE["width"], LARGE["hidden"])
    print(f"h100_minutes_choice {moved / (choosing * H100_BYTES) / 60:.2f} min/layer -")
    trained = LARGE["epochs"] * pass_flops(LARGE["width"], LARGE["hidden"], LARGE["tokens"])
    print(f"h100_minutes_reconstruct {trained / (training * H100_FLOPS) / 60:.2f} min/layer -")


if __name__ == "__main__":
    main()
