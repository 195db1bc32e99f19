"""llama.cpp's own quantisation through the package cyllama: quantize_gguf.py SOURCE TARGET TYPE."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any


def main(source: str, target: str, kind: str) -> None:
    """Write `target`, whose matrices are of `kind` (a name of llama-quantize)."""
    llama_cpp: Any = import_module("cyllama.llama.llama_cpp")
    params = llama_cpp.LlamaModelQuantizeParams()
    params.ftype = TYPES[kind]
    llama_cpp.model_quantize(source, target, params)


# llama.h: enum llama_ftype.
TYPES = {
    "Q4_0": 2,
    "Q8_0": 7,
    "Q2_K": 10,
    "Q3_K_M": 12,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
}

if __name__ == "__main__":
    main(*sys.argv[1:])
