"""Mistral (dense): the dense target of Mixtral."""

from __future__ import annotations

from typing import Any

from megatron_moe2dense.families.axes import decoder_axes
from megatron_moe2dense.families.dims import decoder_dims
from megatron_moe2dense.families.layout import mlp
from megatron_moe2dense.families.megatron import TRUNK_RULES, attention_rules, decoder_fields, dense_rules, window_fields
from megatron_moe2dense.families.spec import FamilySpec, HfConfig

_FFN = mlp("model.layers.{layer}.mlp.")
_WINDOW = 4096  # of the stock class, where config.json does not say


def mistral_megatron_config(config: HfConfig, window: int | None = _WINDOW) -> dict[str, Any]:
    """TransformerConfig fields beyond the sizes. window: where config.json does not say."""
    every_layer = [True] * config["num_hidden_layers"]
    return {**decoder_fields(config), **window_fields(config.get("sliding_window", window), every_layer)}


MISTRAL = FamilySpec(
    name="mistral",
    architecture="MistralForCausalLM",
    dims=decoder_dims,
    ffn=_FFN,
    megatron=(*TRUNK_RULES, *attention_rules(), *dense_rules(_FFN)),
    megatron_config=mistral_megatron_config,
    axes=decoder_axes(_FFN),
)
