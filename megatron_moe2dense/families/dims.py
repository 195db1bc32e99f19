"""Sizes of decoder-only models from config.json, where families agree on the keys."""

from __future__ import annotations

from typing import Any

from megatron_moe2dense.families.spec import Dims, HfConfig


def first_of(config: HfConfig, *names: str) -> Any:
    """The value of the first of these keys that is there (transformers 5 writes some under a second name); KeyError for the
    first name when none is."""
    return config[next((name for name in names if name in config), names[0])]


def rope_theta(config: HfConfig, default: float = 10_000.0) -> float:
    """The rotary base; transformers 5 moved it from `rope_theta` to `rope_parameters`."""
    return float((config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta") or default)


def decoder_dims(config: HfConfig, norm_eps: float = 1e-6, theta: float = 10_000.0) -> Dims:
    """Sizes of a dense decoder with RMSNorm and rotary positions. norm_eps, theta: the family's defaults."""
    heads = config["num_attention_heads"]
    return Dims(
        hidden_size=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        tied_embeddings=config.get("tie_word_embeddings", False),
        norm_eps=config.get("rms_norm_eps", norm_eps),
        rope_theta=rope_theta(config, theta),
        dense_width=config.get("intermediate_size", 0),
    )
