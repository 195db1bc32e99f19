"""Qwen2 and Qwen3, dense and MoE: biases of query, key and value, or a norm of each query and key head; softmax-routed experts, in
Qwen2-MoE beside a shared expert with a sigmoid gate of its own.

A dense FFN has no gate per token: that shared expert gets the constant of docs/method.md#groups-merging-scaling instead.
"""

from __future__ import annotations

from typing import Any

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families.axes import decoder_axes
from megatron_moe2dense.families.megatron import attention_rules, grouped_query_fields, window_fields
from megatron_moe2dense.families.spec import FamilySpec, HfConfig, Router


def _qwen2(config: HfConfig) -> dict[str, Any]:
    return {**grouped_query_fields(config), **window_fields(config), "add_qkv_bias": config.get("qkv_bias", True)}


def _qwen2_moe(config: HfConfig) -> dict[str, Any]:
    return {**_qwen2(config), "moe_shared_expert_gate": True}


def _qwen3(config: HfConfig) -> dict[str, Any]:
    """UserError for attention with biases."""
    if config.get("attention_bias"):
        raise UserError("config.json: attention_bias true", "false, as published", "use a model without them")
    return {**grouped_query_fields(config), **window_fields(config), "qk_layernorm": True}


def _router(config: HfConfig) -> Router:
    return Router("softmax", renormalize=bool(config["norm_topk_prob"]))


QWEN2 = FamilySpec("qwen2", attention_rules(), _qwen2, axes=decoder_axes(biases="qkv"))
QWEN2_MOE = FamilySpec("qwen2_moe", attention_rules(), _qwen2_moe, _router)
QWEN3 = FamilySpec("qwen3", attention_rules(qk_norm="head"), _qwen3, axes=decoder_axes(biases="qkvo", qk_norm=True))
QWEN3_MOE = FamilySpec("qwen3_moe", attention_rules(qk_norm="head"), _qwen3, _router)
