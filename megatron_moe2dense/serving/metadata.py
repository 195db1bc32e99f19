"""Whether a GGUF file says of a model what its config.json does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_moe2dense.families.account import Account

# Fields of GGUF behind `<architecture>.`, and the keys of stock configs that mean the same (the first that a config has).
_FIELDS = {
    "block_count": ("num_hidden_layers",),
    "embedding_length": ("hidden_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "layer_norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "vocab_size": ("vocab_size",),
}
# Tensors that a file may have beside a model's parameters: tables of frequencies.
_TABLES = ("rope_freqs", "rope_factors")
_TOLERANCE = 1e-6  # relative: GGUF keeps numbers in float32


def disagreements(source: Path, described: Mapping[str, Any]) -> list[str]:
    """What differs, in words: sizes, rotary base, tokens, number of parameters.

    Args:
        source: the Hugging Face directory. described: fields and tensors of the file (`gguf.describe`).
    """
    account = Account.open(source)
    fields, tensors = described["fields"], described["tensors"]
    prefix = fields["general.architecture"]
    config = account.stock.config
    meant = {f"{prefix}.{name}": _first(config, keys) for name, keys in _FIELDS.items()}
    meant[f"{prefix}.rope.freq_base"] = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    wrong = [
        f"{name} is {fields[name]}, not {value}"
        for name, value in meant.items()
        if value is not None and name in fields and not _same(fields[name], value)
    ]
    context, positions = fields.get(f"{prefix}.context_length"), getattr(config, "max_position_embeddings", None)
    if context and positions and context < positions:  # some of the converter's are longer
        wrong.append(f"{prefix}.context_length is {context}, not {positions}")
    tokens = fields.get("tokenizer.ggml.tokens")
    held = len(tokens) if isinstance(tokens, list) else (tokens or {}).get("length")
    if held is not None and held != config.vocab_size:
        wrong.append(f"{held} tokens, not {config.vocab_size}")
    counted = sum(math.prod(tensor["shape"]) for name, tensor in tensors.items() if not name.startswith(_TABLES))
    stock = account.stock
    parameters = stock.parameters + sum(math.prod(stock.shapes[name]) for name in stock.buffers)
    if counted != parameters:
        wrong.append(f"{counted:,} numbers, not {parameters:,}")
    return wrong


def _first(config: Any, names: tuple[str, ...]) -> Any:
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)


def _same(found: Any, meant: Any) -> bool:
    if isinstance(found, (int, float)) and isinstance(meant, (int, float)):
        return math.isclose(found, meant, rel_tol=_TOLERANCE)
    return True  # lists by layer: the converter's own form of what a config says for all
