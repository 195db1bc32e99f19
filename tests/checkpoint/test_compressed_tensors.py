"""What compressed-tensors compresses is read as it decompresses it, bit for bit in float32."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize

from tests.checkpoint.encoded import MODULE, assert_exactly, values
from tests.helpers.compressed import observed, scheme_of
from tests.helpers.quantised import Encode, quantised
from tests.helpers.tiny_models import tiny_qwen3

# By what it is: format, and QuantizationArgs of the weights.
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "FP8 a tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "FP8 a row": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "FP8 a block": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}),
    "INT8 a row": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "INT8 a row, zero points": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "INT8 a group": ("int-quantized", {"num_bits": 8, "strategy": "group", "group_size": 64}),
    "INT4 a group": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "INT4 a group, zero points": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
    "INT4 a row": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}),
    "INT4 a row, zero points": ("pack-quantized", {"num_bits": 4, "strategy": "channel", "symmetric": False}),
    "INT8 packed": ("pack-quantized", {"num_bits": 8, "strategy": "group", "group_size": 128}),
    "INT3, numbers across words": ("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 64, "symmetric": False}),
    "INT5": ("pack-quantized", {"num_bits": 5, "strategy": "channel"}),
    "INT2": ("pack-quantized", {"num_bits": 2, "strategy": "group", "group_size": 32}),
    "NVFP4": ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
    "MXFP4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
    "MXFP8": ("mxfp8-quantized", {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}),
}
ROWS, COLUMNS = 192, 256  # blocks of 128 rows, and of 64


def weight(seed: int = 0, rows: int = ROWS) -> torch.Tensor:
    """Rows and columns of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(rows, COLUMNS, generator=generator) * torch.rand(rows, 1, generator=generator).exp()
    return (found + 0.3) * torch.logspace(-2, 0, COLUMNS)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_format_is_read_as_the_library_decompresses_it(name: str, tmp_path: Path):
    form, options = SCHEMES[name]
    scheme = scheme_of(options, form)
    assert scheme.weights is not None
    compressor = BaseCompressor.get_value_from_registry(form)
    whole = weight()
    parts = compressor.compress({"weight": whole, **observed(whole, scheme.weights)}, scheme)
    if "fp4" in form:
        codes = unpack_fp4_from_uint8(parts["weight_packed"], ROWS, COLUMNS, dtype=torch.float32)
        scale = compressor._decompress_scale(parts["weight_scale"], torch.float32)
        wanted = dequantize(codes, scale, args=scheme.weights, global_scale=parts.get("weight_global_scale"), dtype=torch.float32)
    else:
        wanted = compressor.decompress(dict(parts), scheme)["weight"]
    assert not torch.equal(wanted, whole)
    assert (wanted - whole).abs().max() < 0.5 * whole.abs().max()
    parts |= {"input_scale": torch.ones(1)} if form == "float-quantized" else {}
    config = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"]}
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme.weights.model_dump(mode="json")}}
    assert_exactly(values(tmp_path / "model", parts, {**config, "config_groups": groups}), wanted.float())


def test_columns_in_another_order(tmp_path: Path):
    """`g_idx` says which group a column is of: the same numbers as of the columns in order."""
    form, options = SCHEMES["INT4 a group, zero points"]
    scheme = scheme_of(options, form)
    assert scheme.weights is not None
    group = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0)) // 32
    order = torch.argsort(group, stable=True)
    sorted_whole = weight()[:, order]
    parts = BaseCompressor.get_value_from_registry(form).compress(
        {"weight": sorted_whole, **observed(sorted_whole, scheme.weights)}, scheme
    )
    wanted = BaseCompressor.get_value_from_registry(form).decompress(dict(parts), scheme)["weight"]
    back = torch.argsort(order)
    numbers = {**parts, **_packed(parts, back, scheme)}
    config = {"quant_method": "compressed-tensors", "format": form}
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme.weights.model_dump(mode="json")}}
    found = values(tmp_path / "model", {**numbers, "weight_g_idx": group.int()}, {**config, "config_groups": groups})
    assert_exactly(found, wanted[:, back])


