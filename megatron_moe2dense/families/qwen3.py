"""Qwen3 (dense): RMSNorm, grouped-query attention with QK norm, gated SiLU FFN. The dense target of Qwen3-MoE."""

from __future__ import annotations

from typing import Any

from megatron_moe2dense.families.layout import mlp
from megatron_moe2dense.families.spec import Dims, FamilySpec, HfConfig, MegatronRule

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


def rope_theta(config: HfConfig) -> float:
    """The rotary base; transformers 5 moved it from `rope_theta` to `rope_parameters`."""
    return float((config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta") or 10_000.0)


def qwen3_dims(config: HfConfig) -> Dims:
    """Sizes of a dense Qwen3."""
    heads = config["num_attention_heads"]
    return Dims(
        hidden_size=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        tied_embeddings=config.get("tie_word_embeddings", False),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=rope_theta(config),
        dense_width=config.get("intermediate_size", 0),
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
    dims=qwen3_dims,
    ffn=QWEN3_FFN,
    megatron=(*QWEN3_TRUNK, *QWEN3_FFN_RULES),
    megatron_config=qwen3_megatron_config,
)
