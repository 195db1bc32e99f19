"""Four-bit floats (E2M1): MXFP4 with an exponent for 32 of them (OCP Microscaling 1.0), as GPT-OSS, compressed-tensors and DeepSeek-V4
write it, and NVFP4 with an FP8 scale for 16 and one scale for the tensor, as compressed-tensors and ModelOpt write it.

Two codes a byte, the low four bits first. The scale for the tensor is a divisor in compressed-tensors, a factor in ModelOpt.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_moe2dense.checkpoint.index import CheckpointIndex, TensorInfo
from megatron_moe2dense.checkpoint.schemes.encoded import Encoded, ReadPart, Scales, beside, is_exponents
from megatron_moe2dense.checkpoint.schemes.settings import Settings
from megatron_moe2dense.common.errors import UserError

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# By code 0..15: bit 3 is the sign (code 8 is -0).
CODES = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))
_BLOCKS, _SCALES = "_blocks", "_scales"
_OF_INPUTS = (".input_scale", ".input_global_scale")


def find(index: CheckpointIndex, settings: Settings) -> Iterator[tuple[str, Encoded]]:
    """Tensors of four-bit floats, by the name of the numbers. settings: nothing of them, the tensors tell."""
    del settings
    tensors = index.tensors
    _require_both(index)
    for name, info in tensors.items():
        if name.endswith(_BLOCKS) and name.removesuffix(_BLOCKS) + _SCALES in tensors:
            yield name.removesuffix(_BLOCKS), _of_gpt_oss(info, tensors[name.removesuffix(_BLOCKS) + _SCALES])
            continue
        if info.dtype not in ("U8", "I8") or len(info.shape) < 2:
            continue
        weight = name.removesuffix("_packed")
        scale = tensors.get(f"{weight}_scale") or (tensors.get(f"{name.removesuffix('weight')}scale") if name.endswith(".weight") else None)
        encoded = None if scale is None else _of_rows(index, weight, info, scale)
        if encoded is not None:
            yield weight, encoded


def _require_both(index: CheckpointIndex) -> None:
    """UserError for blocks without scales, or scales without blocks, of a tensor that does not stand there itself."""
    names = index.tensors
    for name in (name for name, info in names.items() if info.dtype == "U8"):
        for ending, other in ((_BLOCKS, _SCALES), (_SCALES, _BLOCKS)):
            stem = name.removesuffix(ending)
            if name.endswith(ending) and stem not in names and stem + other not in names:
                found = f"{index.directory}: {name} without {stem + other}"
                raise UserError(found, "blocks and scales of MXFP4", "download the checkpoint again")


def _require_pair(blocks: TensorInfo, scales: TensorInfo) -> None:
    """UserError unless both are bytes, of shapes that belong together: [..., rows, N, 16] and [..., rows, N]."""
    fit = len(scales.shape) > 1 and blocks.shape == (*scales.shape, 16)
    if not fit or blocks.dtype != "U8" or not is_exponents(scales):
        found = (f"{info.name} is {info.dtype} {list(info.shape)}" for info in (blocks, scales))
        raise UserError(
            f"{blocks.file}: {', '.join(found)}",
            "MXFP4: blocks U8 [..., rows, N, 16] and scales U8 or F8_E8M0 [..., rows, N]",
            "download the checkpoint again",
        )


def values(codes: torch.Tensor) -> torch.Tensor:
    """Bytes [..., N] to the 2 N numbers in them, float32."""
    byte, table = torch.arange(256), torch.tensor(CODES)
    pairs = torch.stack((table[byte & 15], table[byte >> 4]), dim=-1)
    return pairs[codes.view(torch.uint8).int()].flatten(-2)


def _of_gpt_oss(blocks: TensorInfo, scales: TensorInfo) -> Encoded:
    """Blocks [..., N, 16] and exponents [..., N] of matrices [outputs, inputs], which the class holds as [inputs, outputs]."""
    _require_pair(blocks, scales)
    *count, outputs, groups, packed = blocks.shape
    inputs = groups * packed * 2
    shape = (*count, outputs, inputs)
    of_blocks = Scales(scales, shape, scales.shape, (1, 2 * packed))

    def decode(read: ReadPart, rows: slice | None) -> torch.Tensor:
        cut = rows if count else None  # the first axis is that of the experts, or else of what is stored last
        found = (values(read(blocks.name, cut)).flatten(-2) * of_blocks.read(read, cut)).transpose(-1, -2)
        return found if count or rows is None else found[rows]

    return Encoded("MXFP4", (blocks.name, scales.name), (*count, inputs, outputs), decode)


def _of_rows(index: CheckpointIndex, weight: str, codes: TensorInfo, scale: TensorInfo) -> Encoded | None:
    """Bytes [..., N] with a scale for 16 or 32 numbers of a row."""
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    groups = scale.shape[-1] if scale.shape else 0
    block = shape[-1] // groups if groups and shape[-1] % groups == 0 else 0
    divisor, factor = index.tensors.get(f"{weight}_global_scale"), index.tensors.get(f"{weight}_scale_2")
    whole = divisor or factor
    is_nv = block == 16 and scale.dtype == "F8_E4M3" and whole is not None
    if scale.shape[:-1] != shape[:-1] or not (is_nv or (block == 32 and is_exponents(scale))):
        return None
    scales = Scales(scale, shape, scale.shape, (1, block))

    def decode(read: ReadPart, rows: slice | None) -> torch.Tensor:
        of_blocks = scales.stored(read, rows)
        if is_nv and whole is not None:
            by_expert = len(shape) == 3 and whole.shape[:1] == shape[:1]
            one = read(whole.name, rows if by_expert else None).float().reshape(-1, *(1,) * (len(shape) - 1))
            of_blocks = of_blocks / one if divisor is not None else of_blocks * one
        return values(read(codes.name, rows)) * scales.spread(of_blocks, rows)

    module = weight.removesuffix(".weight")
    parts = (codes.name, scale.name, *((whole.name,) if is_nv and whole is not None else ()), *beside(index, module, _OF_INPUTS))
    return Encoded("NVFP4" if is_nv else "MXFP4", parts, shape, decode)
