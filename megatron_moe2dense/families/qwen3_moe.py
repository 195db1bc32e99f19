"""Qwen3-MoE (Qwen3-30B-A3B and relatives): Qwen3 with softmax-routed experts, no shared expert."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_moe2dense.families.dims import decoder_dims, first_of
from megatron_moe2dense.families.layout import MoeTensors, fused, mlp
from megatron_moe2dense.families.megatron import expert_rules
from megatron_moe2dense.families.qwen2 import qwen_window_fields
from megatron_moe2dense.families.qwen3 import QWEN3_FFN, QWEN3_RULES, qwen3_megatron_config
from megatron_moe2dense.families.spec import Dims, FamilySpec, HfConfig, Router

_BLOCK = "model.layers.{layer}.mlp."
_ROUTER = _BLOCK + "gate.weight"
_EXPERTS = mlp(_BLOCK + "experts.{expert}.")
_MOE = (MoeTensors(_ROUTER, _EXPERTS), MoeTensors(_ROUTER, fused(_BLOCK + "experts.")))


def qwen_moe_dims(config: HfConfig) -> Dims:
    """Sizes of a Qwen2-MoE or Qwen3-MoE, without shared experts."""
    return dataclasses.replace(
        decoder_dims(config),
        experts=first_of(config, "num_experts", "num_local_experts"),
        active=config["num_experts_per_tok"],
        expert_width=config["moe_intermediate_size"],
    )


def _router(config: HfConfig) -> Router:
    return Router(score="softmax", renormalize=bool(config.get("norm_topk_prob", False)))


def sparse_layers(config: HfConfig) -> tuple[int, ...]:
    """The layers with experts, as Qwen's configs tell them."""
    step, dense = config.get("decoder_sparse_step", 1), set(config.get("mlp_only_layers") or ())
    return tuple(i for i in range(config["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0)


def _megatron_config(config: HfConfig) -> dict[str, Any]:
    return {**qwen3_megatron_config(config), **qwen_window_fields(config, [True] * config["num_hidden_layers"])}


QWEN3_MOE = FamilySpec(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    dims=qwen_moe_dims,
    ffn=QWEN3_FFN,
    megatron=(*QWEN3_RULES, *expert_rules(_MOE)),
    megatron_config=_megatron_config,
    moe=_MOE,
    moe_layers=sparse_layers,
    router=_router,
)
