"""DeepSeek-V2 and V3: multi-head latent attention and its YaRN; a softmax router that does not renormalise, or a sigmoid one with a
correction bias for the selection; limits to groups of experts."""

from __future__ import annotations

import math
from typing import Any

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families.megatron import ATTENTION, HF_ATTENTION, decoder_fields
from megatron_moe2dense.families.spec import FamilySpec, GroupLimit, HfConfig, Router, WeightRule


def _latent(name: str, down: str, norm: str, up: str) -> tuple[WeightRule, ...]:
    """Rows of the queries' or the keys' and values' latent. Down projections are on every tensor-parallel rank whole: their outputs are
    normed before they are split by heads."""
    up_rows, norm_rows = f"{ATTENTION}linear_{name}_up_proj.", f"{ATTENTION}{name}_layernorm.weight"
    return (
        WeightRule(f"{ATTENTION}linear_{name}_down_proj.weight", (f"{HF_ATTENTION}{down}.weight",)),
        WeightRule(norm_rows, (f"{HF_ATTENTION}{norm}.weight",), aliases=(f"{up_rows}layer_norm_weight",)),
        WeightRule(f"{up_rows}weight", (f"{HF_ATTENTION}{up}.weight",), split=0),
    )


_LATENT_ATTENTION = (
    WeightRule(ATTENTION + "linear_q_proj.weight", (HF_ATTENTION + "q_proj.weight",), split=0),
    *_latent("q", "q_a_proj", "q_a_layernorm", "q_b_proj"),
    *_latent("kv", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"),
    WeightRule(ATTENTION + "linear_proj.weight", (HF_ATTENTION + "o_proj.weight",), split=1),
)


def _megatron_config(config: HfConfig) -> dict[str, Any]:
    """UserError: projections with biases, rotary positions that are not interleaved, or scaled in a way other than YaRN's."""
    for name, wanted in (("attention_bias", False), ("mlp_bias", False), ("rope_interleave", True)):
        if config.get(name, wanted) != wanted:
            raise UserError(f"config.json: {name} {config[name]!r}", f"{wanted}, as published", "use another model")
    return {
        **decoder_fields(config),
        "qk_layernorm": True,
        "multi_latent_attention": True,
        "q_lora_rank": config["q_lora_rank"],
        "kv_lora_rank": config["kv_lora_rank"],
        "qk_head_dim": config["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
        "rotary_base": config["rope_parameters"]["rope_theta"],
        **_rope(config),
    }


def _rope(config: HfConfig) -> dict[str, Any]:
    rope = config["rope_parameters"]
    kind = rope["rope_type"]
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


def _router_of_v2(config: HfConfig) -> Router:
    method, scaling = config["topk_method"], config["routed_scaling_factor"]
    if method == "greedy":
        return Router("softmax", renormalize=False, scaling=scaling)  # the stock class does not read norm_topk_prob
    if method == "group_limited_greedy":
        limit = GroupLimit(config["n_group"], config["topk_group"], rank_by="best")
        return Router("softmax", renormalize=False, scaling=scaling, limit=limit)
    raise UserError(f"config.json: topk_method {method!r}", "greedy or group_limited_greedy", "use a model with one of these routers")


def _router_of_v3(config: HfConfig) -> Router:
    limit = GroupLimit(config["n_group"], config["topk_group"], rank_by="two_best")
    return Router("sigmoid", bool(config["norm_topk_prob"]), config["routed_scaling_factor"], limit)


DEEPSEEK_V2 = FamilySpec("deepseek_v2", _LATENT_ATTENTION, _megatron_config, _router_of_v2)
DEEPSEEK_V3 = FamilySpec("deepseek_v3", _LATENT_ATTENTION, _megatron_config, _router_of_v3)
