"""GPT-OSS: clamped SwiGLU experts with biases, packed [inputs, outputs] in bfloat16 or as MXFP4 blocks, attention sinks.

No dense stock class has this FFN, so the dense result is GPT-OSS with one expert: the softmax over one logit is 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families.dims import decoder_dims, first_of
from megatron_moe2dense.families.layout import FfnTensors, MoeTensors
from megatron_moe2dense.families.megatron import (
    TRUNK_RULES,
    attention_rules,
    decoder_fields,
    dense_rules,
    expert_rules,
    sliding_layers,
    window_fields,
)
from megatron_moe2dense.families.spec import Dims, FamilySpec, HfConfig, Router

_BLOCK = "model.layers.{layer}.mlp."
_ROUTER, _ROUTER_BIAS = _BLOCK + "router.weight", _BLOCK + "router.bias"
_EXPERTS = FfnTensors(
    gate_up=(_BLOCK + "experts.gate_up_proj",),
    down=_BLOCK + "experts.down_proj",
    gate_up_bias=_BLOCK + "experts.gate_up_proj_bias",
    down_bias=_BLOCK + "experts.down_proj_bias",
    stacked=True,
    transposed=True,
    interleaved=True,
)
_MXFP4 = dataclasses.replace(_EXPERTS, transposed=False, mxfp4=True)
_MOE = tuple(MoeTensors(_ROUTER, experts, router_bias=_ROUTER_BIAS) for experts in (_EXPERTS, _MXFP4))
# What the stock class takes where config.json does not say.
_ROPE = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
_WINDOW = 128
_QUICK_GELU = 1.702  # Megatron-Core's only slope of x * sigmoid(slope * x)


def _dims(config: HfConfig) -> Dims:
    return dataclasses.replace(
        decoder_dims(config, norm_eps=1e-5, theta=150_000.0),
        dense_width=0,
        experts=first_of(config, "num_local_experts", "num_experts"),
        active=config["num_experts_per_tok"],
        expert_width=config["intermediate_size"],
    )


def _megatron_config(config: HfConfig) -> dict[str, Any]:
    alpha = config.get("swiglu_alpha", _QUICK_GELU)
    if alpha != _QUICK_GELU or not config.get("attention_bias", True):
        raise UserError(
            f"config.json: swiglu_alpha {alpha}, attention_bias {config.get('attention_bias', True)}",
            f"swiglu_alpha {_QUICK_GELU} and attention_bias true, as published",
            "use a model with these",
        )
    has_rope = config.get("rope_parameters") or config.get("rope_scaling")
    alternate = [layer % 2 == 0 for layer in range(config["num_hidden_layers"])]
    return {
        **decoder_fields(config if has_rope else {**config, "rope_parameters": _ROPE}),
        "activation": "quick_gelu",
        "glu_linear_offset": 1.0,
        "activation_func_clamp_value": config.get("swiglu_limit", 7.0),
        "add_bias_linear": True,
        "softmax_type": "learnable",
        "cp_comm_type": "a2a",
        **window_fields(config.get("sliding_window", _WINDOW), sliding_layers(config, alternate)),
        # Megatron's fused kernels take no bias of experts, and no clamp without a weight per token.
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
    }


GPT_OSS = FamilySpec(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    dims=_dims,
    ffn=_EXPERTS,
    megatron=(
        *TRUNK_RULES,
        *attention_rules(output_bias=True, sinks=True),
        *dense_rules(_EXPERTS),
        *expert_rules(_MOE),
    ),
    megatron_config=_megatron_config,
    moe=_MOE,
    moe_layers=lambda config: tuple(range(config["num_hidden_layers"])),
    # The stock router takes the softmax over the selected logits: the same as renormalising the softmax over all.
    router=lambda _config: Router("softmax", renormalize=True),
    added=lambda config: {_ROUTER: (1, config["hidden_size"]), _ROUTER_BIAS: (1,)},
)
