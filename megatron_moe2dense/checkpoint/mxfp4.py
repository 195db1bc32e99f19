"""MXFP4 (OCP Microscaling): blocks of 32 four-bit floats (e2m1) that share one eight-bit exponent (e8m0).

Stored as GPT-OSS does: two codes a byte, the low four bits first. Decoding is exact wherever the result type holds the value.
"""

from __future__ import annotations

from math import prod

import torch

from megatron_moe2dense.checkpoint.index import TensorInfo
from megatron_moe2dense.common.errors import UserError

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS, _NAN = 127, 255
STORED, _PACKED = "U8", 16  # type in a file of blocks and of scales; bytes of a block
# By code 0..15: bit 3 is the sign (code 8 is -0).
CODES = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))


def stored_values(info: TensorInfo) -> int:
    """Parameters that a tensor of a checkpoint holds: two a byte in MXFP4 blocks, none in their exponents."""
    values = prod(info.shape)
    if info.dtype == "U8":
        return 2 * values if info.name.endswith("_blocks") else 0
    return values


def require_pair(blocks: TensorInfo, scales: TensorInfo) -> None:
    """UserError unless both are bytes, of shapes that belong together: [..., rows, N, 16] and [..., rows, N]."""
    fit = len(scales.shape) > 1 and blocks.shape == (*scales.shape, _PACKED)
    if not fit or (blocks.dtype, scales.dtype) != (STORED, STORED):
        found = (f"{info.name} is {info.dtype} {list(info.shape)}" for info in (blocks, scales))
        raise UserError(
            f"{blocks.file}: {', '.join(found)}",
            f"MXFP4: blocks {STORED} [..., rows, N, {_PACKED}] and scales {STORED} [..., rows, N]",
            "download the checkpoint again",
        )


def require_numbers(scales: torch.Tensor, where: str) -> None:
    """UserError when an exponent is 255, which stands for NaN."""
    count = int((scales == _NAN).sum())
    if count:
        raise UserError(f"{where}: {count} MXFP4 exponents of 255 (NaN)", "finite weights", "download the checkpoint again")


def decode(blocks: torch.Tensor, scales: torch.Tensor, where: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Blocks [..., N, 16] and scales [..., N], both uint8, to values [..., 32 * N] in `dtype`.

    Args:
        where: file and tensor, for the message.

    Raises:
        UserError: an exponent is 255 (NaN), or a value is beyond the range of `dtype`. Meta tensors give a meta tensor.
    """
    if blocks.is_meta:
        return torch.empty(*scales.shape[:-1], 32 * scales.shape[-1], dtype=dtype, device="meta")
    require_numbers(scales, where)
    work = torch.promote_types(dtype, torch.float32)
    # 2^-127 is subnormal in float32 and still exact; products with the codes are exact as well.
    exponents = torch.arange(_BIAS + 128, dtype=torch.float64) - _BIAS
    powers = torch.pow(2.0, exponents).to(work)[scales.int()]
    codes = torch.tensor(CODES, dtype=work)
    byte = torch.arange(256)
    pairs = torch.stack((codes[byte & 15], codes[byte >> 4]), dim=-1)
    values = (pairs[blocks.int()].flatten(-2) * powers[..., None]).to(dtype).flatten(-2)
    if not torch.isfinite(values).all():
        raise UserError(f"{where}: MXFP4 values beyond {dtype}", "weights of a trained model", "download it again")
    return values
