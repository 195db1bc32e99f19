"""Stock transformers models from directories, loaded completely or not at all."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.machine import free_memory
from megatron_moe2dense.families.account import Account
from megatron_moe2dense.families.pretrained import load_pretrained
from megatron_moe2dense.families.stock import Stock, model_class


def vocab_size(index: CheckpointIndex) -> int:
    """Rows of the vocabulary by config.json, of the language model in it where there is one; UserError when it names none."""
    size = index.config.get("vocab_size")
    if size is None and "text_config" in index.config:  # or of its class by default
        size = AutoConfig.from_pretrained(index.directory, local_files_only=True, trust_remote_code=False).get_text_config().vocab_size
    if not isinstance(size, int):
        raise UserError(
            f"{index.directory}/config.json: vocab_size {size!r}", "the config of a causal language model", "check the directory"
        )
    return size


def max_positions(index: CheckpointIndex) -> int:
    """Positions that the language model was made for, by config.json; 0 where it does not say."""
    config = index.config.get("text_config") or index.config
    return config.get("max_position_embeddings") or 0


def free_bytes(device: torch.device) -> int | None:
    """Of the device's memory; None where nobody says."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()


def require_accelerate() -> None:
    """UserError naming the extra when accelerate, which places models over several GPUs, is not installed."""
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"no accelerate ({error})", "accelerate, for `device_map`", "pip install 'megatron_moe2dense[eval]', or leave device_map out"
        ) from None


def _require_causal(index: CheckpointIndex) -> None:
    """UserError for a model that predicts no next token."""
    config = AutoConfig.from_pretrained(index.directory, local_files_only=True, trust_remote_code=False)
    cls = model_class(config)
    wraps = config.get_text_config(decoder=True) is not config and not config.is_encoder_decoder
    if not wraps and not cls.__name__.endswith("ForCausalLM"):
        raise UserError(f"{index.directory}/config.json: {cls.__name__}", "a causal language model", "point to the language model alone")


def _require_finite(model: PreTrainedModel, index: CheckpointIndex, dtype: str) -> None:
    """UserError for a parameter or a stored buffer that is not: by its name in the files, where it is not finite there already."""
    for name, tensor in model.state_dict().items():
        if torch.isfinite(tensor).all():
            continue
        account = Account.of(index, Stock.read(index.directory))
        with CheckpointReader(index) as reader:
            for stored in account.disk.names_of(name):
                account.values.reader(reader)(stored, None)
        raise UserError(
            f"{index.directory}: {name} has NaN or infinite values in {dtype}",
            "finite weights",
            "get the weights again, or set dtype=float32",
        )


def load_model(index: CheckpointIndex, device: torch.device, dtype: str, device_map: str | None = None) -> PreTrainedModel:
    """The checkpoint as its stock transformers class, in eval mode, on `device` in `dtype`; by `device_map` over all GPUs instead.

    Raises:
        UserError: transformers does not know the architecture, or a tensor is missing, left over, of another shape, NaN or infinite.
    """
    spread: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    try:
        _require_causal(index)
        # mismatched sizes are reported below, all at once
        model, info = load_pretrained(index, dtype=getattr(torch, dtype), ignore_mismatched_sizes=True, **spread)
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(
            f"{index.directory}: {error}", "a checkpoint that stock transformers loads", "check config.json and weights"
        ) from error
    faults = {kind: sorted(str(name) for name in info.get(kind) or ()) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    faults["error_msgs"] = [str(message) for message in info.get("error_msgs") or ()]
    if any(faults.values()):
        listed = "; ".join(f"{len(names)} {kind.replace('_', ' ')}, first {names[0]}" for kind, names in faults.items() if names)
        raise UserError(
            f"{index.directory}: {listed}",
            f"exactly the tensors of {type(model).__name__}",
            "the checkpoint is incomplete or belongs to another config.json: make or download it again",
        )
    _require_finite(model, index, dtype)
    placed = model if spread else model.to(device)
    return placed.eval().requires_grad_(False)
