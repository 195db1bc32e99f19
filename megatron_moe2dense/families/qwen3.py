"""Qwen3 (dense): RMSNorm, grouped-query attention with QK norm, gated SiLU FFN. The dense target of Qwen3-MoE."""

from __future__ import annotations

from typing import Any

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families.axes import decoder_axes
from megatron_moe2dense.families.dims import decoder_dims
from megatron_moe2dense.families.layout import mlp
from megatron_moe2dense.families.megatron import TRUNK_RULES, attention_rules, decoder_fields, dense_rules
from megatron_moe2dense.families.qwen2 import late_layers, qwen_window_fields
from megatron_moe2dense.families.spec import FamilySpec, HfConfig

QWEN3_FFN = mlp("model.layers.{layer}.mlp.")
# All of a dense model: the same in Qwen3 and Qwen3-MoE.
QWEN3_RULES = (*TRUNK_RULES, *attention_rules(qk_norm="head"), *dense_rules(QWEN3_FFN))


def qwen3_megatron_config(config: HfConfig) -> dict[str, Any]:
    """TransformerConfig fields beyond the sizes, without sliding windows. UserError for attention with biases."""
    if config.get("attention_bias"):
        raise UserError("config.json: attention_bias true", "false, as published", "use a model without them")
    return {**decoder_fields(config), "qk_layernorm": True}


QWEN3 = FamilySpec(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    dims=decoder_dims,
    ffn=QWEN3_FFN,
    megatron=QWEN3_RULES,
    megatron_config=lambda config: {**qwen3_megatron_config(config), **qwen_window_fields(config, late_layers(config))},
    axes=decoder_axes(QWEN3_FFN, biases="qkvo", qk_norm=True),
)
