"""Multi-head latent attention (DeepSeek-V2, section 2.1) on Megatron's MLASelfAttention, for both layer specs."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor

# The stock classes norm the latents with this, whatever the config's rms_norm_eps.
LATENT_NORM_EPS = 1e-6


class LatentAttention(MLASelfAttention):
    """MLASelfAttention that is right under tensor parallelism without sequence parallelism too.

    Its down projections must be on every rank whole (`Linear`, or Transformer Engine's duplicated one).
    """

    def __init__(self, config: MLATransformerConfig, *args: Any, **options: Any):
        super().__init__(config, *args, **options)
        names = ("kv",) if config.q_lora_rank is None else ("kv", "q")
        for name in names:
            down = getattr(self, f"linear_{name}_down_proj")
            if isinstance(down, Linear) and config.perform_initialization:
                assert config.init_method is not None
                config.init_method(down.weight)
            norms = [getattr(self, f"{name}_layernorm"), getattr(self, f"linear_{name}_up_proj")]  # one of them, by layer spec
            holders = [module for module in norms if hasattr(module, "eps")]
            assert len(holders) == 1, "the latent norm stands before the up projection or inside it"
            holders[0].eps = LATENT_NORM_EPS
        if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
            down: Any = self.linear_kv_down_proj
            down.register_forward_hook(self._position_key_of_all_heads)

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """0.19 asks for the classes; without `qk_layernorm` (see `latent_fields`) it would refuse the norms that our spec names."""
        if self.config.qk_layernorm:
            resolve: Any = super()._resolve_qk_norm_config  # type: ignore[misc] - none before 0.19
            return resolve(submodules)
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}

    def _position_key_of_all_heads(self, _module: torch.nn.Module, _inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        """Sum the gradient of the position key over the ranks, each of which has some of the heads that share it.

        Megatron-Core 0.16 leaves it a partial sum. The latents need nothing: they meet a column-parallel projection.
        """
        latent, position = output[0].split([self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim], dim=-1)
        return torch.cat([latent, copy_to_tensor_model_parallel_region(position, group=self.pg_collection.tp)], dim=-1), output[1]


def latent_fields(fields: dict[str, Any], transformer_engine: bool) -> dict[str, Any]:
    """TransformerConfig fields that depend on the layer spec.

    qk_layernorm: Transformer Engine's spec fuses the latent norms into the up projections; ours names them itself, and `qk_layernorm`
    would make Megatron add up the gradients of `q_layernorm` over tensor-parallel ranks, each of which has the whole of it.
    apply_rope_fusion: Megatron's kernel is for YaRN only.
    """
    return {"qk_layernorm": transformer_engine, "apply_rope_fusion": transformer_engine and fields["rope_type"] == "yarn"}


def use_latent_attention(layer: Any, transformer_engine: bool) -> None:
    """Put LatentAttention into a layer spec, and for the local spec the down projections it needs."""
    layer.self_attention.module = LatentAttention
    if not transformer_engine:
        projections = layer.self_attention.submodules
        projections.linear_q_down_proj = projections.linear_kv_down_proj = Linear
