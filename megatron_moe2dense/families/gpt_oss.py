"""GPT-OSS: clamped SwiGLU experts with biases, attention sinks, sliding windows in every other layer."""

from __future__ import annotations

from typing import Any

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families.megatron import attention_rules, grouped_query_fields, window_fields
from megatron_moe2dense.families.spec import FamilySpec, HfConfig, Router

_QUICK_GELU = 1.702  # Megatron-Core's only slope of x * sigmoid(slope * x)


def _megatron_config(config: HfConfig) -> dict[str, Any]:
    alpha = config["swiglu_alpha"]
    if alpha != _QUICK_GELU or not config["attention_bias"]:
        raise UserError(
            f"config.json: swiglu_alpha {alpha}, attention_bias {config['attention_bias']}",
            f"swiglu_alpha {_QUICK_GELU} and attention_bias true, as published",
            "use a model with these",
        )
    return {
        **grouped_query_fields(config),
        **window_fields(config),
        "activation": "quick_gelu",
        "glu_linear_offset": 1.0,
        "activation_func_clamp_value": config["swiglu_limit"],
        "add_bias_linear": True,
        "softmax_type": "learnable",
        "cp_comm_type": "a2a",
        # Megatron's fused kernels take no bias of experts, and no clamp without a weight per token.
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
    }


GPT_OSS = FamilySpec(
    "gpt_oss",
    attention_rules(output_bias=True, sinks=True),
    _megatron_config,
    # The stock router takes the softmax over the selected logits: the same as renormalising the softmax over all.
    lambda _config: Router("softmax", renormalize=True),
)
