"""Eight-bit numbers with scales: FP8 (E4M3, E5M2), MXFP8 and INT8, a scale for all, a row, or a block.

Written by DeepSeek-V3 and transformers (`weight_scale_inv`, blocks of 128 x 128), compressed-tensors, fbgemm and ModelOpt
(`weight_scale`), DeepSeek-V4 (`scale`). All multiply the codes by their scale (DeepSeek-V3, arXiv 2412.19437, 3.3.2).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_moe2dense.checkpoint.index import CheckpointIndex, TensorInfo
from megatron_moe2dense.checkpoint.schemes.encoded import Encoded, ReadPart, Scales, Shape, beside, block_of, is_exponents, widened
from megatron_moe2dense.checkpoint.schemes.settings import Settings

_CODES = ("F8_E4M3", "F8_E5M2", "I8")
_ENDS = ("_scale_inv", "_scale")
# Of activations: computing in eight bits needs them, the weights do not.
_OF_INPUTS = (".input_scale", ".activation_scale", ".activation_scale_inv", ".input_zero_point", ".output_scale")


def find(index: CheckpointIndex, settings: Settings) -> Iterator[tuple[str, Encoded]]:
    """Tensors of eight-bit numbers with scales beside them, by name."""
    for name, info in index.tensors.items():
        if info.dtype not in _CODES or len(info.shape) < 2:
            continue
        ends = [name + end for end in _ENDS] + ([f"{name.removesuffix('weight')}scale"] if name.endswith(".weight") else [])
        scale = next((index.tensors[each] for each in ends if each in index.tensors), None)
        if scale is None or (info.dtype == "I8" and is_exponents(scale)):  # bytes of two FP4 codes
            continue
        encoded = _encoded(index, info, scale, settings)
        if encoded is not None:
            yield name, encoded


def _encoded(index: CheckpointIndex, info: TensorInfo, scale: TensorInfo, settings: Settings) -> Encoded | None:
    module = info.name.removesuffix(".weight")
    grid = _grid(scale.shape, info.shape)
    if grid is None:
        return None
    rows, columns = (
        block_of(size, count, told) for size, count, told in zip(info.shape[-2:], grid[-2:], settings.block(module), strict=True)
    )
    if rows is None or columns is None:
        return None
    scales = Scales(scale, info.shape, grid, (rows, columns))
    zero = index.tensors.get(f"{info.name}_zero_point")
    zeros = None if zero is None else Scales(zero, info.shape, grid, (rows, columns))

    def decode(read: ReadPart, rows: slice | None) -> torch.Tensor:
        numbers = widened(read(info.name, rows))
        return scales.times(numbers if zeros is None else numbers - zeros.read(read, rows), read, rows)

    kind = "INT8" if info.dtype == "I8" else "MXFP8" if is_exponents(scale) and rows == 1 else "FP8"
    parts = (info.name, scale.name, *(() if zero is None else (zero.name,)), *beside(index, module, _OF_INPUTS))
    return Encoded(kind, parts, info.shape, decode, scales if info.dtype == "F8_E4M3" and zeros is None else None)


def _grid(scale: Shape, shape: Shape) -> Shape | None:
    """The scales' shape with as many axes as the numbers have; None where they can not belong together."""
    if scale in ((), (1,)):
        return (1,) * len(shape)
    if len(scale) == 1 and scale[0] == shape[0]:
        return (scale[0], *(1,) * (len(shape) - 1))
    same = len(scale) == len(shape) and scale[:-2] == shape[:-2]
    return scale if same and all(part <= whole for part, whole in zip(scale, shape, strict=True)) else None
