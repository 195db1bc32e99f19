"""TransformerConfig with the fields that Megatron-Core's model code looks for, or ours, but that TransformerConfig itself lacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig


@dataclass
class DecoderConfig(TransformerConfig):
    """qk_norm_over_heads: queries and keys are normalised over all heads together, not head by head."""

    qk_norm_over_heads: bool = False


@dataclass
class YarnConfig(DecoderConfig):
    """YaRN positions. GPTModel and the attention read these fields, the attention by whether they are there."""

    position_embedding_type: str = "yarn"
    yarn_rotary_scaling_factor: float = 1.0
    yarn_original_max_position_embeddings: int = 4096
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_mscale: float | None = None
    yarn_mscale_all_dim: float | None = None
    yarn_correction_range_round_to_int: bool = True


def config_of(fields: Mapping[str, Any]) -> TransformerConfig:
    """The config for these fields; latent attention has its own positions."""
    if fields.get("multi_latent_attention"):
        return MLATransformerConfig(**fields)
    kind = YarnConfig if "yarn_rotary_scaling_factor" in fields else DecoderConfig
    return kind(**fields)
