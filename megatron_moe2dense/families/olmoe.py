"""OLMoE: QK norm over all heads together, softmax-routed experts, no shared expert.

No dense stock class has this attention, so the dense result is OLMoE with one expert: the softmax over one logit is 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families.dims import decoder_dims, first_of
from megatron_moe2dense.families.layout import MoeTensors, fused, mlp
from megatron_moe2dense.families.megatron import TRUNK_RULES, attention_rules, decoder_fields, dense_rules, expert_rules
from megatron_moe2dense.families.spec import Dims, FamilySpec, HfConfig, Router

_BLOCK = "model.layers.{layer}.mlp."
_ROUTER = _BLOCK + "gate.weight"
_EXPERTS = mlp(_BLOCK + "experts.{expert}.")
_MOE = (MoeTensors(_ROUTER, _EXPERTS), MoeTensors(_ROUTER, fused(_BLOCK + "experts.")))


def _dims(config: HfConfig) -> Dims:
    return dataclasses.replace(
        decoder_dims(config, norm_eps=1e-5),
        dense_width=0,
        experts=first_of(config, "num_experts", "num_local_experts"),
        active=config["num_experts_per_tok"],
        expert_width=config["intermediate_size"],
    )


def _router(config: HfConfig) -> Router:
    return Router("softmax", renormalize=bool(config.get("norm_topk_prob", False)))


def _megatron_config(config: HfConfig) -> dict[str, Any]:
    if config.get("clip_qkv") is not None or config.get("attention_bias"):
        raise UserError(
            f"config.json: clip_qkv {config.get('clip_qkv')}, attention_bias {config.get('attention_bias', False)}",
            "null and false, as published",
            "use a model without them",
        )
    return {**decoder_fields(config), "qk_norm_over_heads": True}


OLMOE = FamilySpec(
    name="olmoe",
    architecture="OlmoeForCausalLM",
    dims=_dims,
    ffn=_EXPERTS,
    megatron=(
        *TRUNK_RULES,
        *attention_rules(qk_norm="heads"),
        *(rule for layout in _MOE for rule in dense_rules(layout.experts)),
        *expert_rules(_MOE),
    ),
    megatron_config=_megatron_config,
    moe=_MOE,
    moe_layers=lambda config: tuple(range(config["num_hidden_layers"])),
    router=_router,
    added=lambda config: {_ROUTER: (1, config["hidden_size"])},
)
