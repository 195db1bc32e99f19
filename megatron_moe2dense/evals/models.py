"""Stock transformers models from directories, loaded completely or not at all."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.common.errors import UserError


def vocab_size(index: CheckpointIndex) -> int:
    """Rows of the vocabulary by config.json; UserError when it names none."""
    size = index.config.get("vocab_size")
    if not isinstance(size, int):
        raise UserError(
            f"{index.directory}/config.json: vocab_size {size!r}", "the config of a causal language model", "check the directory"
        )
    return size


def open_device(name: str) -> torch.device:
    """The torch device of that name; UserError when there is no such device here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UserError(f"device {name!r}: {str(error).splitlines()[0]}", "a device of this machine", "e.g. device=cpu") from None
    return device


def load_model(index: CheckpointIndex, device: torch.device, dtype: str) -> PreTrainedModel:
    """The checkpoint as its stock transformers class, in eval mode, on `device` in `dtype`.

    Raises:
        UserError: transformers does not know the architecture, or a tensor is missing, left over or of another shape.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            index.directory,
            local_files_only=True,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, all at once
        )
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(
            f"{index.directory}: {error}", "a checkpoint that stock transformers loads", "check config.json and weights"
        ) from error
    model, info = loaded
    faults = {kind: sorted(str(name) for name in info.get(kind) or ()) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    faults["error_msgs"] = [str(message) for message in info.get("error_msgs") or ()]
    if any(faults.values()):
        listed = "; ".join(f"{len(names)} {kind.replace('_', ' ')}, first {names[0]}" for kind, names in faults.items() if names)
        raise UserError(
            f"{index.directory}: {listed}",
            f"exactly the tensors of {type(model).__name__}",
            "the checkpoint is incomplete or belongs to another config.json: make or download it again",
        )
    return model.to(device).eval().requires_grad_(False)
