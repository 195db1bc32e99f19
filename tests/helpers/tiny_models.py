"""Tiny stock transformers checkpoints and random token files. Weights are seeded and every one is perturbed, norms too,
so that equality with them means something."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from megatron_moe2dense.tokens.indexed import write_token_file

TRUNK = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}


LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
# By family: what its config sets beyond the trunk. Everything a real model of the family uses is switched on.
FAMILY: dict[str, dict[str, Any]] = {
    "qwen3_moe": EXPERTS,
    "qwen3": {},
    "deepseek_v2": {
        **LATENT_ATTENTION,
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    },
    "deepseek_v3": {**LATENT_ATTENTION, "q_lora_rank": 24, "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "num_mtp_layers": 0},
    "gpt_oss": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
        "sliding_window": 8,
        "swiglu_limit": 0.3,  # low enough to clamp something
    },
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32, "eos_token_id": 2},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32},
    "mistral": {},
    "qwen2_moe": {**EXPERTS, "norm_topk_prob": False, "shared_expert_intermediate_size": 48},
    "qwen2": {},
}
STOCK = {
    "qwen3_moe": "Qwen3Moe",
    "qwen3": "Qwen3",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "gpt_oss": "GptOss",
    "olmoe": "Olmoe",
    "mixtral": "Mixtral",
    "mistral": "Mistral",
    "qwen2_moe": "Qwen2Moe",
    "qwen2": "Qwen2",
}
WITHOUT_HEAD_DIM = {"deepseek_v2", "deepseek_v3", "olmoe", "qwen2_moe", "qwen2"}  # their classes derive it


def tiny(family: str, directory: str | Path, dtype: str = "float32", **config_overrides: Any) -> Path:
    """A stock model of the family, 4 layers, hidden size 64, MoE: 8 experts, 2 active, saved in `directory`.

    Options: keys of the family's config, `seed`, `max_shard_size` and `save_original_format` (of save_pretrained).
    """
    defaults = {name: value for name, value in TRUNK.items() if name != "head_dim" or family not in WITHOUT_HEAD_DIM}
    return _save(STOCK[family], {**defaults, **FAMILY[family], "dtype": dtype, **config_overrides}, Path(directory))


def tiny_qwen3_moe(directory: str | Path, dtype: str = "float32", **config_overrides: Any) -> Path:
    """`tiny` Qwen3-MoE."""
    return tiny("qwen3_moe", directory, dtype, **config_overrides)


def tiny_qwen3(directory: str | Path, dtype: str = "float32", **config_overrides: Any) -> Path:
    """`tiny` dense Qwen3."""
    return tiny("qwen3", directory, dtype, **config_overrides)


def _save(stock: str, options: dict[str, Any], directory: Path) -> Path:
    seed, dtype = options.pop("seed", 0), options.pop("dtype")
    how = {name: options.pop(name) for name in ("max_shard_size", "save_original_format") if name in options}
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, f"{stock}ForCausalLM")(getattr(transformers, f"{stock}Config")(**options))
    saved = set(model.state_dict())
    buffers = [buffer for name, buffer in model.named_buffers() if name in saved]
    with torch.no_grad():
        for parameter in (*model.parameters(), *buffers):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.to(getattr(torch, dtype)).save_pretrained(directory, **how)
    return directory


def without_routing(directory: Path) -> Path:
    """As `convert` writes a model whose layers have one expert each: routers are zero."""
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if "mlp.gate." in name or "router" in name:
            tensor.zero_()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def as_mxfp4(source: Path, directory: Path, seed: int = 0) -> tuple[Path, Path]:
    """Two checkpoints with the same experts: `source`, whose expert matrices are replaced by random values that MXFP4 holds exactly,
    and `directory`, with these as blocks and scales. The encoding is written out here, from the format's description."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    generator = torch.Generator().manual_seed(seed)
    plain = load_file(source / "model.safetensors")
    packed = dict(plain)
    for name in [name for name in plain if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = plain[name].shape
        codes = torch.randint(0, 16, (experts, outputs, inputs), generator=generator)
        exponents = torch.randint(121, 125, (experts, outputs, inputs // 32), generator=generator)
        weights = values[codes] * 2.0 ** (exponents - 127).repeat_interleave(32, dim=-1)
        plain[name] = weights.transpose(1, 2).to(plain[name].dtype).contiguous()
        pairs = codes.view(experts, outputs, inputs // 32, 16, 2)
        packed[f"{name}_blocks"] = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)
        packed[f"{name}_scales"] = exponents.to(torch.uint8)
        del packed[name]
    shutil.copytree(source, directory)
    save_file(plain, source / "model.safetensors", metadata={"format": "pt"})
    save_file(packed, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (directory / "config.json").write_text(json.dumps(config))
    return source, directory


def write_tokens(prefix: str | Path, tokens_or_count: np.ndarray | int, vocab: int = 256, seed: int = 0) -> str:
    """Write a `.bin/.idx` pair: the given tokens as one document, or that many random ones. Returns the prefix."""
    if isinstance(tokens_or_count, int):
        tokens = np.random.default_rng(seed).integers(0, vocab, tokens_or_count)
    else:
        tokens = np.asarray(tokens_or_count)
    write_token_file(str(prefix), [tokens], vocab)
    return str(prefix)
