"""The torch device and type of a process."""

from __future__ import annotations

import os

import torch

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.compute.ranks import Ranks


def open_device(name: str, ranks: Ranks) -> torch.device:
    """The torch device of that name (`auto`: cuda where there is one, else cpu); of a job's processes each has the GPU of its number on its
    node. UserError when there is no such device here."""
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if chosen == "cuda" and ranks.world > 1:
        chosen = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(chosen)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UserError(
            f"device {chosen!r}: {str(error).splitlines()[0]}", "a device of this machine", "e.g. device=cpu, or auto"
        ) from None
    return device


def chosen_dtype(name: str, device: str) -> str:
    """The type of that name on the device of that name, which may be another machine's (`auto`: bfloat16 on a GPU, float32 on a CPU)."""
    kind = open_device(device, Ranks()).type if device == "auto" else device.partition(":")[0]
    return name if name != "auto" else "float32" if kind == "cpu" else "bfloat16"
