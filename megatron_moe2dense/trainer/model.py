"""A Megatron-Core GPTModel for any family, whose forward ends at the final hidden states.

Loss and LM head meet in the loss function, so that pipeline stages exchange and keep hidden states, never logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.common import hub
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import read_json
from megatron_moe2dense.families import Dims, FamilySpec, Router, family_of
from megatron_moe2dense.families.account import Account
from megatron_moe2dense.families.stock import Stock
from megatron_moe2dense.trainer.config import ParallelConfig
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.losses.vocab_parallel import VocabParallelLogits
from megatron_moe2dense.trainer.pipeline import PipelineLayout
from megatron_moe2dense.trainer.runtime import Runtime, stored_fp8
from megatron_moe2dense.trainer.runtime.configs import config_of
from megatron_moe2dense.trainer.runtime.latent_attention import latent_fields
from megatron_moe2dense.trainer.runtime.modules import prepare_sinks
from megatron_moe2dense.trainer.runtime.routers import finish_routers, router_fields
from megatron_moe2dense.trainer.runtime.specs import block_spec

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "quick_gelu": quick_gelu}
# The vocabulary is padded to this whatever the tensor-parallel size, so that checkpoints reshard.
VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """What a model is: its config.json, family, stock class and sizes, and its compute type; of a checkpoint also what its tensors are.
    in_fp8: it is frozen, and its matrices stay FP8 in memory (`runtime.stored_fp8`). Two are equal when they are one."""

    config: Mapping[str, Any]
    family: FamilySpec
    stock: Stock
    dims: Dims
    dtype: torch.dtype
    account: Account | None = None
    in_fp8: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str, dtype: torch.dtype) -> ModelSpec:
        """Of a Hugging Face config. UserError for a family that the trainer can not build, and for a config that is none of its class."""
        family = family_of(config, where)
        stock = Stock.of(config, where)
        spec = cls(config, family, stock, stock.dims, dtype)
        return dataclasses.replace(spec, dims=_dense(spec.dims)) if spec._has_one_expert() else spec

    @classmethod
    def open(cls, directory: str | Path, dtype: torch.dtype) -> ModelSpec:
        """Of a checkpoint, all of whose tensors are accounted for before one is read.

        Raises:
            UserError: as `of`; damaged files; a tensor that is quantised, absent, unknown or of another shape than the stock class has.
        """
        index = CheckpointIndex.open(directory)
        spec = cls.of(index.config, str(directory), dtype)
        return dataclasses.replace(spec, account=Account.of(index, spec.stock))

    @property
    def opened(self) -> Account:
        """Of the checkpoint that it was opened from."""
        assert self.account is not None, "ModelSpec.open reads a checkpoint"
        return self.account

    @cached_property
    def class_config(self) -> dict[str, Any]:
        """config.json as its stock class understands it: every key has a value."""
        return self.stock.config.to_dict()

    @classmethod
    def read(cls, directory: str | Path, dtype: torch.dtype) -> ModelSpec:
        """Of a config.json alone; UserError as `of`."""
        content = read_json(hub.located(directory) / "config.json", "a Hugging Face directory with its config.json")
        return cls.of(content, str(directory), dtype)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the layers with experts to choose from."""
        return tuple(self.stock.moe) if self.dims.experts else ()

    @property
    def router(self) -> Router:
        """How layers with experts route."""
        assert self.family.router is not None, "a family with experts has a router"
        return self.family.router(self.class_config)

    def _has_one_expert(self) -> bool:
        """Whether one expert in every layer takes every token whole: the softmax over one logit is 1."""
        dims = self.dims
        alone = dims.experts == 1 and not dims.dense_width and not dims.shared_width
        return alone and self.router.score == "softmax" and self.router.scaling == 1.0

    def idle_router(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what the stock class has and a dense model lacks: the routers of layers with one expert."""
        if self.dims.experts:
            return {}
        routers = tuple(self.stock.in_model(layer, f"{place.router}.") for layer, place in self.stock.moe.items())
        return {name: shape for name, shape in self.stock.shapes.items() if name.startswith(routers)}


def _dense(dims: Dims) -> Dims:
    """Of a model whose experts are one: it is trained as a dense one."""
    return dataclasses.replace(dims, experts=0, active=0, expert_width=0, dense_width=dims.expert_width)


class HeadlessGPT(GPTModel):
    """GPTModel whose last stage returns the normed final hidden states [S, B, D]; `parallel_logits` adds the LM head."""

    def _postprocess(self, hidden_states: Tensor, *_args: Any, **_options: Any) -> Tensor:
        return hidden_states

    def parallel_logits(self, hidden_SBD: Tensor, vocab_size: int) -> VocabParallelLogits:
        """What a loss needs of the logits, T = S * B tokens, sequence-major.

        As in the output layer, hidden states are gathered over sequence-parallel ranks, or their gradients summed over the group.
        """
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        assert weight is not None
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            whole = gather_from_sequence_parallel_region(hidden_SBD, tensor_parallel_output_grad=True, group=group)
        else:
            whole = copy_to_tensor_model_parallel_region(hidden_SBD, group=group)
        return VocabParallelLogits.of(whole.flatten(0, 1), weight, vocab_size, group)


def padded_vocabulary(vocab_size: int) -> int:
    """Vocabulary rounded up to VOCABULARY_MULTIPLE."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def build(spec: ModelSpec, groups: Groups, runtime: Runtime, layout: PipelineLayout, **overrides: Any) -> list[HeadlessGPT]:
    """This rank's chunks of the model, whose weights are still to be loaded or drawn; `overrides` are TransformerConfig fields.

    Raises:
        UserError: the model does not divide over the parallel layout.
    """
    require_division(spec, groups.parallel)
    loaded = {"perform_initialization": False} if spec.in_fp8 else {}  # nothing is drawn into what has no memory
    fields = {**transformer_fields(spec, groups, runtime), **_pipeline_fields(layout, groups), **loaded, **overrides}
    config = config_of(fields)
    return [_chunk(spec, config, groups, runtime, number) for number in range(layout.chunks)]


def _pipeline_fields(layout: PipelineLayout, groups: Groups) -> dict[str, Any]:
    if groups.parallel.pipeline == 1:
        return {}
    chunks = layout.chunks if layout.chunks > 1 else None
    return {"pipeline_model_parallel_layout": layout.megatron_layout(), "virtual_pipeline_model_parallel_size": chunks}


def _chunk(spec: ModelSpec, config: TransformerConfig, groups: Groups, runtime: Runtime, number: int) -> HeadlessGPT:
    layers = block_spec(config, runtime.transformer_engine, number, groups.stage)
    model = HeadlessGPT(
        config,
        stored_fp8.leave_unallocated(layers) if spec.in_fp8 else layers,  # type: ignore[arg-type] - Megatron takes block submodules too
        padded_vocabulary(spec.dims.vocab_size),
        spec.dims.max_positions,
        pre_process=groups.is_first_stage and number == 0,
        post_process=groups.is_last_stage and number == (config.virtual_pipeline_model_parallel_size or 1) - 1,
        position_embedding_type="rope",
        rotary_base=int(spec.dims.rope_theta),
        share_embeddings_and_output_weights=spec.dims.tied_embeddings,
        pg_collection=groups.collection,
        vp_stage=number,
    )
    if spec.in_fp8:
        stored_fp8.settle(model, runtime.device, spec.dtype)
    else:
        model.to(device=runtime.device, dtype=spec.dtype)
    prepare_sinks(model)
    if spec.dims.experts:
        finish_routers(model, spec.router)
    return model


def family_fields(spec: ModelSpec) -> Mapping[str, Any]:
    """The family's TransformerConfig fields."""
    return spec.family.megatron_config(spec.class_config)


def transformer_fields(spec: ModelSpec, groups: Groups, runtime: Runtime) -> dict[str, Any]:
    """The fields of Megatron's TransformerConfig for this model, layout and device."""
    dims, parallel = spec.dims, groups.parallel
    family = dict(family_fields(spec))
    fields: dict[str, Any] = {
        "num_layers": dims.layers,
        "hidden_size": dims.hidden_size,
        "num_attention_heads": dims.heads,
        "num_query_groups": dims.kv_heads,
        "kv_channels": dims.head_dim,
        "ffn_hidden_size": dims.dense_width or dims.expert_width,
        "layernorm_epsilon": dims.norm_eps,
        "activation_func": ACTIVATIONS[family.pop("activation")],
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": spec.class_config["initializer_range"],
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "context_parallel_size": parallel.context,
        "sequence_parallel": parallel.sequence,
        "expert_model_parallel_size": parallel.expert if dims.experts else 1,
        "params_dtype": spec.dtype,
        "pipeline_dtype": spec.dtype,
        "bf16": spec.dtype == torch.bfloat16,
        "calculate_per_token_loss": True,
        "attention_softmax_in_fp32": True,
        **device_fields(runtime),
        **family,
    }
    if dims.experts:
        fields |= _moe_fields(spec, groups, runtime)
        require_whole_biases(fields)
    if fields.get("multi_latent_attention"):
        fields |= latent_fields(fields, runtime.transformer_engine)
    return fields


def device_fields(runtime: Runtime) -> dict[str, Any]:
    """Those that depend on the device and its kernels alone."""
    kernels = runtime.transformer_engine
    return {
        "use_cpu_initialization": runtime.device.type == "cpu",
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": kernels,
        "bias_dropout_fusion": kernels,
        "masked_softmax_fusion": kernels,
        "apply_rope_fusion": kernels,
        "batch_p2p_comm": runtime.backend == "nccl",
    }


def _moe_fields(spec: ModelSpec, groups: Groups, runtime: Runtime) -> dict[str, Any]:
    dims = spec.dims
    moe_layers = set(spec.moe_layers)
    return {
        "num_moe_experts": dims.experts,
        "moe_router_topk": dims.active,
        "moe_ffn_hidden_size": dims.expert_width,
        "moe_layer_freq": [int(layer in moe_layers) for layer in range(dims.layers)],
        "moe_shared_expert_intermediate_size": dims.shared_width or None,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": runtime.transformer_engine,
        "moe_permute_fusion": runtime.transformer_engine,
        "expert_tensor_parallel_size": groups.parallel.expert_tensor,
        **router_fields(spec.router, dims.experts, _has_correction(spec)),
    }


def _has_correction(spec: ModelSpec) -> bool:
    """Whether routers have a bias for the selection alone."""
    return any(name.endswith("e_score_correction_bias") for name in spec.stock.layer_shapes[max(spec.stock.moe)])


def recompute_fields(parallel: ParallelConfig, spec: ModelSpec) -> dict[str, Any]:
    """TransformerConfig fields of `parallel.recompute`. Selective means the FFN blocks, which keep most (attention is recomputed by its
    kernel anyway)."""
    if parallel.recompute == "none":
        return {}
    if parallel.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {"recompute_granularity": "selective", "recompute_modules": ["mlp", *(["moe"] if spec.dims.experts else [])]}


def require_division(spec: ModelSpec, parallel: ParallelConfig) -> None:
    """UserError when heads, widths, vocabulary or experts do not divide over their ranks.

    KV heads may be fewer than tensor-parallel ranks: Megatron-Core gathers the projection, and ranks that share a head have it each.
    """
    require_kv_heads(spec, parallel.tensor)
    dims = spec.dims
    of_layer = 0 if len(spec.moe_layers) == dims.layers else dims.dense_width
    wanted = {
        "num_attention_heads": ("tensor", dims.heads, parallel.tensor),
        "num_experts": ("expert", dims.experts, parallel.expert),
        "the FFN width": ("tensor", of_layer, parallel.tensor),
        "the shared experts' width": ("tensor", dims.shared_width, parallel.tensor),
        "the experts' width": ("tensor", dims.expert_width, parallel.expert_tensor),
        "the padded vocabulary": ("tensor", padded_vocabulary(dims.vocab_size), parallel.tensor),
    }
    for what, (name, size, parts) in wanted.items():
        if size % parts:
            raise UserError(f"parallel.{name}: {parts} with {what} = {size}", f"a divisor of {size}", f"choose another parallel.{name}")


def require_kv_heads(spec: ModelSpec, tensor: int) -> None:
    """UserError when KV heads are neither shared out nor shared evenly by tensor-parallel ranks."""
    heads, found = spec.dims.kv_heads, f"parallel.tensor: {tensor} with num_key_value_heads = {spec.dims.kv_heads}"
    if heads % tensor and tensor % heads:
        raise UserError(found, f"a divisor or a multiple of {heads}", "choose another parallel.tensor")
    if heads < tensor and any(rule.megatron.endswith(".k_layernorm.weight") and rule.split == 0 for rule in spec.family.attention):
        raise UserError(f"{found} and a norm over all heads", f"a divisor of {heads}", "choose a smaller parallel.tensor")


def require_sequence_for_experts(student: ModelSpec, parallel: ParallelConfig) -> None:
    """UserError for a MoE that is trained with tensor parallelism without `sequence`, which Megatron-Core's MoE layer refuses."""
    if student.dims.experts and parallel.tensor > 1 and not parallel.sequence:
        raise UserError(f"a MoE student with parallel.tensor {parallel.tensor}", "sequence parallelism", "set parallel.sequence=true")


def require_whole_biases(fields: Mapping[str, Any]) -> None:
    """UserError when experts with biases are split: Megatron-Core would add that of the second layer once on every rank with a part."""
    if fields["add_bias_linear"] and fields["expert_tensor_parallel_size"] > 1:
        raise UserError(
            f"parallel.tensor {fields['tensor_model_parallel_size']}, parallel.expert 1 with experts that have biases",
            "experts that are whole on a rank",
            "set parallel.expert above 1, so that experts are spread over the ranks instead of split",
        )
