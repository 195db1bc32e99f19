"""What stands in a Megatron model is what its files hold, to the bit, in every layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.trainer import fingerprint, runtime, weights
from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer.config import ParallelConfig
from megatron_moe2dense.trainer.fingerprint import Fingerprint, bit_sum
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.runtime import Runtime
from tests.helpers.distributed import launch
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe
from tests.trainer.cases import loaded

Place = tuple[Groups, Runtime]


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with runtime.session("cpu") as device, process_groups.initialized(ParallelConfig(), seed=0) as groups:
        yield groups, device


def of(directory: Path, place: Place, dtype: str = "float32") -> Fingerprint:
    chunks, blueprint = loaded(directory, place, dtype)
    return fingerprint.verify(chunks, blueprint, place[0], directory)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sharding_of_the_files_does_not_matter_and_one_bit_does(dtype: str, tmp_path: Path, place: Place):
    whole = of(tiny_qwen3_moe(tmp_path / "whole", dtype), place, dtype)
    assert of(tiny_qwen3_moe(tmp_path / "sharded", dtype, max_shard_size="200KB"), place, dtype) == whole
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    bits = tensors["model.layers.1.mlp.experts.3.up_proj.weight"].view(torch.int16)
    bits[1, 1] ^= 1 << 15
    save_file(tensors, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    assert of(tmp_path / "whole", place, dtype).digest != whole.digest


@pytest.mark.parametrize("fault", ["zeros", "one bit", "another tensor"])
def test_a_parameter_that_is_not_what_the_files_hold_is_refused(fault: str, tmp_path: Path, place: Place):
    directory = tiny_qwen3_moe(tmp_path / "model")
    chunks, blueprint = loaded(directory, place, "float32")
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
        fingerprint.verify(chunks, blueprint, place[0], directory)


def test_a_tensor_that_no_parameter_takes_is_refused(tmp_path: Path, place: Place):
    directory = tiny_qwen3(tmp_path / "model")
    file = directory / "model.safetensors"
    tensors = load_file(file)
    allowed = {"model.layers.4.mlp.up_proj.weight": torch.ones(2), "model.rotary_emb.inv_freq": torch.ones(2)}
    save_file({**tensors, **allowed}, file, metadata={"format": "pt"})
    assert of(directory, place)
    save_file({**tensors, "model.layers.3.mlp.up_proj.bias": torch.ones(2)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors that no parameter .* model\.layers\.3\.mlp\.up_proj\.bias"):
        of(directory, place)


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
    directories = [
        tiny_qwen3_moe(tmp_path / "moe", vocab_size=200, max_shard_size="200KB"),
        tiny_qwen3(tmp_path / "tied", "bfloat16", tie_word_embeddings=True),
    ]
    layouts = [{"tensor": 2}, {"tensor": 2, "sequence": True, "expert": 2}, {"pipeline": 2}, {"expert": 2}, {}]
    for directory, found in zip(directories, launch(2, "tests.trainer.cases:fingerprints", directories, layouts), strict=True):
        assert found == [of(directory, place, "bfloat16" if directory.name == "tied" else "float32")] * len(layouts)


def test_every_parameter_counts_once(tmp_path: Path, place: Place):
    chunks, blueprint = loaded(tiny_qwen3(tmp_path / "model", tie_word_embeddings=True), place, "float32")
    counted = [entry.hf for _, entry, counts in weights.placed(chunks, blueprint, place[0]) if counts]
    assert len(counted) == len(set(counted)) == len(list(chunks[0].parameters()))
