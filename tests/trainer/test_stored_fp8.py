"""Weights that stay FP8 in memory: codes and scales of an FP8 checkpoint are those of its files, others the nearest there are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer import runtime, weights
from megatron_moe2dense.trainer.config import ParallelConfig
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.model import HeadlessGPT, ModelSpec
from megatron_moe2dense.trainer.runtime import Runtime, stored_fp8
from megatron_moe2dense.trainer.verification import fingerprint
from tests.helpers.compressed import FP8_ROWS, FP8_TENSOR, compressed, decompressed
from tests.helpers.forks import launch
from tests.helpers.quantised import as_fp8, from_fp8
from tests.helpers.tiny_models import as_mxfp4, tiny, tiny_qwen3_moe
from tests.trainer.cases import loaded_as

pytestmark = pytest.mark.slow

Place = tuple[Groups, Runtime]


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with runtime.session("cpu") as device, process_groups.initialized(ParallelConfig(), seed=0) as groups:
        yield groups, device


def load(directory: Path, place: Place, dtype: torch.dtype = torch.bfloat16) -> tuple[HeadlessGPT, ModelSpec, weights.Rounding]:
    spec = dataclasses.replace(ModelSpec.open(directory, dtype), in_fp8=True)
    (model,), lost = loaded_as(spec, place)
    return model, spec, lost


def by_entry(chunks: list[HeadlessGPT], spec: ModelSpec, place: Place) -> dict[Any, torch.Tensor]:
    return {(each.entry.names, each.entry.expert): each.tensor for each in weights.weights_of_rank(chunks, spec, place[0])}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By name: an FP8 checkpoint, and what the library that wrote it dequantises it to."""
    root, found = tmp_path_factory.mktemp("pairs"), {}
    blocks = [("qwen3_moe", (16, 16)), ("qwen3_moe", (32, 32)), ("qwen3_moe", (16, 64)), ("deepseek_v3", (16, 16)), ("gpt_oss", (16, 16))]
    for family, block in blocks:
        name = f"{family} {block[0]} x {block[1]}"
        packed = as_fp8(tiny(family, root / name, dtype="bfloat16"), root / f"{name} packed", block)
        found[name] = (packed, from_fp8(packed, root / f"{name} plain"))
    for name, kind in (("qwen3_moe rows", FP8_ROWS), ("qwen3_moe tensor", FP8_TENSOR)):
        packed = compressed(root / "qwen3_moe 16 x 16", root / f"{name} packed", kind)
        found[name] = (packed, decompressed(packed, root / f"{name} plain", kind))
    return found


# Two ranks cut blocks of 32 rows and of 64 columns.
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3_moe 16 x 16", {}, "float32"),
    ("qwen3_moe 16 x 16", {"pipeline": 2}, "bfloat16"),
    ("qwen3_moe 32 x 32", {"tensor": 2}, "bfloat16"),
    ("qwen3_moe 32 x 32", {"expert": 2}, "bfloat16"),
    ("qwen3_moe 16 x 64", {"tensor": 2}, "bfloat16"),
    ("qwen3_moe rows", {"tensor": 2}, "bfloat16"),
    ("qwen3_moe tensor", {"tensor": 2}, "bfloat16"),
    ("deepseek_v3 16 x 16", {"tensor": 2, "expert": 2}, "bfloat16"),
    ("gpt_oss 16 x 16", {"expert": 2}, "float32"),
]


@pytest.mark.distributed
def test_an_fp8_checkpoint_has_its_dequantised_weights_and_hidden_states_to_the_bit(pairs: dict[str, tuple[Path, Path]]):
    cases = [(*pairs[name], layout, dtype) for name, layout, dtype in CASES]
    for case, (differ, nbytes, plain) in zip(CASES, launch(2, "tests.trainer.cases:against_dequantised", cases), strict=True):
        assert not differ, case
        assert nbytes < 0.75 * plain, case


def test_what_an_fp8_checkpoint_does_not_quantise_stays_as_it_is(pairs: dict[str, tuple[Path, Path]], place: Place):
    model, _, lost = load(pairs["deepseek_v3 16 x 16"][0], place)
    assert lost.matrices == 0
    layer: Any = model.decoder.layers[1]
    codes = layer.self_attention.linear_proj.parametrizations.weight.original0
    stored = load_file(pairs["deepseek_v3 16 x 16"][0] / "model.safetensors")
    assert torch.equal(codes.view(torch.uint8), stored["model.layers.1.self_attn.o_proj.weight"].view(torch.uint8))
    assert stored["model.layers.1.self_attn.q_b_proj.weight"].dtype == torch.float32
    assert not torch.nn.utils.parametrize.is_parametrized(layer.self_attention.linear_q_up_proj)


