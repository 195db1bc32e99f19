"""What stock kernels and file formats want widths of FFNs to be multiples of. No torch."""

from __future__ import annotations

# The smallest multiple with which everything runs; what each wants stands in docs/serving.md. transformers' grouped products
# of experts: rows of 16 bytes, 8 neurons in bfloat16. FP8 products (torch._scaled_mm, CUTLASS): 16. Blocks of GGUF's Q8_0 and Q4_0, and of
# MXFP4: 32. Marlin wants 128 and k-quants 256; engines have other ways where there are fewer.
RUNS_EVERYWHERE = 32
GROUPED_PRODUCTS = 8  # stacks of experts are refused without it


def rounded_up(neurons: int, multiple: int) -> int:
    """The next multiple, at least `neurons`."""
    return -(-neurons // multiple) * multiple


def said_of(width: int) -> str:
    """What to know of a width that some kernels and formats do not take as it is; nothing where all do."""
    below = width // RUNS_EVERYWHERE * RUNS_EVERYWHERE
    if width == below:
        return ""
    near = f"{below} or {below + RUNS_EVERYWHERE}" if below else f"{RUNS_EVERYWHERE}"
    return f"intermediate_size {width} is no multiple of {RUNS_EVERYWHERE}, as FP8 kernels and GGUF's Q8_0 want it: {near} is"
