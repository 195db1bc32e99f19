"""MXFP4 decoding against the format's definition (OCP Microscaling 1.0: e2m1 values, e8m0 exponents), in float64."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import pytest
import torch

from megatron_moe2dense.checkpoint.index import CheckpointIndex, TensorInfo
from megatron_moe2dense.checkpoint.mxfp4 import decode, stored_values
from megatron_moe2dense.checkpoint.values import Values
from megatron_moe2dense.common.errors import UserError


def value(code: int, exponent: int) -> float:
    """One code by its bits: sign, two exponent bits of bias 1, one mantissa bit; times 2^(exponent - 127)."""
    sign, e, m = (-1.0) ** (code >> 3), (code >> 1) & 3, code & 1
    magnitude = m / 2 if e == 0 else (1 + m / 2) * 2.0 ** (e - 1)
    return math.ldexp(sign * magnitude, exponent - 127)


def every_code() -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [255, 1, 16] and scales [255, 1]: each exponent below NaN with all codes, in both halves of a byte."""
    low = torch.arange(16, dtype=torch.uint8)
    high = (5 * low + 3) % 16
    return (low | high << 4).expand(255, 1, 16).contiguous(), torch.arange(255, dtype=torch.uint8)[:, None]


def expected() -> list[list[float]]:
    return [[value(code, exponent) for low in range(16) for code in (low, (5 * low + 3) % 16)] for exponent in range(255)]


def bits(x: float) -> bytes:
    return struct.pack(">d", x)


def test_every_code_with_every_exponent_is_exact_in_float64():
    found = decode(*every_code(), "here", torch.float64)
    assert found.shape == (255, 32)
    for row, wanted in zip(found.tolist(), expected(), strict=True):
        assert [bits(x) for x in row] == [bits(x) for x in wanted]  # the sign of zero too


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_narrower_types_hold_every_value_in_their_range_exactly(dtype: torch.dtype):
    blocks, scales = every_code()
    wanted = torch.tensor(expected(), dtype=torch.float64)
    fits = 252  # 6 * 2^(252 - 127) is the last that is below 2^128; the smallest, 2^-128, is subnormal in both
    found = decode(blocks[: fits + 1], scales[: fits + 1], "here", dtype)
    assert found.dtype == dtype
    assert [bits(x) for x in found.double().flatten().tolist()] == [bits(x) for x in wanted[: fits + 1].flatten().tolist()]
    for exponent in (253, 254):
        with pytest.raises(UserError, match="MXFP4 values beyond"):
            decode(blocks[exponent : exponent + 1], scales[exponent : exponent + 1], "here", dtype)


def test_blocks_follow_each_other_and_leading_axes_stay():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (2, 3, 96), generator=generator)
    exponents = torch.randint(100, 150, (2, 3, 3), generator=generator)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8).view(2, 3, 3, 16)
    found = decode(blocks, exponents.to(torch.uint8), "here", torch.float64)
    for i, j, k in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(96)).tolist():
        assert found[i, j, k].item() == value(int(codes[i, j, k]), int(exponents[i, j, k // 32]))
    assert decode(blocks.to("meta"), exponents.to(torch.uint8).to("meta"), "here").shape == found.shape


def test_the_exponent_of_nan_is_refused():
    blocks, scales = every_code()
    scales = scales.clone()
    scales[7] = 255
    with pytest.raises(UserError, match=r"file\.safetensors: experts: 1 MXFP4 exponents of 255"):
        decode(blocks, scales, "file.safetensors: experts")


def test_parameters_are_counted_as_values():
    def info(name: str, dtype: str) -> TensorInfo:
        return TensorInfo(name, Path("x"), dtype, (4, 3, 16), 0, 192)

    assert stored_values(info("down_proj_blocks", "U8")) == 4 * 3 * 32
    assert stored_values(info("down_proj_scales", "U8")) == 0
    assert stored_values(info("down_proj", "BF16")) == 4 * 3 * 16


Header = tuple[str, tuple[int, ...]]
PAIR: dict[str, Header] = {"down_blocks": ("U8", (2, 6, 3, 16)), "down_scales": ("U8", (2, 6, 3))}


def values_of(headers: dict[str, Header]) -> Values:
    infos = {name: TensorInfo(name, Path("x"), dtype, shape, 0, 0) for name, (dtype, shape) in headers.items()}
    return Values(CheckpointIndex(Path("moe"), {}, infos))


def test_blocks_and_scales_are_one_tensor():
    assert values_of({**PAIR, "up": ("BF16", (4, 4))}).shapes == {"up": (4, 4), "down": (2, 96, 6)}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"down_blocks": None}, "down_scales without down_blocks"),
        ({"down_scales": None}, "down_blocks without down_scales"),
        ({"down_blocks": ("I32", (2, 6, 3, 16))}, r"down_blocks is I32"),
        ({"down_scales": ("F8_E4M3", (2, 6, 3))}, r"down_scales is F8_E4M3"),
        ({"down_scales": ("U8", (2, 3, 6))}, r"down_scales is U8 \[2, 3, 6\]"),
        ({"down_blocks": ("U8", (16,))}, r"down_blocks is U8 \[16\]"),
        ({"down_blocks": ("U8", (3, 16)), "down_scales": ("U8", (3,))}, r"down_scales is U8 \[3\]"),
        ({"down": ("BF16", (2, 96, 6))}, "down and down_blocks"),
    ],
)
def test_blocks_and_scales_that_are_no_pair_are_refused_by_name(changed: dict[str, Header | None], said: str):
    with pytest.raises(UserError, match=said):
        values_of({name: header for name, header in {**PAIR, **changed}.items() if header is not None})
