"""What stands in a Megatron model is what its files hold, to the bit, in every layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families import FAMILIES
from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer import runtime, weights
from megatron_moe2dense.trainer.config import ParallelConfig
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.runtime import Runtime
from megatron_moe2dense.trainer.verification import fingerprint
from megatron_moe2dense.trainer.verification.bits import bit_sum
from megatron_moe2dense.trainer.verification.fingerprint import Fingerprint
from tests.helpers.forks import launch
from tests.helpers.quantised import as_fp8
from tests.helpers.tiny_models import as_mxfp4, tiny, tiny_qwen3, tiny_qwen3_moe
from tests.trainer.cases import loaded

pytestmark = pytest.mark.slow

Place = tuple[Groups, Runtime]


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with runtime.session("cpu") as device, process_groups.initialized(ParallelConfig(), seed=0) as groups:
        yield groups, device


def of(directory: Path, place: Place, dtype: str = "float32") -> Fingerprint:
    chunks, spec = loaded(directory, place, dtype)
    return fingerprint.verify(chunks, spec, place[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sharding_of_the_files_does_not_matter_and_one_bit_does(dtype: str, tmp_path: Path, place: Place):
    whole = of(tiny_qwen3_moe(tmp_path / "whole", dtype), place, dtype)
    assert of(tiny_qwen3_moe(tmp_path / "sharded", dtype, max_shard_size="200KB"), place, dtype) == whole
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    bits = tensors["model.layers.1.mlp.experts.3.up_proj.weight"].view(torch.int16)
    bits[1, 1] ^= 1 << 15
    save_file(tensors, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    assert of(tmp_path / "whole", place, dtype).digest != whole.digest


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_holds_what_its_files_hold_rounded(family: str, tmp_path: Path, place: Place):
    """Not rounded: test_weights.py."""
    assert of(tiny(family, tmp_path / "model"), place, "bfloat16").digest


def test_a_correction_that_stays_float32_is_compared_in_float32(tmp_path: Path, place: Place):
    directory = tiny("deepseek_v3", tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    correction = [name for name in tensors if name.endswith("e_score_correction_bias")]
    assert correction
    assert any(not torch.equal(tensors[name].bfloat16().float(), tensors[name]) for name in correction)
    chunks, spec = loaded(directory, place, "bfloat16")
    assert {buffer.dtype for name, buffer in chunks[0].named_buffers() if name.endswith("expert_bias")} == {torch.float32}
    assert fingerprint.verify(chunks, spec, place[0])


@pytest.mark.parametrize("fault", ["zeros", "one bit", "another tensor"])
def test_a_parameter_that_is_not_what_the_files_hold_is_refused(fault: str, tmp_path: Path, place: Place):
    directory = tiny_qwen3_moe(tmp_path / "model")
    chunks, spec = loaded(directory, place, "float32")
    layers: Any = chunks[0].decoder.layers
    down = layers[2].mlp.experts.local_experts[5].linear_fc2.weight
    with torch.no_grad():
        if fault == "zeros":
            down.zero_()
        elif fault == "one bit":
            down.view(torch.int32)[3, 4] ^= 1
        else:
            down.copy_(layers[2].mlp.experts.local_experts[4].linear_fc2.weight)
    with pytest.raises(UserError, match=r"1 parameters .* model\.layers\.2\.mlp\.experts\.5\.down_proj\.weight"):
        fingerprint.verify(chunks, spec, place[0])


def test_a_tensor_that_no_parameter_takes_is_refused(tmp_path: Path, place: Place):
    directory = tiny_qwen3(tmp_path / "model")
    file = directory / "model.safetensors"
    tensors = load_file(file)
    allowed = {"model.layers.4.mlp.up_proj.weight": torch.ones(2), "model.rotary_emb.inv_freq": torch.ones(2)}
    save_file({**tensors, **allowed}, file, metadata={"format": "pt"})
    assert of(directory, place)
    save_file({**tensors, "model.layers.3.mlp.up_proj.bias": torch.ones(2)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.3\.mlp\.up_proj\.bias, which Qwen3ForCausalLM does not know"):
        of(directory, place)


def test_a_tensor_that_came_after_the_files_were_opened_is_refused(tmp_path: Path, place: Place):
    directory = tiny_qwen3(tmp_path / "model")
    chunks, spec = loaded(directory, place, "float32")
    file = directory / "model.safetensors"
    save_file({**load_file(file), "model.layers.3.mlp.up_proj.bias": torch.ones(2)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors that no parameter .* model\.layers\.3\.mlp\.up_proj\.bias"):
        fingerprint.verify(chunks, spec, place[0])


def test_matrices_of_zeros_are_named(tmp_path: Path, place: Place):
    directory = tiny_qwen3(tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: torch.zeros_like(tensors[name])}, directory / "model.safetensors", metadata={"format": "pt"})
    assert of(directory, place).zeros == (name,)


def test_the_sum_of_bits_does_not_depend_on_how_the_values_are_split():
    values = torch.randn(1_000_003).bfloat16()
    assert bit_sum(values) == sum(bit_sum(part) for part in values.split(12_345)) == int(values.view(torch.int16).long().sum())


@pytest.mark.distributed
def test_a_fingerprint_is_the_same_in_every_layout(tmp_path: Path, place: Place):
    whole_experts = [{"tensor": 2, "sequence": True, "expert": 2}, {"pipeline": 2}, {"expert": 2}, {}]
    layouts = [{"tensor": 2}, *whole_experts]
    one: dict[str, Any] = {"num_local_experts": 1, "num_experts_per_tok": 1}
    cases = [
        (tiny_qwen3_moe(tmp_path / "moe", vocab_size=200, max_shard_size="200KB"), layouts),
        (tiny_qwen3(tmp_path / "tied", "bfloat16", tie_word_embeddings=True), layouts),
        (as_mxfp4(tiny("gpt_oss", tmp_path / "plain", intermediate_size=64), tmp_path / "packed")[1], whole_experts),
        (as_fp8(tiny_qwen3_moe(tmp_path / "of fp8", "bfloat16"), tmp_path / "fp8"), layouts),
        (tiny("gpt_oss", tmp_path / "stacked"), whole_experts),
        (tiny("gpt_oss", tmp_path / "one expert", **one), layouts),
        (tiny("olmoe", tmp_path / "norms over heads", save_original_format=False), layouts),
    ]
    for (directory, its_layouts), found in zip(cases, launch(2, "tests.trainer.cases:fingerprints", cases), strict=True):
        assert found == [of(directory, place, "bfloat16" if directory.name == "tied" else "float32")] * len(its_layouts)


def test_every_parameter_counts_once(tmp_path: Path, place: Place):
    directory = tiny_qwen3(tmp_path / "model", tie_word_embeddings=True)
    chunks, spec = loaded(directory, place, "float32")
    counted = [entry.names for _, entry, counts, _ in weights.weights_of_rank(chunks, spec, place[0]) if counts]
    assert len(counted) == len(set(counted)) == len(list(chunks[0].parameters()))


def test_values_of_mxfp4_count_and_one_code_makes_the_difference(tmp_path: Path, place: Place):
    plain, packed = as_mxfp4(tiny("gpt_oss", tmp_path / "plain", intermediate_size=64), tmp_path / "packed")
    assert of(packed, place).zeros == of(plain, place).zeros == ()
    chunks, spec = loaded(packed, place, "float32")
    tensors = load_file(packed / "model.safetensors")
    tensors["model.layers.1.mlp.experts.down_proj_blocks"][7, 3, 1, 2] ^= 2
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 parameters .* model\.layers\.1\.mlp\.experts\.down_proj_blocks"):
        fingerprint.verify(chunks, spec, place[0])


def test_a_router_with_one_expert_is_no_parameter(tmp_path: Path, place: Place):
    one: dict[str, Any] = {"num_local_experts": 1, "num_experts_per_tok": 1}
    assert of(tiny("gpt_oss", tmp_path / "model", **one), place)
