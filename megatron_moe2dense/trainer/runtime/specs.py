"""The layer spec: Transformer Engine kernels where they exist, Megatron's local modules elsewhere."""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_moe2dense.trainer.runtime.experts import PlainExperts
from megatron_moe2dense.trainer.runtime.latent_attention import use_latent_attention
from megatron_moe2dense.trainer.runtime.modules import HeadsNormedAttention, RMSNorm, SdpaCoreAttention
from megatron_moe2dense.trainer.runtime.upstream import use_experts


def block_spec(config: TransformerConfig, transformer_engine: bool, chunk: int, stage: int) -> TransformerBlockSubmodules:
    """The decoder layers of a model chunk of a pipeline stage; `config.moe_layer_freq` says which of them have experts."""
    if transformer_engine:
        norm = config.normalization
        block = get_gpt_decoder_block_spec(config, use_transformer_engine=True, normalization=norm, vp_stage=chunk, pp_rank=stage)
        for layer in block.layer_specs or ():
            if config.multi_latent_attention:
                use_latent_attention(layer.submodules, transformer_engine)
            _norm_over_heads(config, layer)
        return block
    first = get_transformer_layer_offset(config, chunk, stage)
    numbers = range(first, first + get_num_layers_to_build(config, chunk, stage))
    own: Any = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[_local_layer(config, number) for number in numbers], layer_norm=own)


def _local_layer(config: TransformerConfig, number: int) -> Any:
    pattern = config.moe_layer_freq
    has_experts = config.num_moe_experts is not None and (pattern[number] == 1 if isinstance(pattern, list) else number % pattern == 0)
    spec = copy.deepcopy(
        get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts if has_experts else None,
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
            normalization=config.normalization,
        )
    )
    layer: Any = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    if has_experts:
        layer.mlp = use_experts(layer.mlp, PlainExperts)
    attention = layer.self_attention.submodules
    attention.core_attention = SdpaCoreAttention
    if config.multi_latent_attention:
        use_latent_attention(layer, transformer_engine=False)
        attention.q_layernorm = attention.kv_layernorm = RMSNorm
    elif config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    _norm_over_heads(config, spec)
    return spec


def _norm_over_heads(config: TransformerConfig, layer: Any) -> None:
    """Give the layer norms of queries and keys over all heads, where the model has them."""
    if getattr(config, "qk_norm_over_heads", False):
        layer.submodules.self_attention.module = HeadsNormedAttention
