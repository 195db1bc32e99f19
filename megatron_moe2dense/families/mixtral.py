"""Mixtral: Mistral with softmax-routed experts, renormalised."""

from __future__ import annotations

import dataclasses

from megatron_moe2dense.families.dims import decoder_dims, first_of
from megatron_moe2dense.families.layout import MoeTensors, fused, mlp
from megatron_moe2dense.families.megatron import TRUNK_RULES, attention_rules, expert_rules
from megatron_moe2dense.families.mistral import MISTRAL, mistral_megatron_config
from megatron_moe2dense.families.spec import Dims, FamilySpec, HfConfig, Router

_NORM_EPS, _THETA = 1e-5, 1e6  # where config.json does not say
_PUBLISHED = "model.layers.{layer}.block_sparse_moe."
_IN_MEMORY = "model.layers.{layer}.mlp."
_MOE = (
    MoeTensors(_PUBLISHED + "gate.weight", mlp(_PUBLISHED + "experts.{expert}.", ("w1", "w3", "w2"))),
    MoeTensors(_IN_MEMORY + "gate.weight", fused(_IN_MEMORY + "experts.")),
)


def _dims(config: HfConfig) -> Dims:
    return dataclasses.replace(
        decoder_dims(config, _NORM_EPS, _THETA),
        dense_width=0,
        experts=first_of(config, "num_local_experts", "num_experts"),
        active=config["num_experts_per_tok"],
        expert_width=config["intermediate_size"],
    )


MIXTRAL = FamilySpec(
    name="mixtral",
    architecture="MixtralForCausalLM",
    dims=_dims,
    ffn=MISTRAL.ffn,
    megatron=(*TRUNK_RULES, *attention_rules(), *expert_rules(_MOE)),
    megatron_config=lambda config: mistral_megatron_config(config, window=None),
    moe=_MOE,
    moe_layers=lambda config: tuple(range(config["num_hidden_layers"])),
    router=lambda _config: Router("softmax", renormalize=True),
)
