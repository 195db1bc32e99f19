"""FP8 as transformers reads it, bit for bit in float32, and what config.json and the tensors say together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe2dense.checkpoint.schemes.encoded import widened
from tests.checkpoint.encoded import MODULE, assert_exactly, decoded, values
from tests.helpers.quantised import fp8_blocks, of_fp8_blocks

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def codes(*shape: int, dtype: torch.dtype = E4M3) -> torch.Tensor:
    """Finite ones, subnormal ones among them."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.3).to(dtype)


def scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) / 100 + 1e-4


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("finite", [True, False])
def test_every_code_is_the_number_that_torch_makes_of_it(dtype: torch.dtype, finite: bool):
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    wanted = every.float()
    kept = torch.isfinite(wanted) | (not finite)
    found = widened(every[kept])
    assert torch.equal(torch.isnan(found), torch.isnan(wanted[kept]))
    assert torch.equal(found.nan_to_num(0.5).view(torch.int32), wanted[kept].nan_to_num(0.5).view(torch.int32))


@pytest.mark.parametrize("block", [(128, 128), (32, 64)])
def test_what_transformers_quantises_is_read_as_it_dequantises_it(block: tuple[int, int], tmp_path: Path):
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
    parts = fp8_blocks("weight", weight, block)
    found = values(tmp_path, parts, {"quant_method": "fp8", "weight_block_size": list(block)})
    assert_exactly(found, of_fp8_blocks(parts["weight"], parts["weight_scale_inv"]))


@pytest.mark.parametrize(
    ("grid", "dtype"), [((), E4M3), ((1,), E4M3), ((48, 1), E4M3), ((48,), E4M3), ((3, 2), E4M3), ((1, 2), E5M2), ((48, 64), E5M2)]
)
@pytest.mark.parametrize("end", ["weight_scale", "weight_scale_inv"])
def test_a_scale_for_all_for_a_row_and_for_a_block(grid: tuple[int, ...], dtype: torch.dtype, end: str, tmp_path: Path):
    numbers, scale = codes(48, 64, dtype=dtype), scales(*grid)
    whole = scale.reshape(-1, 1) if len(grid) == 1 else scale.reshape(grid or (1, 1))
    wanted = numbers.float() * whole.repeat_interleave(48 // whole.shape[0], 0).repeat_interleave(64 // whole.shape[1], 1)
    assert_exactly(values(tmp_path, {"weight": numbers, end: scale}, {"quant_method": "fp8"}), wanted)


@pytest.mark.parametrize("config", [{"weight_block_size": [128, 128]}, {}], ids=["told", "transformers' default"])
def test_the_last_block_is_shorter(config: dict[str, Any], tmp_path: Path):
    """DeepSeek-V3's kv_a_proj has 576 rows and 5 scales; 192 rows and 2 scales are 128 + 64, where 96 twice would divide too."""
    numbers, scale = codes(192, 200), scales(2, 2)
    wanted = numbers.float()
    for i, rows in enumerate((slice(0, 128), slice(128, 192))):
        for j, columns in enumerate((slice(0, 128), slice(128, 200))):
            wanted[rows, columns] *= scale[i, j]
    assert_exactly(values(tmp_path, {"weight": numbers, "weight_scale_inv": scale}, {"quant_method": "fp8", **config}), wanted)


@pytest.mark.parametrize("grid", [(24,), (24, 1, 1), (24, 32, 1), (24, 2, 2), (1,), ()])
def test_stacks_of_experts(grid: tuple[int, ...], tmp_path: Path):
    numbers, scale = codes(24, 32, 64), scales(*grid)
    whole = scale.reshape(*(grid or (1,)), *(1,) * (3 - max(1, len(grid)))).expand(24, -1, -1)
    wanted = numbers.float() * whole.repeat_interleave(32 // whole.shape[1], 1).repeat_interleave(64 // whole.shape[2], 2)
    assert_exactly(values(tmp_path, {"weight": numbers, "weight_scale_inv": scale}, {"quant_method": "fp8"}), wanted)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_scales_that_are_powers_of_two(dtype: torch.dtype, tmp_path: Path):
    numbers = codes(48, 64)
    scale = torch.randint(100, 130, (48, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).view(dtype)
    found = values(tmp_path, {"weight": numbers, "weight_scale_inv": scale}, {"quant_method": "fp8", "weight_block_size": [1, 32]})
    assert found.encoded[f"{MODULE}.weight"].scheme == "MXFP8"
    assert_exactly(found, of_fp8_blocks(numbers, scale))


def test_the_scale_of_activations_stands_beside_and_is_not_needed(tmp_path: Path):
    parts = {"weight": codes(48, 64), "weight_scale": scales(), "input_scale": scales()}
    found = values(tmp_path, parts, {"quant_method": "modelopt", "quant_algo": "FP8"})
    assert set(found.stored(f"{MODULE}.weight")) == {f"{MODULE}.{name}" for name in parts}
    assert torch.equal(decoded(found), parts["weight"].float() * parts["weight_scale"])


@pytest.mark.parametrize("pattern", [MODULE, "model.layers.0", "model.layers.*.mlp", "re:.*up_proj$"])
@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignore", "exclude_modules"])
def test_a_module_that_config_json_leaves_out_is_not_decoded(key: str, pattern: str, tmp_path: Path):
    parts = {"weight": codes(48, 64), "weight_scale": scales()}
    assert not values(tmp_path, parts, {"quant_method": "fp8", key: [pattern]}).encoded
    assert values(tmp_path, parts, {"quant_method": "fp8", key: ["lm_head", "model.layers.00", "re:up_proj"]}).encoded


@pytest.mark.parametrize(
    "config",
    [{"quant_method": "torchao"}, {"bits": 8}, {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"R1": {}}}}],
    ids=["unknown", "no method", "rotated"],
)
def test_a_method_without_a_reader_decodes_nothing(config: dict[str, Any], tmp_path: Path):
    assert not values(tmp_path, {"weight": codes(48, 64), "weight_scale": scales()}, config).encoded


@pytest.mark.parametrize("grid", [(5, 2), (2, 48), (96, 64), (2, 2, 2), (3,)])
def test_scales_that_do_not_fit_decode_nothing(grid: tuple[int, ...], tmp_path: Path):
    assert not values(tmp_path, {"weight": codes(48, 64), "weight_scale_inv": scales(*grid)}, {"quant_method": "fp8"}).encoded
