"""Latent attention and DeepSeek's routers in Megatron-Core, beside what the logits and steps of the families show."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families import FAMILIES, Router
from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer import model as models
from megatron_moe2dense.trainer import runtime
from megatron_moe2dense.trainer.config import ParallelConfig
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.mapping import WeightMapping
from megatron_moe2dense.trainer.outline import count_parameters
from megatron_moe2dense.trainer.pipeline import PipelineLayout
from megatron_moe2dense.trainer.runtime import Runtime
from megatron_moe2dense.trainer.runtime.latent_attention import LATENT_NORM_EPS, LatentAttention, use_latent_attention
from megatron_moe2dense.trainer.runtime.routers import require_router
from tests.families.published import DEEPSEEK_V2_LITE
from tests.helpers.tiny_models import tiny

pytestmark = pytest.mark.slow

GPU = Runtime(torch.device("cuda", 0), "nccl", transformer_engine=True)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def place() -> Iterator[tuple[Groups, Runtime]]:
    with runtime.session("cpu") as device, process_groups.initialized(ParallelConfig(), seed=0) as groups:
        yield groups, device


def spec_of(directory: Path, dtype: torch.dtype = torch.float32) -> models.ModelSpec:
    return models.ModelSpec.of(CheckpointIndex.open(directory).config, str(directory), dtype)


def built(model: models.ModelSpec, place: tuple[Groups, Runtime], **overrides: Any) -> models.HeadlessGPT:
    return models.build(model, *place, PipelineLayout((model.dims.layers,), 1), **overrides)[0]


@pytest.mark.parametrize("scaling", [YARN, {"rope_type": "default", "rope_theta": 1e4}])
def test_on_a_gpu_the_norms_are_fused_and_rotary_positions_where_the_kernel_is(scaling: Any, tmp_path: Path, place: tuple[Groups, Runtime]):
    model = spec_of(tiny("deepseek_v2", tmp_path / "model", rope_parameters=scaling), torch.bfloat16)
    fields = models.transformer_fields(model, place[0], GPU)
    assert fields["qk_layernorm"] is True
    assert fields["apply_rope_fusion"] is (scaling is YARN)
    assert (fields["moe_shared_expert_intermediate_size"], fields["moe_layer_freq"]) == (64, [0, 1, 1, 1])
    local = models.transformer_fields(model, place[0], place[1])
    assert (local["qk_layernorm"], local["apply_rope_fusion"]) == (False, False)


def test_a_layer_of_transformer_engine_keeps_its_own_down_projections(place: tuple[Groups, Runtime]):
    layer: Any = get_gpt_layer_local_spec(multi_latent_attention=True, normalization="RMSNorm").submodules
    use_latent_attention(layer, transformer_engine=True)
    assert layer.self_attention.module is LatentAttention
    assert layer.self_attention.submodules.linear_kv_down_proj is ColumnParallelLinear


@pytest.mark.parametrize(
    ("transformer_engine", "local"),
    [
        ("self_attention.linear_q_up_proj.layer_norm_weight", "self_attention.q_layernorm.weight"),
        ("self_attention.linear_kv_up_proj.layer_norm_weight", "self_attention.kv_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
        ("mlp.experts.linear_fc1.weight5", "mlp.experts.local_experts.5.linear_fc1.weight"),
    ],
)
def test_names_of_the_transformer_engine_spec_mean_the_same_tensors(transformer_engine: str, local: str):
    spec = models.ModelSpec.of(DEEPSEEK_V2_LITE, "config.json", torch.bfloat16)
    mapping = WeightMapping(spec, first_layer=3, first_expert=32)
    assert mapping.entry(f"decoder.layers.1.{transformer_engine}") == mapping.entry(f"decoder.layers.1.{local}")


def test_weights_of_a_new_model_are_drawn_alike_and_latents_normed_with_their_own_epsilon(tmp_path: Path, place: tuple[Groups, Runtime]):
    model = built(spec_of(tiny("deepseek_v3", tmp_path / "model", rms_norm_eps=0.1, initializer_range=0.05)), place)
    for name, parameter in model.named_parameters():
        if "down_proj" in name or "up_proj" in name:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.1), name
    layers = [(name, module) for name, module in model.decoder.named_modules() if hasattr(module, "eps")]
    epsilons: dict[str, Any] = {name.split(".")[-1]: module.eps for name, module in layers}
    assert (epsilons["kv_layernorm"], epsilons["q_layernorm"], epsilons["input_layernorm"]) == (LATENT_NORM_EPS, LATENT_NORM_EPS, 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_correction_of_a_router_stays_in_float32(dtype: torch.dtype, tmp_path: Path, place: tuple[Groups, Runtime]):
    model = built(spec_of(tiny("deepseek_v3", tmp_path / "model"), dtype), place)
    assert {buffer.dtype for name, buffer in model.named_buffers() if name.endswith("expert_bias")} == {torch.float32}


def test_deepseek_v2_lite_has_the_parameters_of_the_stock_class():
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(**DEEPSEEK_V2_LITE))
    matrices = sum(parameter.numel() for parameter in stock.parameters() if parameter.dim() > 1)
    counted, _ = count_parameters(models.ModelSpec.of(DEEPSEEK_V2_LITE, "config.json", torch.bfloat16))
    assert counted == matrices


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "biases in attention": ({"attention_bias": True}, "attention_bias True"),
    "biases in FFNs": ({"mlp_bias": True}, "mlp_bias True"),
    "rotary halves": ({"rope_interleave": False}, "rope_interleave False"),
    "another scaling": ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}}, "'llama3'"),
    "YaRN without rounding": ({"rope_parameters": {**YARN, "truncate": False}}, "without truncate"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_megatron_has_no_latent_attention_for_is_refused(name: str):
    options, message = REFUSED[name]
    spec, config = FAMILIES["deepseek_v2"], models.ModelSpec.of(DEEPSEEK_V2_LITE, "config.json", torch.bfloat16).class_config
    spec.megatron_config(config)
    with pytest.raises(UserError, match=message):
        spec.megatron_config({**config, **options})


def test_sigmoid_gates_that_are_not_renormalised_are_refused():
    with pytest.raises(UserError, match="norm_topk_prob"):
        require_router(Router("sigmoid", renormalize=False), experts=8, active=2)


def test_more_active_experts_than_the_used_groups_have_are_refused(tmp_path: Path, place: tuple[Groups, Runtime]):
    model = spec_of(tiny("deepseek_v3", tmp_path / "model"))  # 2 of 4 groups of 2 experts
    built(model, place, moe_router_topk=4)
    with pytest.raises(UserError, match="5 active experts, 2 of 4 groups used"):
        built(model, place, moe_router_topk=5)


def test_a_gradient_with_strides_is_summed_over_the_group(place: tuple[Groups, Runtime], monkeypatch: pytest.MonkeyPatch):
    """Megatron-Core 0.16 sums a copy of it and returns the original."""

    def double(tensor: torch.Tensor, group: Any) -> None:
        tensor.mul_(2)

    monkeypatch.setattr(torch.distributed, "all_reduce", double)
    two_ranks: Any = SimpleNamespace(size=lambda: 2)
    strided = torch.arange(12.0).view(3, 4)[:, :2]
    assert mappings._reduce(strided, two_ranks).equal(torch.tensor([[0.0, 2.0], [8.0, 10.0], [16.0, 18.0]]))
