"""Qwen2 (dense): the dense target of Qwen2-MoE."""

from __future__ import annotations

from megatron_moe2dense.families.dims import decoder_dims
from megatron_moe2dense.families.layout import mlp
from megatron_moe2dense.families.spec import FamilySpec

QWEN2 = FamilySpec(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    dims=decoder_dims,
    ffn=mlp("model.layers.{layer}.mlp."),
)
