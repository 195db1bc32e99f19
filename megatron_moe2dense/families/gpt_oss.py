"""GPT-OSS: clamped SwiGLU experts with biases, packed [inputs, outputs] in bfloat16 or as MXFP4 blocks, attention sinks.

No dense stock class has this FFN, so the dense result is GPT-OSS with one expert: the softmax over one logit is 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_moe2dense.families.dims import decoder_dims, first_of, without
from megatron_moe2dense.families.layout import FfnTensors, MoeTensors
from megatron_moe2dense.families.spec import ClampedSwiglu, Dims, FamilySpec, HfConfig, Router

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


def _dims(config: HfConfig) -> Dims:
    return dataclasses.replace(
        decoder_dims(config, norm_eps=1e-5, theta=150_000.0),
        dense_width=0,
        experts=first_of(config, "num_local_experts", "num_experts"),
        active=config["num_experts_per_tok"],
        expert_width=config["intermediate_size"],
    )


def _dense_config(config: HfConfig, width: int) -> dict[str, Any]:
    kept = without(config, "num_experts", "experts_per_token")
    return {**kept, "num_local_experts": 1, "num_experts_per_tok": 1, "intermediate_size": width}


GPT_OSS = FamilySpec(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    dims=_dims,
    ffn=_EXPERTS,
    moe=tuple(MoeTensors(_BLOCK, _ROUTER, experts, router_bias=_ROUTER_BIAS) for experts in (_EXPERTS, _MXFP4)),
    moe_layers=lambda config: tuple(range(config["num_hidden_layers"])),
    # The stock router takes the softmax over the selected logits: the same as renormalising the softmax over all.
    router=lambda _config: Router("softmax", renormalize=True),
    returns_scores=True,
    clamped_swiglu=lambda config: ClampedSwiglu(config.get("swiglu_alpha", 1.702), config.get("swiglu_limit", 7.0)),
    dense_target="gpt_oss",
    dense_config=_dense_config,
    added=lambda config: {_ROUTER: (1, config["hidden_size"]), _ROUTER_BIAS: (1,)},
)
