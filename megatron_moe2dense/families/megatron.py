"""What the families' tables for Megatron-Core share: name rows of a decoder, its FFNs and experts, and TransformerConfig fields."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families.layout import FfnTensors, MoeTensors, Packing
from megatron_moe2dense.families.spec import HfConfig, WeightRule

_HF, _HF_ATTENTION = "model.layers.{layer}.", "model.layers.{layer}.self_attn."
_LAYER = "decoder.layers.{layer}."
_ATTENTION, _MLP = _LAYER + "self_attention.", _LAYER + "mlp."
_QKV_WEIGHTS, _QKV_BIASES = (tuple(f"{_HF_ATTENTION}{name}_proj.{part}" for name in "qkv") for part in ("weight", "bias"))
_NORM_OF_FC1 = (_MLP + "linear_fc1.layer_norm_weight",)

# Embedding, LM head and norms: the same in every family. Transformer Engine keeps a norm in the linear layer behind it.
TRUNK_RULES = (
    WeightRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), kind="vocab", split=0),
    WeightRule("output_layer.weight", ("lm_head.weight",), kind="vocab", split=0),
    WeightRule("decoder.final_layernorm.weight", ("model.norm.weight",)),
    WeightRule(
        _LAYER + "input_layernorm.weight",
        (_HF + "input_layernorm.weight",),
        aliases=(_ATTENTION + "linear_qkv.layer_norm_weight",),
    ),
    WeightRule(_LAYER + "pre_mlp_layernorm.weight", (_HF + "post_attention_layernorm.weight",), aliases=_NORM_OF_FC1),
)


def attention_rules(
    qk_norm: Literal["none", "head", "heads"] = "none", output_bias: bool = False, sinks: bool = False
) -> tuple[WeightRule, ...]:
    """Grouped-query attention. The rows of query, key and value biases are always there: a model without them never asks.

    Args:
        qk_norm: a norm of each query and key head, or of all heads together. sinks: a logit a head that no token belongs to.
    """
    rules = [
        WeightRule(_ATTENTION + "linear_qkv.weight", _QKV_WEIGHTS, kind="qkv", split=0),
        WeightRule(_ATTENTION + "linear_qkv.bias", _QKV_BIASES, kind="qkv", split=0),
        WeightRule(_ATTENTION + "linear_proj.weight", (_HF_ATTENTION + "o_proj.weight",), split=1),
    ]
    if output_bias:
        rules.append(WeightRule(_ATTENTION + "linear_proj.bias", (_HF_ATTENTION + "o_proj.bias",)))
    if qk_norm != "none":
        split = 0 if qk_norm == "heads" else None
        rules += [WeightRule(f"{_ATTENTION}{name}_layernorm.weight", (f"{_HF_ATTENTION}{name}_norm.weight",), split=split) for name in "qk"]
    if sinks:
        rules.append(WeightRule(_ATTENTION + "core_attention.softmax_offset", (_HF_ATTENTION + "sinks",), split=0))
    return tuple(rules)


def dense_rules(layout: FfnTensors) -> tuple[WeightRule, ...]:
    """The FFN of layers without experts."""
    return tuple(_ffn_rules(layout, _MLP + "linear_fc{number}.{part}"))


def expert_rules(layouts: Sequence[MoeTensors]) -> tuple[WeightRule, ...]:
    """Router and experts, in every layout found on disk."""
    rules: list[WeightRule] = []
    for layout in layouts:
        rules.append(WeightRule(_MLP + "router.weight", (layout.router,)))
        if layout.router_bias is not None:
            rules.append(WeightRule(_MLP + "router.bias", (layout.router_bias,)))
        local = _MLP + "experts.local_experts.{expert}.linear_fc{number}.{part}"
        rules += _ffn_rules(layout.experts, local, _MLP + "experts.linear_fc{number}.{part}{expert}")
    return tuple(dict.fromkeys(rules))  # what layouts share stands once


def shared_expert_rules(layout: MoeTensors) -> tuple[WeightRule, ...]:
    """The shared experts and their gate."""
    assert layout.shared is not None, "the family has shared experts"
    rules = list(_ffn_rules(layout.shared, _MLP + "shared_experts.linear_fc{number}.{part}"))
    if layout.shared_gate is not None:
        rules.append(WeightRule(_MLP + "shared_experts.gate_weight", (layout.shared_gate,)))
    return tuple(rules)


def _ffn_rules(layout: FfnTensors, *names: str) -> Iterator[WeightRule]:
    """names: of the Megatron parameters, with {number} and {part}; the first is the local spec's, the others are aliases."""

    def rule(number: int, part: str, hf: tuple[str, ...], packing: Packing) -> WeightRule:
        own, *aliases = (name.replace("{number}", str(number)).replace("{part}", part) for name in names)
        # The bias of the second layer is added once, to the sum over the ranks.
        split = 0 if number == 1 else 1 if part == "weight" else None
        return WeightRule(own, hf, "gate_up" if number == 1 else "plain", split, tuple(aliases), packing)

    yield rule(1, "weight", layout.stored(*layout.gate_up), layout.packing)
    yield rule(2, "weight", layout.stored(layout.down), layout.packing)
    of_biases = Packing(stacked=layout.stacked, interleaved=layout.interleaved)
    if layout.gate_up_bias is not None:
        yield rule(1, "bias", (layout.gate_up_bias,), of_biases)
    if layout.down_bias is not None:
        yield rule(2, "bias", (layout.down_bias,), of_biases)


