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
from megatron_moe2dense.families import FAMILIES
from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer import model as models
from megatron_moe2dense.trainer import runtime
from megatron_moe2dense.trainer.config import ParallelConfig
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.mapping import WeightMapping
from megatron_moe2dense.trainer.outline import count_parameters
from megatron_moe2dense.trainer.runtime import Runtime
from megatron_moe2dense.trainer.runtime.configs import config_of
from megatron_moe2dense.trainer.runtime.modules import prepare_sinks
from tests.helpers.tiny_models import tiny, tiny_qwen3_moe

pytestmark = pytest.mark.slow

GPU = Runtime(torch.device("cuda", 0), "nccl", transformer_engine=True)


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    with runtime.session("cpu"), process_groups.initialized(ParallelConfig(), seed=0) as groups:
        yield groups


def spec_of(directory: Path) -> models.ModelSpec:
    return models.ModelSpec.of(CheckpointIndex.open(directory).config, str(directory), torch.bfloat16)


def test_the_gpu_config_asks_for_fused_kernels_and_grouped_experts(tmp_path: Path, groups: Groups):
    fields = models.transformer_fields(spec_of(tiny_qwen3_moe(tmp_path / "moe")), groups, GPU)
    for name in ("moe_grouped_gemm", "moe_permute_fusion", "apply_rope_fusion", "bias_activation_fusion", "batch_p2p_comm", "bf16"):
        assert fields[name] is True
    assert fields["use_cpu_initialization"] is False


def test_a_gpu_without_transformer_engine_gets_a_config_that_megatron_takes(tmp_path: Path, groups: Groups):
    plain = Runtime(torch.device("cuda", 0), "nccl", transformer_engine=False)
    config = TransformerConfig(**models.transformer_fields(spec_of(tiny_qwen3_moe(tmp_path / "moe")), groups, plain))
    assert config.num_moe_experts == 8
    assert not config.moe_grouped_gemm


EXPERTS = "decoder.layers.2.mlp.experts."


@pytest.mark.parametrize(
    ("family", "transformer_engine", "local"),
    [
        ("qwen3_moe", "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight", "decoder.layers.1.input_layernorm.weight"),
        ("qwen3_moe", "decoder.layers.0.mlp.linear_fc1.layer_norm_weight", "decoder.layers.0.pre_mlp_layernorm.weight"),
        ("qwen3_moe", EXPERTS + "linear_fc1.weight7", EXPERTS + "local_experts.7.linear_fc1.weight"),
        ("qwen3_moe", EXPERTS + "linear_fc2.weight11", EXPERTS + "local_experts.11.linear_fc2.weight"),
        ("gpt_oss", EXPERTS + "linear_fc1.bias7", EXPERTS + "local_experts.7.linear_fc1.bias"),
        ("gpt_oss", EXPERTS + "linear_fc2.bias3", EXPERTS + "local_experts.3.linear_fc2.bias"),
    ],
)
def test_names_of_the_transformer_engine_spec_mean_the_same_tensors(family: str, transformer_engine: str, local: str, tmp_path: Path):
    model = spec_of(tiny(family, tmp_path / "moe"))
    mapping = WeightMapping(model, first_layer=1, first_expert=8)
    assert mapping.entry(transformer_engine) == mapping.entry(local)


ONE_EXPERT = {"num_local_experts": 1, "num_experts_per_tok": 1}


@pytest.mark.parametrize("options", [{}, ONE_EXPERT])
def test_the_gpu_config_of_gpt_oss_leaves_out_kernels_without_its_biases_and_clamp(options: dict[str, Any], tmp_path: Path, groups: Groups):
    model = spec_of(tiny("gpt_oss", tmp_path / "model", **options))
    fields = models.transformer_fields(model, groups, GPU)
    for name in ("bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion"):
        assert fields[name] is False
    plain = config_of(models.transformer_fields(model, groups, Runtime(torch.device("cuda", 0), "nccl", transformer_engine=False)))
    assert (plain.softmax_type, plain.window_size, plain.window_attn_skip_freq) == ("learnable", (7, 0), [1, 0, 1, 0])


def test_sinks_of_any_attention_are_zero_and_counted_on_every_rank_that_has_some():
    layer: Any = torch.nn.Module()
    layer.core_attention = torch.nn.Module()
    layer.core_attention.softmax_offset = torch.nn.Parameter(torch.full((4,), float("nan")))  # as Transformer Engine leaves it
    prepare_sinks(layer)
    assert layer.core_attention.softmax_offset.tolist() == [0.0] * 4
    assert getattr(layer.core_attention.softmax_offset, "tensor_model_parallel", False)


def test_numbers_of_layers_and_experts_are_global(tmp_path: Path):
    model = spec_of(tiny_qwen3_moe(tmp_path / "moe"))
    entry = WeightMapping(model, first_layer=2, first_expert=4).entry("decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight")
    assert (entry.names, entry.expert) == (("model.layers.3.mlp.experts.down_proj",), 7)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {}) for family in FAMILIES),
        ("deepseek_v2", {"q_lora_rank": 24, "v_head_dim": 8}),
        ("deepseek_v2", {"first_k_dense_replace": 4}),
        ("gpt_oss", ONE_EXPERT),
    ],
)
def test_parameters_are_counted_from_the_config_alone(family: str, options: dict[str, Any], tmp_path: Path):
    directory = tiny(family, tmp_path / "model", **options)
    model = spec_of(directory)
    # Biases and the gate of a shared expert are vectors, as norms are; a router with nothing to choose from is not trained.
    left_out = (*model.idle_router(), "bias", "shared_expert_gate.weight")
    tensors = load_file(directory / "model.safetensors")
    sizes = {name: t.numel() for name, t in tensors.items() if t.dim() > 1 and not name.endswith(left_out)}
    matrices, experts = sum(sizes.values()), sum(size for name, size in sizes.items() if ".experts." in name)
    idle = experts // model.dims.experts * (model.dims.experts - model.dims.active) if model.dims.experts else 0
    assert count_parameters(model) == (matrices, matrices - idle)
