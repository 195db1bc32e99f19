"""Qwen3 (dense): RMSNorm, grouped-query attention with QK norm, gated SiLU FFN. The dense target of Qwen3-MoE."""

from __future__ import annotations

from typing import Any

from megatron_moe2dense.families.dims import decoder_dims
from megatron_moe2dense.families.layout import mlp
from megatron_moe2dense.families.spec import FamilySpec, HfConfig, MegatronRule

_HF = "model.layers.{layer}."
_MEGATRON = "decoder.layers.{layer}."

QWEN3_FFN = mlp(_HF + "mlp.")

# Everything but the FFN: the same in Qwen3 and Qwen3-MoE.
QWEN3_TRUNK = (
    MegatronRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), kind="vocab", split=0),
    MegatronRule("output_layer.weight", ("lm_head.weight",), kind="vocab", split=0),
    MegatronRule("decoder.final_layernorm.weight", ("model.norm.weight",)),
    MegatronRule(
        _MEGATRON + "input_layernorm.weight",
        (_HF + "input_layernorm.weight",),
        aliases=(_MEGATRON + "self_attention.linear_qkv.layer_norm_weight",),
    ),
    MegatronRule(
        _MEGATRON + "self_attention.linear_qkv.weight",
        (_HF + "self_attn.q_proj.weight", _HF + "self_attn.k_proj.weight", _HF + "self_attn.v_proj.weight"),
        kind="qkv",
        split=0,
    ),
    MegatronRule(_MEGATRON + "self_attention.linear_proj.weight", (_HF + "self_attn.o_proj.weight",), split=1),
    MegatronRule(_MEGATRON + "self_attention.q_layernorm.weight", (_HF + "self_attn.q_norm.weight",)),
    MegatronRule(_MEGATRON + "self_attention.k_layernorm.weight", (_HF + "self_attn.k_norm.weight",)),
    MegatronRule(
        _MEGATRON + "pre_mlp_layernorm.weight",
        (_HF + "post_attention_layernorm.weight",),
        aliases=(_MEGATRON + "mlp.linear_fc1.layer_norm_weight",),
    ),
)


QWEN3_FFN_RULES = (
    MegatronRule(_MEGATRON + "mlp.linear_fc1.weight", QWEN3_FFN.gate_up, kind="gate_up", split=0),
    MegatronRule(_MEGATRON + "mlp.linear_fc2.weight", (QWEN3_FFN.down,), split=1),
)


def qwen3_megatron_config(config: HfConfig) -> dict[str, Any]:
    """TransformerConfig fields beyond the sizes."""
    return {
        "normalization": "RMSNorm",
        "activation": "silu",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": config.get("attention_bias", False),
        "qk_layernorm": True,
    }


QWEN3 = FamilySpec(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    dims=decoder_dims,
    ffn=QWEN3_FFN,
    megatron=(*QWEN3_TRUNK, *QWEN3_FFN_RULES),
    megatron_config=qwen3_megatron_config,
)
