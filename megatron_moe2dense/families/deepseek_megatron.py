"""DeepSeek-V2 and V3 in Megatron-Core: weight names, and the TransformerConfig fields of latent attention and its YaRN."""

from __future__ import annotations

import math
from typing import Any

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families.deepseek import BLOCK, FFN, layouts
from megatron_moe2dense.families.dims import rope_theta
from megatron_moe2dense.families.megatron import TRUNK_RULES, dense_rules, expert_rules, shared_expert_rules
from megatron_moe2dense.families.spec import HfConfig, WeightRule

_HF = "model.layers.{layer}."
_LAYER = "decoder.layers.{layer}."
_ATTENTION = _LAYER + "self_attention."

# Down projections are on every tensor-parallel rank whole: their outputs, the latents, are normed before they are split by heads.
_ATTENTION_RULES = (
    WeightRule(_ATTENTION + "linear_q_proj.weight", (_HF + "self_attn.q_proj.weight",), split=0),
    WeightRule(_ATTENTION + "linear_q_down_proj.weight", (_HF + "self_attn.q_a_proj.weight",)),
    WeightRule(
        _ATTENTION + "q_layernorm.weight",
        (_HF + "self_attn.q_a_layernorm.weight",),
        aliases=(_ATTENTION + "linear_q_up_proj.layer_norm_weight",),
    ),
    WeightRule(_ATTENTION + "linear_q_up_proj.weight", (_HF + "self_attn.q_b_proj.weight",), split=0),
    WeightRule(_ATTENTION + "linear_kv_down_proj.weight", (_HF + "self_attn.kv_a_proj_with_mqa.weight",)),
    WeightRule(
        _ATTENTION + "kv_layernorm.weight",
        (_HF + "self_attn.kv_a_layernorm.weight",),
        aliases=(_ATTENTION + "linear_kv_up_proj.layer_norm_weight",),
    ),
    WeightRule(_ATTENTION + "linear_kv_up_proj.weight", (_HF + "self_attn.kv_b_proj.weight",), split=0),
    WeightRule(_ATTENTION + "linear_proj.weight", (_HF + "self_attn.o_proj.weight",), split=1),
)


MEGATRON = (
    *TRUNK_RULES,
    *_ATTENTION_RULES,
    *dense_rules(FFN),
    *expert_rules(layouts()),
    *shared_expert_rules(layouts()[0]),
)
CORRECTION = WeightRule(_LAYER + "mlp.router.expert_bias", (BLOCK + "gate.e_score_correction_bias",))


def megatron_config(config: HfConfig) -> dict[str, Any]:
    """TransformerConfig fields beyond the sizes.

    Raises:
        UserError: projections with biases, rotary positions that are not interleaved, or scaled in a way other than YaRN's.
    """
    for name, wanted in (("attention_bias", False), ("mlp_bias", False), ("rope_interleave", True)):
        if config.get(name, wanted) != wanted:
            raise UserError(f"config.json: {name} {config[name]!r}", f"{wanted}, as published", "use another model")
    return {
        "normalization": "RMSNorm",
        "activation": config.get("hidden_act", "silu"),
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "qk_layernorm": True,
        "multi_latent_attention": True,
        "q_lora_rank": config["q_lora_rank"],
        "kv_lora_rank": config["kv_lora_rank"],
        "qk_head_dim": config["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
        "rotary_base": rope_theta(config),
        **_rope(config),
    }


def _rope(config: HfConfig) -> dict[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return {"rope_type": "rope"}
    if kind != "yarn" or rope.get("truncate") is False:
        found = f"config.json: rope_type {kind!r}" + (" without truncate" if kind == "yarn" else "")
        raise UserError(found, "default or yarn, with truncate", "use another model")
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or config["max_position_embeddings"] / original
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    # The stock factor of cosines and sines; Megatron's is _yarn(factor, its mscale) / _yarn(factor, its mscale_all_dim).
    stock = rope.get("attention_factor")
    if stock is None:
        stock = _yarn(factor, mscale) / _yarn(factor, all_dim) if mscale and all_dim else _yarn(factor, 1.0)
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": float(factor),
        "original_max_position_embeddings": original,
        "beta_fast": float(rope.get("beta_fast") or 32),
        "beta_slow": float(rope.get("beta_slow") or 1),
        "mscale": (stock * _yarn(factor, all_dim or 0.0) - 1.0) / (0.1 * math.log(factor)) if factor > 1 else 1.0,
        "mscale_all_dim": float(all_dim or 0.0),  # of the softmax scale, squared, in both
    }


def _yarn(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
