"""Mistral (dense): the dense target of Mixtral."""

from __future__ import annotations

from megatron_moe2dense.families.dims import decoder_dims
from megatron_moe2dense.families.layout import mlp
from megatron_moe2dense.families.spec import FamilySpec

MISTRAL = FamilySpec(
    name="mistral",
    architecture="MistralForCausalLM",
    dims=decoder_dims,
    ffn=mlp("model.layers.{layer}.mlp."),
)
