"""Qwen2 (dense): biases of query, key and value. The dense target of Qwen2-MoE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_moe2dense.families.axes import decoder_axes
from megatron_moe2dense.families.dims import decoder_dims
from megatron_moe2dense.families.layout import mlp
from megatron_moe2dense.families.megatron import TRUNK_RULES, attention_rules, decoder_fields, dense_rules, sliding_layers, window_fields
from megatron_moe2dense.families.spec import FamilySpec, HfConfig

QWEN2_FFN = mlp("model.layers.{layer}.mlp.")
# All of a dense model: the same in Qwen2 and Qwen2-MoE.
QWEN2_RULES = (*TRUNK_RULES, *attention_rules(), *dense_rules(QWEN2_FFN))
_WINDOW, _FULL_LAYERS = 4096, 28  # of the stock classes, where config.json does not say


def qwen_window_fields(config: HfConfig, slides: Sequence[bool]) -> dict[str, Any]:
    """Fields of sliding windows in the Qwen families. slides: the layers that have one where config.json does not list them."""
    if not config.get("use_sliding_window"):
        return {}
    return window_fields(config.get("sliding_window", _WINDOW), sliding_layers(config, slides))


def late_layers(config: HfConfig) -> list[bool]:
    """By layer: whether a dense Qwen with `use_sliding_window` slides in it."""
    return [layer >= config.get("max_window_layers", _FULL_LAYERS) for layer in range(config["num_hidden_layers"])]


QWEN2 = FamilySpec(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    dims=decoder_dims,
    ffn=QWEN2_FFN,
    megatron=QWEN2_RULES,
    megatron_config=lambda config: {
        **decoder_fields(config),
        "add_qkv_bias": True,
        **qwen_window_fields(config, late_layers(config)),
    },
    axes=decoder_axes(QWEN2_FFN, biases="qkv"),
)
