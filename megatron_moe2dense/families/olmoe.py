"""OLMoE: QK norm over all heads together, softmax-routed experts, no shared expert."""

from __future__ import annotations

from typing import Any

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families.megatron import attention_rules, grouped_query_fields
from megatron_moe2dense.families.spec import FamilySpec, HfConfig, Router


def _megatron_config(config: HfConfig) -> dict[str, Any]:
    if config["clip_qkv"] is not None or config["attention_bias"]:
        raise UserError(
            f"config.json: clip_qkv {config['clip_qkv']}, attention_bias {config['attention_bias']}",
            "null and false, as published",
            "use a model without them",
        )
    return {**grouped_query_fields(config), "qk_norm_over_heads": True}


OLMOE = FamilySpec(
    "olmoe",
    attention_rules(qk_norm="heads"),
    _megatron_config,
    lambda config: Router("softmax", renormalize=bool(config["norm_topk_prob"])),
)
