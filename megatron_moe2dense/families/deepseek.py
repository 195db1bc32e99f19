"""What DeepSeek-V2 and V3 share: multi-head latent attention, dense first layers, shared experts. Their dense result is the family
itself with `first_k_dense_replace` = all layers."""

from __future__ import annotations

import dataclasses

from megatron_moe2dense.families.dims import decoder_dims, first_of
from megatron_moe2dense.families.layout import MoeTensors, fused, mlp
from megatron_moe2dense.families.spec import Dims, HfConfig

BLOCK = "model.layers.{layer}.mlp."
FFN = mlp(BLOCK)


def layouts(correction: str | None = None) -> tuple[MoeTensors, ...]:
    """The block with a tensor for each expert, as published, and with all of them in one. correction: the router's, if any."""
    experts = (mlp(BLOCK + "experts.{expert}."), fused(BLOCK + "experts."))
    shared = mlp(BLOCK + "shared_experts.")
    return tuple(MoeTensors(BLOCK + "gate.weight", each, correction=correction, shared=shared) for each in experts)


def moe_layers(config: HfConfig) -> tuple[int, ...]:
    """All but the first dense ones."""
    return tuple(range(config.get("first_k_dense_replace", 0), config["num_hidden_layers"]))


def dims(config: HfConfig) -> Dims:
    """Sizes; head_dim is that of queries and keys, with and without rotary positions together."""
    head_dim = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    dense = dataclasses.replace(decoder_dims(config), head_dim=head_dim)
    if not moe_layers(config):
        return dense
    width = config["moe_intermediate_size"]
    return dataclasses.replace(
        dense,
        experts=first_of(config, "n_routed_experts", "num_experts", "num_local_experts"),
        active=config["num_experts_per_tok"],
        expert_width=width,
        shared_width=config["n_shared_experts"] * width,
    )