def decoder_fields(config: HfConfig) -> dict[str, Any]:
    """TransformerConfig fields of a decoder with RMSNorm, gated FFNs and rotary positions, without biases.

    Raises:
        UserError: positions other than plain rotary or YaRN.
    """
    return {
        "normalization": "RMSNorm",
        "activation": config.get("hidden_act", "silu"),
        "gated_linear_unit": True,
        "add_bias_linear": False,
        **rope_fields(config),
    }


def rope_fields(config: HfConfig) -> dict[str, Any]:
    """Fields of YaRN (https://arxiv.org/abs/2309.00071), none for plain rotary positions; UserError for another kind."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {}
    if kind != "yarn" or rope.get("attention_factor") is not None or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"config.json: rotary positions {dict(rope)}",
            "rope_type default, or yarn without attention_factor",
            "use a model with one of these",
        )
    factor = rope.get("factor") or config["max_position_embeddings"] / rope["original_max_position_embeddings"]
    both = rope.get("mscale") and rope.get("mscale_all_dim")
    return {
        "apply_rope_fusion": False,  # the fused rotation has no factor for cosines and sines
        "yarn_rotary_scaling_factor": float(factor),
        "yarn_original_max_position_embeddings": rope.get("original_max_position_embeddings") or config["max_position_embeddings"],
        "yarn_beta_fast": float(rope.get("beta_fast") or 32),
        "yarn_beta_slow": float(rope.get("beta_slow") or 1),
        "yarn_mscale": rope["mscale"] if both else None,
        "yarn_mscale_all_dim": rope["mscale_all_dim"] if both else None,
        "yarn_correction_range_round_to_int": rope.get("truncate", True),
    }


def window_fields(window: int | None, slides: Sequence[bool]) -> dict[str, Any]:
    """Fields of sliding-window attention. window: keys a query sees, itself included. slides: which layers have it.

    Of Transformer Engine's kinds of context parallelism, all-to-all over heads alone knows windows (and sinks).
    """
    if not window or not any(slides):
        return {}
    return {"window_size": (window - 1, 0), "window_attn_skip_freq": [int(each) for each in slides], "cp_comm_type": "a2a"}


def sliding_layers(config: HfConfig, default: Sequence[bool]) -> list[bool]:
    """By layer, from `layer_types`, or the family's default without them."""
    types = config.get("layer_types")
    return [kind == "sliding_attention" for kind in types] if types else list(default)
