"""Tiny stock transformers checkpoints and random token files. Weights are seeded and every one is perturbed, norms too,
so that equality with them means something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

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


def tiny_qwen3_moe(directory: str | Path, dtype: str = "float32", **config_overrides: Any) -> Path:
    """A Qwen3MoeForCausalLM of 8 experts, 2 active, saved in `directory`. Options: keys of Qwen3MoeConfig, `seed`,
    `max_shard_size` (of save_pretrained)."""
    return _save(Qwen3MoeForCausalLM, Qwen3MoeConfig, {**TRUNK, **EXPERTS}, Path(directory), {"dtype": dtype, **config_overrides})


def tiny_qwen3(directory: str | Path, dtype: str = "float32", **config_overrides: Any) -> Path:
    """A dense Qwen3ForCausalLM saved in `directory`. Options as in `tiny_qwen3_moe`."""
    return _save(Qwen3ForCausalLM, Qwen3Config, TRUNK, Path(directory), {"dtype": dtype, **config_overrides})


def _save(
    model_class: type[PreTrainedModel],
    config_class: type[PretrainedConfig],
    defaults: dict[str, Any],
    directory: Path,
    options: dict[str, Any],
) -> Path:
    seed, dtype = options.pop("seed", 0), options.pop("dtype")
    shard = options.pop("max_shard_size", "4GB")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config_class(**{**defaults, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=shard)
    return directory


def write_tokens(prefix: str | Path, tokens_or_count: np.ndarray | int, vocab: int = 256, seed: int = 0) -> str:
    """Write a `.bin/.idx` pair: the given tokens as one document, or that many random ones. Returns the prefix."""
    if isinstance(tokens_or_count, int):
        tokens = np.random.default_rng(seed).integers(0, vocab, tokens_or_count)
    else:
        tokens = np.asarray(tokens_or_count)
    write_token_file(str(prefix), [tokens], vocab)
    return str(prefix)
