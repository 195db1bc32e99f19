"""Weights and checkpoints compressed by compressed-tensors, and decompressed by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from tests.helpers.quantised import Tensors, dequantised, quantised

_PACKED = "pack-quantized"
_BESIDE = ("_scale", "_zero_point", "_shape")


def scheme_of(options: dict[str, Any], form: str) -> QuantizationScheme:
    kind: dict[str, Any] = (
        {"scale_dtype": torch.uint8} if form.startswith("mx") else {"scale_dtype": torch.float8_e4m3fn} if "nvfp4" in form else {}
    )
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**options, **kind), format=CompressionFormat(form))


def observed(whole: torch.Tensor, args: QuantizationArgs) -> dict[str, torch.Tensor]:
    """Scales and zero points by the library, of the least and greatest numbers of each block."""
    rows, columns = whole.shape
    strategy = str(getattr(args.strategy, "value", args.strategy))
    height, width = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "block": tuple(args.block_structure or ()),
    }.get(strategy, (1, args.group_size))
    grid = (-(-rows // height), -(-columns // width))
    padded = torch.nn.functional.pad(whole, (0, grid[1] * width - columns, 0, grid[0] * height - rows))
    blocks = padded.view(grid[0], height, grid[1], width)
    low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    found: dict[str, torch.Tensor] = {}
    if strategy == "tensor_group":
        found["weight_global_scale"] = generate_gparam(whole.min()[None], whole.max()[None])
    scale, zero = calculate_qparams(low, high, args, found.get("weight_global_scale"))
    scale = 2.0 ** (scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    return {**found, "weight_scale": scale.reshape(-1) if strategy == "tensor" else scale, "weight_zero_point": zero}


# (form, options of the weights)
Scheme = tuple[str, dict[str, Any]]
# As llm-compressor publishes W4A16, groups of 32 inputs with zero points, and FP8, a scale a row or one for all.
INT4: Scheme = (_PACKED, {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False})
FP8_ROWS: Scheme = ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"})
FP8_TENSOR: Scheme = ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"})


def compressed(source: Path, directory: Path, kind: Scheme) -> Path:
    """A checkpoint whose linear layers the library has compressed."""
    form, options = kind
    scheme, compressor = scheme_of(options, form), BaseCompressor.get_value_from_registry(form)
    assert scheme.weights is not None
    args = scheme.weights

    def encode(name: str, weight: torch.Tensor) -> Tensors:
        found = compressor.compress({"weight": weight.float(), **observed(weight.float(), args)}, scheme)
        return {f"{name.removesuffix('weight')}{part}": tensor.contiguous() for part, tensor in found.items() if tensor is not None}

    groups = {"group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}}
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}
    return quantised(source, directory, encode, config)


def decompressed(source: Path, directory: Path, kind: Scheme) -> Path:
    """What the library makes of `compressed`."""
    form, options = kind
    scheme, compressor = scheme_of(options, form), BaseCompressor.get_value_from_registry(form)

    def weight_of(name: str, stored: Tensors) -> torch.Tensor | None:
        module = name.removesuffix("weight_packed").removesuffix("weight")
        if not name.endswith(("weight_packed", "weight")) or f"{module}weight_scale" not in stored:
            return None
        parts: dict[str, torch.Tensor | None] = {
            key.removeprefix(module): tensor for key, tensor in stored.items() if key.startswith(f"{module}weight")
        }
        return compressor.decompress(parts, scheme)["weight"]

    return dequantised(source, directory, weight_of, _BESIDE)


def as_int4(source: Path, directory: Path) -> Path:
    """`compressed` to INT4."""
    return compressed(source, directory, INT4)


def from_int4(source: Path, directory: Path) -> Path:
    """What compressed-tensors makes of `as_int4`."""
    return decompressed(source, directory, INT4)