def _packed(parts: dict[str, torch.Tensor], order: torch.Tensor, scheme: QuantizationScheme) -> dict[str, torch.Tensor]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    assert scheme.weights is not None
    numbers = unpack_from_int32(parts["weight_packed"], scheme.weights.num_bits, torch.Size((ROWS, COLUMNS)))
    return {"weight_packed": pack_to_int32(numbers[:, order].contiguous(), scheme.weights.num_bits)}


def test_a_group_that_names_a_module_goes_before_that_of_all_linear_layers(tmp_path: Path):
    form, options = SCHEMES["INT4 a group"]
    scheme = scheme_of(options, form)
    assert scheme.weights is not None
    parts = BaseCompressor.get_value_from_registry(form).compress({"weight": weight(), **observed(weight(), scheme.weights)}, scheme)
    own, others = ({**scheme.weights.model_dump(mode="json"), "num_bits": bits} for bits in (4, 8))
    for target in ("re:.*up_proj$", MODULE):
        groups = {"a": {"targets": ["Linear"], "weights": others}, "b": {"targets": [target], "weights": own}}
        found = values(tmp_path / "model", parts, {"quant_method": "compressed-tensors", "config_groups": groups})
        assert found.encoded[f"{MODULE}.weight"].scheme == "INT4"


def mxfp6(name: str, whole: torch.Tensor) -> dict[str, torch.Tensor]:
    """By the library: four numbers in three bytes."""
    form = "mxfp6-pack-quantized"
    scheme = scheme_of({"num_bits": 6, "type": "float", "strategy": "group", "group_size": 32}, form)
    assert scheme.weights is not None
    parts = {"weight": whole.float(), "weight_scale": observed(whole.float(), scheme.weights)["weight_scale"]}
    found = BaseCompressor.get_value_from_registry(form).compress(parts, scheme)
    return {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in found.items()}


def sparse(name: str, whole: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two of four numbers, and bits that say which: as versions before 0.13 wrote them (this one writes them no more)."""
    rows, columns = whole.shape
    parts = {"compressed": whole[:, : columns // 2].contiguous(), "bitmask": torch.zeros(rows, columns // 8, dtype=torch.uint8)}
    return {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in {**parts, "shape": torch.tensor(whole.shape)}.items()}


def marlin(name: str, whole: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, columns = whole.shape
    parts = {"weight_packed": torch.zeros(columns // 32, rows * 2, dtype=torch.int32), "scale_packed": torch.ones(1, rows)}
    parts["meta"] = torch.zeros(rows, columns // 16, dtype=torch.int16)
    return {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}


@pytest.mark.parametrize(
    ("encode", "form", "part"),
    [(mxfp6, "mxfp6-pack-quantized", "weight_packed"), (sparse, "sparse-24-bitmask", "compressed"), (marlin, "marlin-24", "weight_packed")],
)
def test_a_form_without_a_reader_is_refused_by_name(encode: Encode, form: str, part: str, tmp_path: Path, user_error: Callable[..., str]):
    source = tiny_qwen3(tmp_path / "plain", num_hidden_layers=1)
    config = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"]}
    said = user_error("inspect", str(quantised(source, tmp_path / "model", encode, config)))
    assert re.search(rf"layers\.0\.\w+\.\w+\.{part} is quantised \(\w+, compressed-tensors; \d+ such tensors\)", said)
    assert "dequantise the checkpoint with the library that wrote it" in said


def test_awq_is_read_as_compressed_tensors_converts_it(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    parts = {
        "qweight": torch.randint(-(2**31), 2**31 - 1, (256, 24), generator=generator, dtype=torch.int64).int(),
        "qzeros": torch.randint(-(2**31), 2**31 - 1, (4, 24), generator=generator, dtype=torch.int64).int(),
        "scales": torch.rand(4, 192, generator=generator).half(),
    }
    converter = AutoAWQConverter(group_size=64)
    of_library = converter.process({f"{MODULE}.{name}": tensor for name, tensor in parts.items()})
    scheme = scheme_of({"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False}, "pack-quantized")
    inside = {name.removeprefix(f"{MODULE}."): tensor for name, tensor in of_library.items()}
    inside["weight_scale"] = inside["weight_scale"].float()
    wanted = BaseCompressor.get_value_from_registry("pack-quantized").decompress(inside, scheme)["weight"]
    config = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
    assert_exactly(values(tmp_path / "model", parts, config), wanted)
