"""A tiny config of any stock text type: the class's own keys with small values, and a short table of what is special to a type."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS, EXPERTS, ACTIVE, VOCABULARY = 4, 8, 2, 128
# What a key becomes in a class that has it. Widths differ from each other, so that a swapped axis or a wrong key shows.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "max_position_embeddings": 128,
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "dense_intermediate_size": 112,
    **dict.fromkeys(("shared_intermediate_size", "shared_expert_intermediate_size"), 40),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 40),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), ACTIVE),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts"), 1),
    "moe_num_shared_experts": 2,
    **dict.fromkeys(("routed_scaling_factor", "route_scale", "router_scaling_factor", "moe_routed_scaling_factor"), 1.5),
    "n_group": 4,
    "topk_group": 2,
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    "mlp_only_layers": [0],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **dict.fromkeys(("head_dim", "kv_channels"), 16),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size", "keep_window_size", "block_size"), 8),
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "o_lora_rank": 8,
    "o_groups": 2,
    "index_topk": 4,
    "index_n_heads": 2,
    "index_head_dim": 16,
    **dict.fromkeys(("hc_mult", "hc_count"), 2),
    **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 2),
    "swa_head_dim": 8,
    "rel_extent": 8,
    "d_rel": 4,
    "linear_num_heads": 2,
    "linear_head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size"), 8),
    "mamba_dt_rank": 4,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.125,
    "logits_scaling": 2.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("num_nextn_predict_layers", "num_mtp_layers"), 0),
}
# Engines have kernels for heads of 64 and for DeepSeek's latent attention as published; the vocabulary has room for that
# of the example's tokenizer and more.
ENGINE_SIZES: dict[str, Any] = {
    **SIZES,
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"), 2112),
    "max_position_embeddings": 512,
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 96,
    "dense_intermediate_size": 448,
    **dict.fromkeys(("shared_intermediate_size", "shared_expert_intermediate_size"), 160),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 160),
    **dict.fromkeys(("head_dim", "kv_channels"), 64),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size"), 32),
    "q_lora_rank": 96,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 64),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 64),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size"), 64),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
}
# A class whose default for one of these is nothing, 0 or 1 has it switched off: it stays off.
OFF = (
    *("n_group", "topk_group", "q_lora_rank", "qk_rope_head_dim", "sliding_window", "num_key_value_heads"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)
SLIDING = ["sliding_attention", "full_attention"] * 2
DENSE_FIRST = ["dense", "sparse", "sparse", "sparse"]
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32.0, "beta_slow": 1.0}
# By type: names of sizes that no other class has, and kinds of layers that the class's default config lacks.
OWN: dict[str, dict[str, Any]] = {
    "cohere2_moe": {"mlp_layer_types": DENSE_FIRST, "prefix_dense_intermediate_size": 112},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": LAYERS,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": EXPERTS, "moe_top_k": ACTIVE},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": DENSE_FIRST},
    "deepseek_v4": {"partial_rotary_factor": 0.5, "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "doge": {"is_moe": True, "num_experts": 16},  # product keys: the number is a square
    "dots3_note_text": {  # sliding layers have sizes of their own, which the default config does not show under these names
        **{f"swa_{name}": 2 for name in ("num_attention_heads", "num_key_value_heads")},
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_qk_rope_head_dim": 8,
        "swa_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "ernie4_5_vl_moe_text": {  # widths of the experts for text and for images
        "moe_intermediate_size": [24, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
    },
    "gemma4_text": {  # its default is the dense model
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
    },
    "glm4_moe": {"use_qk_norm": True},
    "glm4v_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    },
    "glm5_next_text": {"index_kpool": 2},
    "glm_moe_dsa": {"indexer_types": ["full", "shared"] * 2},
    "gpt_oss": {"rope_parameters": {**YARN, "truncate": False}, "swiglu_limit": 0.3},  # low enough to clamp something
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "inkling2_text": {"n_layers_per_attn_res_block": 2},
    "inkling_text": {"mlp_layer_types": DENSE_FIRST, "logits_mup_width_multiplier": 2.0},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 1},  # experts in layers 1 and 3, attention in 1
    "laguna": {"layer_types": SLIDING, "num_attention_heads_per_layer": [2, 4, 2, 4], "moe_router_logit_softcapping": 4.0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {
        "num_experts_per_tok": 1,  # as published
        "moe_layers": [1, 2, 3],
        "intermediate_size_mlp": 112,
        "no_rope_layer_interval": 2,
        "floor_scale": 4,
    },
    "longcat_flash": {"num_layers": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 24, "zero_expert_num": 4},
    "mellum": {"layer_types": SLIDING, "mlp_layer_types": DENSE_FIRST},
    "minimax_m3_vl_text": {
        "layer_types": ["minimax_m3_sparse", "full_attention"] * 2,
        "mlp_layer_types": DENSE_FIRST,
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "rotary_dim": 8,
    },
    "mistral4": {"rope_parameters": {**YARN, "type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}},
    "mistral_large4_text": {"rope_parameters": {**YARN, "attention_factor": 1.0}, "indexer_types": ["full", "shared"] * 2},
    "muse_spark_text": {"moe_hidden_size": 32},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe"], "n_groups": 2},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [1],
        "ple_embed_dim": 16,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 2,
        "eos_token_id": 2,
    },
    "step3p5": {
        "layer_types": SLIDING,
        "sliding_window": 8,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in SLIDING},
        "num_sliding_attention_heads": 2,
        "share_expert_dim": 40,
        "swiglu_limits": [None, 0.3, 0.3, None],
        "swiglu_limits_shared": [None, None, 0.3, None],
    },
    "zaya": {
        "num_experts_per_tok": 1,  # the class refuses more
        "router_hidden_size": 16,
        "layer_types": ["hybrid", "hybrid_sliding"] * 2,
        "sliding_window": 8,
    },
}


def text_config(model_type: str, **changed: Any) -> PreTrainedConfig:
    """4 layers, hidden size 64, 8 experts, 2 of them active, in float32; every kind of layer that the type's default config has."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**{**_sizes(config_class, SIZES), **OWN.get(model_type, {}), "dtype": "float32", **changed})