def test_another_code_in_memory_is_refused(pairs: dict[str, tuple[Path, Path]], place: Place):
    model, spec, _ = load(pairs["qwen3_moe 16 x 16"][0], place)
    fingerprint.verify([model], spec, place[0])
    layers: Any = model.decoder.layers
    layers[1].mlp.experts.local_experts[2].linear_fc1.parametrizations.weight.original0.view(torch.uint8)[0, 0] ^= 1
    with pytest.raises(UserError, match="1 parameters of the model are not what the files hold"):
        fingerprint.verify([model], spec, place[0])


def test_a_code_that_is_no_number_is_refused(pairs: dict[str, tuple[Path, Path]], place: Place, tmp_path: Path):
    tensors = load_file(pairs["qwen3_moe 16 x 16"][0] / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"].view(torch.uint8)[3, 3] = 0x7F
    for file in pairs["qwen3_moe 16 x 16"][0].glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.o_proj\.weight.*NaN"):
        load(tmp_path, place)


@pytest.mark.parametrize("group", [8, 32, 96])
def test_rounding_takes_the_nearest_code_under_the_least_power_of_two_that_holds_the_block(group: int):
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(24, 96, generator=generator) * torch.logspace(-20, 8, 96, base=2)).bfloat16()
    weight[3], weight[4, :group] = 0, 448.0
    codes, scales = stored_fp8.rounded(weight, group)
    exact, each = weight.double(), scales.double().repeat_interleave(group, 1)
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    table = table[table.isfinite()]
    nearest = (exact[..., None] - table * each[..., None]).abs().amin(-1)
    assert torch.equal((codes.double() * each - exact).abs(), nearest)
    assert torch.equal(stored_fp8.decoded(codes, scales).double(), codes.double() * each)
    largest = exact.abs().unflatten(1, (-1, group)).amax(-1)
    full = largest > 0
    assert torch.equal(torch.exp2(scales.double().log2().round()), scales.double())
    assert bool((largest <= 448 * scales).all())
    assert bool((largest > 224 * scales)[full].all())


def test_what_rounding_costs_is_said_and_bounded(place: Place, tmp_path: Path):
    """Half a unit in the last of four digits, 1/16, at the most; of random weights less than a third of that, as the root of a mean."""
    source = tiny_qwen3_moe(tmp_path / "model", "bfloat16")
    model, spec, lost = load(source, place)
    plain, _ = loaded_as(ModelSpec.open(source, torch.bfloat16), place)
    errors = norms = 0.0
    of_plain = by_entry(plain, spec, place)
    for mine in weights.weights_of_rank([model], spec, place[0]):
        exact = of_plain[mine.entry.names, mine.entry.expert].detach().double()
        if mine.bits is None:
            assert torch.equal(mine.tensor.double(), exact)
            continue
        error = (mine.tensor.double() - exact).abs()
        assert bool((error <= exact.abs() / 16).logical_or(error <= exact.abs().amax(1, keepdim=True) * 2**-17).all())
        errors, norms = errors + float(error.square().sum()), norms + float(exact.square().sum())
    assert lost.matrices == 72
    assert lost.relative == pytest.approx((errors / norms) ** 0.5)
    assert 0.02 < lost.relative < 0.03
    assert fingerprint.verify([model], spec, place[0]) == fingerprint.verify(plain, spec, place[0])


def test_mxfp4_loses_nothing(place: Place, tmp_path: Path):
    """Its steps are among those of E4M3, and scales are powers of two in both."""
    source = tiny("gpt_oss", tmp_path / "plain", dtype="bfloat16", intermediate_size=64)
    plain, packed = as_mxfp4(source, tmp_path / "packed")
    model, spec, _ = load(packed, place)
    of_plain = by_entry(loaded_as(ModelSpec.open(plain, torch.bfloat16), place)[0], spec, place)
    experts = [each for each in weights.weights_of_rank([model], spec, place[0]) if each.entry.is_expert and each.bits is not None]
    assert experts
    assert all(torch.equal(each.tensor, of_plain[each.entry.names, each.entry.expert]) for each in experts)


@pytest.mark.distributed
def test_loading_never_holds_the_whole_model_in_its_compute_type(tmp_path: Path):
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 48, "num_hidden_layers": 4}
    source = tiny_qwen3_moe(tmp_path / "model", "bfloat16", **sizes)
    for directory in (source, as_fp8(source, tmp_path / "packed", (128, 128))):
        grown, held, plain = launch(1, "tests.trainer.cases:memory_of_loading", directory)
        assert plain > 70e6
        assert held < 0.6 * plain
        assert grown < held + 0.3 * plain < plain
