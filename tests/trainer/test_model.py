"""Everything up to the kernel call of the GPU path, and sizes from configs alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors.torch import load_file

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer import model as models
from megatron_moe2dense.trainer import runtime
from megatron_moe2dense.trainer.config import ParallelConfig
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.mapping import NameTable
from megatron_moe2dense.trainer.runtime import Runtime
from tests.helpers.tiny_models import tiny, tiny_qwen3_moe

GPU = Runtime(torch.device("cuda", 0), "nccl", transformer_engine=True)


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    with runtime.session("cpu"), process_groups.initialized(ParallelConfig(), seed=0) as groups:
        yield groups


def blueprint(directory: Path) -> models.Blueprint:
    return models.Blueprint.of(CheckpointIndex.open(directory).config, str(directory), torch.bfloat16)


def test_the_gpu_config_asks_for_fused_kernels_and_grouped_experts(tmp_path: Path, groups: Groups):
    fields = models.transformer_fields(blueprint(tiny_qwen3_moe(tmp_path / "moe")), groups, GPU)
    for name in ("moe_grouped_gemm", "moe_permute_fusion", "apply_rope_fusion", "bias_activation_fusion", "batch_p2p_comm", "bf16"):
        assert fields[name] is True
    assert fields["use_cpu_initialization"] is False


def test_a_gpu_without_transformer_engine_gets_a_config_that_megatron_takes(tmp_path: Path, groups: Groups):
    plain = Runtime(torch.device("cuda", 0), "nccl", transformer_engine=False)
    config = TransformerConfig(**models.transformer_fields(blueprint(tiny_qwen3_moe(tmp_path / "moe")), groups, plain))
    assert config.num_moe_experts == 8
    assert not config.moe_grouped_gemm


@pytest.mark.parametrize(
    ("transformer_engine", "local"),
    [
        ("decoder.layers.1.self_attention.linear_qkv.layer_norm_weight", "decoder.layers.1.input_layernorm.weight"),
        ("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", "decoder.layers.0.pre_mlp_layernorm.weight"),
        ("decoder.layers.2.mlp.experts.linear_fc1.weight7", "decoder.layers.2.mlp.experts.local_experts.7.linear_fc1.weight"),
        ("decoder.layers.2.mlp.experts.linear_fc2.weight11", "decoder.layers.2.mlp.experts.local_experts.11.linear_fc2.weight"),
    ],
)
def test_names_of_the_transformer_engine_spec_mean_the_same_tensors(transformer_engine: str, local: str, tmp_path: Path):
    model = blueprint(tiny_qwen3_moe(tmp_path / "moe"))
    table = NameTable(model.family, model.dims, first_layer=2, first_expert=8)
    assert table.entry(transformer_engine) == table.entry(local)


def test_numbers_of_layers_and_experts_are_global(tmp_path: Path):
    model = blueprint(tiny_qwen3_moe(tmp_path / "moe"))
    entry = NameTable(model.family, model.dims, first_layer=2, first_expert=4).entry(
        "decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight"
    )
    assert entry.hf == ("model.layers.3.mlp.experts.7.down_proj.weight",)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3", {}),
        ("qwen3_moe", {}),
        ("deepseek_v2", {}),
        ("deepseek_v2", {"q_lora_rank": 24, "v_head_dim": 8}),
        ("deepseek_v2", {"first_k_dense_replace": 4}),
        ("deepseek_v3", {}),
    ],
)
def test_parameters_are_counted_from_the_config_alone(family: str, options: dict[str, Any], tmp_path: Path):
    directory = tiny(family, tmp_path / "model", **options)
    model = blueprint(directory)
    sizes = {name: t.numel() for name, t in load_file(directory / "model.safetensors").items() if t.dim() > 1}
    matrices, experts = sum(sizes.values()), sum(size for name, size in sizes.items() if ".experts." in name)
    idle = experts // model.dims.experts * (model.dims.experts - model.dims.active) if experts else 0
    assert models.count_parameters(model) == (matrices, matrices - idle)
