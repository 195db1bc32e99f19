"""What families have in common in Megatron-Core: name rows of a decoder, its FFNs and experts, and TransformerConfig fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families.spec import FfnPart, HfConfig, WeightRule

_HF, HF_ATTENTION = "model.layers.{layer}.", "model.layers.{layer}.self_attn."
_LAYER = "decoder.layers.{layer}."
ATTENTION, _MLP = _LAYER + "self_attention.", _LAYER + "mlp."
_QKV_WEIGHTS, _QKV_BIASES = (tuple(f"{HF_ATTENTION}{name}_proj.{part}" for name in "qkv") for part in ("weight", "bias"))
_NORM_OF_FC1 = (_MLP + "linear_fc1.layer_norm_weight",)

# Embedding, LM head and norms. Transformer Engine keeps a norm in the linear layer behind it.
_TRUNK = (
    WeightRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), kind="vocab", split=0),
    WeightRule("output_layer.weight", ("lm_head.weight",), kind="vocab", split=0),
    WeightRule("decoder.final_layernorm.weight", ("model.norm.weight",)),
    WeightRule(
        _LAYER + "input_layernorm.weight",
        (_HF + "input_layernorm.weight",),
        aliases=(ATTENTION + "linear_qkv.layer_norm_weight",),
    ),
    WeightRule(_LAYER + "pre_mlp_layernorm.weight", (_HF + "post_attention_layernorm.weight",), aliases=_NORM_OF_FC1),
)
_ROUTER = (
    WeightRule(_MLP + "router.weight", (_HF + "{router}.weight",)),
    WeightRule(_MLP + "router.bias", (_HF + "{router}.bias",)),
    WeightRule(_MLP + "router.expert_bias", (_HF + "{router}.e_score_correction_bias",)),
    WeightRule(_MLP + "shared_experts.gate_weight", (_HF + "{shared_gate}",)),
)


def attention_rules(
    qk_norm: Literal["none", "head", "heads"] = "none", output_bias: bool = False, sinks: bool = False
) -> tuple[WeightRule, ...]:
    """Grouped-query attention.

    Args:
        qk_norm: a norm of each query and key head, or of all heads together. sinks: a logit a head that no token belongs to.
    """
    rules = [
        WeightRule(ATTENTION + "linear_qkv.weight", _QKV_WEIGHTS, kind="qkv", split=0),
        WeightRule(ATTENTION + "linear_qkv.bias", _QKV_BIASES, kind="qkv", split=0),
        WeightRule(ATTENTION + "linear_proj.weight", (HF_ATTENTION + "o_proj.weight",), split=1),
    ]
    if output_bias:
        rules.append(WeightRule(ATTENTION + "linear_proj.bias", (HF_ATTENTION + "o_proj.bias",)))
    if qk_norm != "none":
        split = 0 if qk_norm == "heads" else None
        rules += [WeightRule(f"{ATTENTION}{name}_layernorm.weight", (f"{HF_ATTENTION}{name}_norm.weight",), split=split) for name in "qk"]
    if sinks:
        rules.append(WeightRule(ATTENTION + "core_attention.softmax_offset", (HF_ATTENTION + "sinks",), split=0))
    return tuple(rules)


def _ffn_rules(of: Literal["dense", "experts", "shared"], *names: str) -> Iterator[WeightRule]:
    """names: of the Megatron parameters, with {number} and {part}; the first is the local spec's, the others are aliases."""
    for number, side in ((1, "up"), (2, "down")):
        for part, end in (("weight", ""), ("bias", "_bias")):
            own, *aliases = (name.replace("{number}", str(number)).replace("{part}", part) for name in names)
            # The bias of the second layer is added once, to the sum over the ranks.
            split = 0 if number == 1 else 1 if part == "weight" else None
            made_of = FfnPart(of, side + end)  # type: ignore[arg-type]
            yield WeightRule(own, made_of, "gate_up" if number == 1 else "plain", split, tuple(aliases))


# Every row but those of attention; a model never asks for what it has not.
COMMON_RULES = (
    *_TRUNK,
    *_ROUTER,
    *_ffn_rules("dense", _MLP + "linear_fc{number}.{part}"),
    *_ffn_rules(
        "experts", _MLP + "experts.local_experts.{expert}.linear_fc{number}.{part}", _MLP + "experts.linear_fc{number}.{part}{expert}"
    ),
    *_ffn_rules("shared", _MLP + "shared_experts.linear_fc{number}.{part}"),
)


def decoder_fields(config: HfConfig) -> dict[str, Any]:
    """TransformerConfig fields of a decoder with RMSNorm and gated FFNs, without biases."""
    return {
        "normalization": "RMSNorm",
        "activation": config["hidden_act"],
        "gated_linear_unit": True,
        "add_bias_linear": False,
    }


def grouped_query_fields(config: HfConfig) -> dict[str, Any]:
    """Of such a decoder with grouped-query attention; UserError for positions other than plain rotary or YaRN."""
    return {**decoder_fields(config), **_rope_fields(config)}


def _rope_fields(config: HfConfig) -> dict[str, Any]:
    """Fields of YaRN (https://arxiv.org/abs/2309.00071), none for plain rotary positions; UserError for another kind."""
    rope = config["rope_parameters"]
    kind = rope["rope_type"]
    if kind == "default":
        return {}
    if kind != "yarn" or rope.get("attention_factor") is not None or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"config.json: rotary positions {rope}",
            "rope_type default, or yarn without attention_factor",
            "use a model with one of these",
        )
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    both = rope.get("mscale") and rope.get("mscale_all_dim")
    return {
        "apply_rope_fusion": False,  # the fused rotation has no factor for cosines and sines
        "yarn_rotary_scaling_factor": float(rope.get("factor") or config["max_position_embeddings"] / original),
        "yarn_original_max_position_embeddings": original,
        "yarn_beta_fast": float(rope.get("beta_fast") or 32),
        "yarn_beta_slow": float(rope.get("beta_slow") or 1),
        "yarn_mscale": rope["mscale"] if both else None,
        "yarn_mscale_all_dim": rope["mscale_all_dim"] if both else None,
        "yarn_correction_range_round_to_int": rope.get("truncate", True),
    }


def window_fields(config: HfConfig) -> dict[str, Any]:
    """Fields of sliding-window attention: in the layers that `layer_types` says, or in all.

    Of Transformer Engine's kinds of context parallelism, all-to-all over heads alone knows windows (and sinks).
    """
    window, types = config["sliding_window"], config.get("layer_types")
    slides = [kind == "sliding_attention" for kind in types] if types else [True] * config["num_hidden_layers"]
    if not window or not any(slides):
        return {}
    # a query sees itself and window - 1 keys before it
    return {"window_size": (window - 1, 0), "window_attn_skip_freq": [int(each) for each in slides], "cp_comm_type": "a2a"}
