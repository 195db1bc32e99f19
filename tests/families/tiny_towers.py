"""A tiny config of any stock type that wraps a text model: images, sound or both beside it.

The text model has the sizes of tiny_configs; the towers beside it are as small as they can be, as nothing here runs them.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.families.tiny_configs import SIZES, text_config

HIDDEN = SIZES["hidden_size"]
# What a key becomes in the config of a tower that has it.
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    **dict.fromkeys(("num_hidden_layers", "depth", "n_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads"), 2),
    "head_dim": 16,
    "image_size": 56,
    "patch_size": 14,
    **dict.fromkeys(("out_hidden_size", "text_hidden_size", "output_dim"), HIDDEN),
}
# By type of a wrapper or a tower: names of sizes that no other class has.
SAM = {"global_attn_indexes": [0], "mlp_dim": 48, "output_channels": 8, "downsample_channels": [16, 32], "image_size": 64, "patch_size": 16}
OWN: dict[str, dict[str, Any]] = {
    "deepseek_ocr2_sam_vision_model": SAM,
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": HIDDEN, "downsample_hidden_size": 8},
    "dots3_note_vision_encoder": {
        "mlp_layer_types": ["sparse"],
        "per_layer_config": {},
        "adapter_in_dim": 32,
        "adapter_out_dim": HIDDEN,
        "moe_intermediate_size": 16,
        "num_local_experts": 4,
    },
    "glm5_next_vision": {"projection_intermediate_size": 48},
    "inkling_audio": {"mel_vocab_size": 8},
    "inkling2_vision": {"projection_hidden_dim": 32},
    "llama4_vision_model": {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    "minimax_m3_vl": {"projector_hidden_size": 32, "merged_hidden_size": 128},
    "muse_spark": {"projector_hidden_size": 32, "out_hidden_size": 32},
    "muse_spark_audio": {"patch_sizes": [4], "hidden_sizes": [32], "depths": [1]},
    "nemotron_h_omni": {"projector_hidden_size": 32, "vision_hidden_size": 32},
    "qwen3_omni_moe_audio_encoder": {
        "d_model": 32,
        "encoder_ffn_dim": 48,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "downsample_hidden_size": 8,
    },
    "radio": {"video_temporal_patch_size": 2},
    "unlimited_ocr_sam_vision_model": SAM,
}


def wrapper_config(model_type: str, **changed: Any) -> PreTrainedConfig:
    """The config of a wrapper in float32; `changed` are keys of its text config."""
    return _tiny(CONFIG_MAPPING[model_type](), {}, changed)


def _tiny(stock: PreTrainedConfig, sizes: dict[str, Any], changed: dict[str, Any]) -> PreTrainedConfig:
    """The config of a wrapper or, with TOWER for `sizes`, of a tower, and of what stands in it."""
    parts = {}
    for key in stock.sub_configs:
        part = getattr(stock, key)
        if part is None and key == "vision_config" and stock.model_type == "gemma4":  # by default it sees nothing
            part = stock.sub_configs[key]()
        if key == "text_config":
            parts[key] = text_config(part.model_type, **changed).to_dict()
        elif part is not None:
            parts[key] = _tiny(part, TOWER, {}).to_dict()
    known = {field.name for field in fields(type(stock))}
    sizes = {name: value for name, value in sizes.items() if name in known}
    return type(stock)(**{**sizes, **OWN.get(stock.model_type, {}), **parts, "dtype": "float32"})
