"""Four-bit floats against the format's definition (OCP Microscaling 1.0: e2m1 values, e8m0 exponents), in float64."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import pytest
import torch

from megatron_moe2dense.checkpoint.index import CheckpointIndex, TensorInfo
from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.checkpoint.values import Values
from megatron_moe2dense.common.errors import UserError
from tests.checkpoint.encoded import MODULE, assert_exactly, decoded, values


def value(code: int, exponent: int) -> float:
    """One code by its bits: sign, two exponent bits of bias 1, one mantissa bit; times 2^(exponent - 127)."""
    sign, e, m = (-1.0) ** (code >> 3), (code >> 1) & 3, code & 1
    magnitude = m / 2 if e == 0 else (1 + m / 2) * 2.0 ** (e - 1)
    return math.ldexp(sign * magnitude, exponent - 127)


def every_code(exponents: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [exponents, 1, 16] and scales [exponents, 1]: each exponent with all codes, in both halves of a byte."""
    low = torch.arange(16, dtype=torch.uint8)
    high = (5 * low + 3) % 16
    return (low | high << 4).expand(exponents, 1, 16).contiguous(), torch.arange(exponents, dtype=torch.uint8)[:, None]


def expected(exponents: int) -> torch.Tensor:
    rows = [[value(code, exponent) for low in range(16) for code in (low, (5 * low + 3) % 16)] for exponent in range(exponents)]
    return torch.tensor(rows, dtype=torch.float64)


def bits(found: torch.Tensor) -> list[bytes]:
    return [struct.pack(">d", x) for x in found.double().flatten().tolist()]  # the sign of zero too


LAST = 252  # 6 * 2^(252 - 127) is the last that is below 2^128; the smallest, 2^-128, is subnormal in bfloat16 and float32


@pytest.mark.parametrize("names", [("weight_blocks", "weight_scales"), ("weight_packed", "weight_scale")], ids=["GPT-OSS", "compressed"])
def test_every_code_with_every_exponent_is_exact(names: tuple[str, str], tmp_path: Path):
    blocks, scales = every_code(LAST + 1)
    of_oss = names[0] == "weight_blocks"
    found = values(tmp_path, {names[0]: blocks if of_oss else blocks[:, 0], names[1]: scales})
    wanted = expected(LAST + 1)
    numbers = decoded(found)
    assert bits(numbers.T if of_oss else numbers) == bits(wanted)
    with CheckpointReader(found.index) as reader:
        half = found.reader(reader)(f"{MODULE}.weight", None)
    assert half.dtype == torch.bfloat16
    assert bits(half.T if of_oss else half) == bits(wanted)


@pytest.mark.parametrize(
    ("exponent", "said"), [(253, "MXFP4 values beyond"), (254, "MXFP4 values beyond"), (255, "1 MXFP4 exponents of 255")]
)
def test_what_no_number_holds_is_refused(exponent: int, said: str, tmp_path: Path):
    blocks, scales = every_code(1)
    found = values(tmp_path, {"weight_packed": blocks[:, 0], "weight_scale": scales + exponent})
    with CheckpointReader(found.index) as reader, pytest.raises(UserError, match=f"up_proj.weight.*{said}"):
        found.reader(reader, finite=False)(f"{MODULE}.weight", None)


def test_stacks_of_experts_as_gpt_oss_has_them(tmp_path: Path):
    """[experts, outputs, inputs / 32, 16] on disk, [experts, inputs, outputs] in the class; an expert is read alone."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (21, 3, 96), generator=generator)
    exponents = torch.randint(100, 150, (21, 3, 3), generator=generator)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8).view(21, 3, 3, 16)
    wanted = torch.empty(21, 96, 3, dtype=torch.float64)
    for i, j, k in torch.cartesian_prod(torch.arange(21), torch.arange(3), torch.arange(96)).tolist():
        wanted[i, k, j] = value(int(codes[i, j, k]), int(exponents[i, j, k // 32]))
    found = values(tmp_path, {"weight_blocks": blocks, "weight_scales": exponents.to(torch.uint8)}, {"quant_method": "mxfp4"})
    assert_exactly(found, wanted.float())
    assert found.parameters(f"{MODULE}.weight_blocks") == 21 * 3 * 96
    assert found.parameters(f"{MODULE}.weight_scales") == 0


@pytest.mark.parametrize("shape", [(48, 64), (32, 24, 64)], ids=["a module", "a stack"])
def test_nvfp4_of_modelopt_multiplies_by_the_scale_of_the_tensor(shape: tuple[int, ...], tmp_path: Path):
    """https://github.com/NVIDIA/Model-Optimizer modelopt/torch/quantization/qtensor/nvfp4_tensor.py: code * (block scale * scale_2)"""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, shape, generator=generator)
    scale = (torch.rand(*shape[:-1], shape[-1] // 16, generator=generator) * 400).to(torch.float8_e4m3fn)
    whole = torch.rand(() if len(shape) == 2 else shape[:1], generator=generator) / 1000
    table = torch.tensor([value(code, 127) for code in range(16)], dtype=torch.float64)
    of_blocks = scale.double() * whole.double().reshape(-1, *(1,) * (len(shape) - 1))
    exact = table[codes] * of_blocks.repeat_interleave(16, -1)
    parts = {
        "weight": (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8),
        "weight_scale": scale,
        "weight_scale_2": whole,
        "input_scale": torch.ones(()),
    }
    found = values(tmp_path, parts, {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]})
    numbers = decoded(found)
    assert (numbers - exact).abs().max() <= 2**-23 * exact.abs().max()
    rounded = (scale.float() * whole.reshape(-1, *(1,) * (len(shape) - 1))).repeat_interleave(16, -1) * table[codes].float()
    assert_exactly(found, rounded)


def test_fp4_of_deepseek_v4_beside_fp8(tmp_path: Path):
    """Bytes called int8 with `scale` in E8M0, a power of two for 32 numbers, as transformers' FP8 reader takes them."""
    from tests.helpers.quantised import of_fp8_blocks

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (48, 32), generator=generator, dtype=torch.int8)
    scale = torch.randint(110, 130, (48, 2), generator=generator, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    wanted = of_fp8_blocks(codes, scale)
    found = values(tmp_path, {"weight": codes, "scale": scale}, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert found.encoded[f"{MODULE}.weight"].scheme == "MXFP4"
    assert_exactly(found, wanted)


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