def engine_config(model_type: str, **changed: Any) -> PreTrainedConfig:
    """`text_config` with sizes that engines have kernels for, and a vocabulary for the tokenizer of the example."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**{**_sizes(config_class, ENGINE_SIZES), **OWN.get(model_type, {}), "dtype": "float32", **changed})


def _sizes(config_class: type[PreTrainedConfig], wanted: dict[str, Any]) -> dict[str, Any]:
    stock = config_class()
    stock.allow_global_per_layer_attribute_access = True  # what layers override is read as well
    default = {field.name: getattr(stock, field.name) for field in fields(config_class)}  # without aliases and derived keys
    sizes = {name: value for name, value in wanted.items() if name in default and not (name in OFF and default[name] in (None, 0, 1))}
    if "kv_lora_rank" in default:  # latent attention has no groups of heads
        sizes["num_key_value_heads"] = wanted["num_attention_heads"]
    if "head_dim" in default and default["head_dim"] == default.get("qk_rope_head_dim"):
        sizes["head_dim"] = wanted["qk_rope_head_dim"]
    for name, kinds in default.items():
        if isinstance(kinds, list) and len(kinds) == default.get("num_hidden_layers") and isinstance(kinds[0], str):
            sizes[name] = _every_kind(list(dict.fromkeys(kinds)), once=name == "mlp_layer_types")
    return sizes


def _every_kind(kinds: list[str], once: bool) -> list[str]:
    """A kind for each layer: in turn, or all but the last kind once (dense layers come first, the rest has experts)."""
    return [kinds[min(layer, len(kinds) - 1) if once else layer % len(kinds)] for layer in range(LAYERS)]
