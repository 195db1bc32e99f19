"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): softmax-routed experts beside a shared expert with a sigmoid gate of its own.

A dense FFN has no gate per token: the shared expert gets the constant of docs/method.md#groups-merging-scaling instead.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_moe2dense.families.layout import MoeTensors, fused, mlp
from megatron_moe2dense.families.megatron import decoder_fields, expert_rules, shared_expert_rules
from megatron_moe2dense.families.qwen2 import QWEN2, QWEN2_RULES, qwen_window_fields
from megatron_moe2dense.families.qwen3_moe import qwen_moe_dims, sparse_layers
from megatron_moe2dense.families.spec import Dims, FamilySpec, HfConfig, Router

_BLOCK = "model.layers.{layer}.mlp."


def _dims(config: HfConfig) -> Dims:
    return dataclasses.replace(qwen_moe_dims(config), shared_width=config["shared_expert_intermediate_size"])


def _router(config: HfConfig) -> Router:
    return Router("softmax", renormalize=bool(config.get("norm_topk_prob", False)))


def _sliding_layers(config: HfConfig) -> list[bool]:
    """By layer, with `use_sliding_window` and without `layer_types`: every other one of the first."""
    last = config.get("max_window_layers", 28)
    return [layer % 2 == 0 and layer < last for layer in range(config["num_hidden_layers"])]


def _layout(stacked: bool) -> MoeTensors:
    experts = fused(_BLOCK + "experts.") if stacked else mlp(_BLOCK + "experts.{expert}.")
    shared, gate = mlp(_BLOCK + "shared_expert."), _BLOCK + "shared_expert_gate.weight"
    return MoeTensors(_BLOCK + "gate.weight", experts, shared=shared, shared_gate=gate)


_MOE = (_layout(stacked=False), _layout(stacked=True))


def _megatron_config(config: HfConfig) -> dict[str, Any]:
    return {
        **decoder_fields(config),
        "add_qkv_bias": config.get("qkv_bias", True),
        "moe_shared_expert_gate": True,
        **qwen_window_fields(config, _sliding_layers(config)),
    }


QWEN2_MOE = FamilySpec(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    dims=_dims,
    ffn=QWEN2.ffn,
    megatron=(*QWEN2_RULES, *shared_expert_rules(_MOE[0]), *expert_rules(_MOE)),
    megatron_config=_megatron_config,
    moe=_MOE,
    moe_layers=sparse_layers,
    router=_router,
)
