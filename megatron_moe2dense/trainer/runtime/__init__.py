"""What differs between GPU (NCCL, Transformer Engine, Apex) and CPU (gloo, plain PyTorch), chosen once, here.

`session` must be entered before any model is built: on a machine without CUDA it teaches Megatron-Core to live on the CPU.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.trainer.runtime import cpu, peaks, upstream

# How long a collective may wait where nothing else was asked for.
PATIENCE = 30.0  # minutes


@dataclass(frozen=True)
class Runtime:
    """The device of this rank, the collective backend and whether Transformer Engine kernels are used."""

    device: torch.device
    backend: Literal["nccl", "gloo"]
    transformer_engine: bool


@contextlib.contextmanager
def session(device: Literal["auto", "cpu", "cuda"], patience: float = PATIENCE) -> Iterator[Runtime]:
    """Prepare Megatron-Core for the device and join the process group (torchrun's, or one of a single process).

    A process group that exists already is used and left in place.

    Args:
        device: what is asked for. patience: minutes that a collective may wait for a rank.

    Raises:
        UserError: `device: cuda` without a GPU; `device: cpu` with one (Megatron-Core would use it all the same).
    """
    require_device(device)
    runtime = _gpu() if torch.cuda.is_available() else _cpu()
    upstream.checkpoint_results_without_a_server()
    upstream.all_reduce_of_strided_tensors()
    joined = _join(runtime.backend, patience)
    logger.info(
        "runtime: %s, %s, %d processes, %s kernels, %s",
        runtime.device.type,
        runtime.backend,
        dist.get_world_size(),
        "Transformer Engine" if runtime.transformer_engine else "plain PyTorch",
        upstream.adam(),
    )
    try:
        yield runtime
    finally:
        if joined:
            dist.destroy_process_group()


def require_device(device: Literal["auto", "cpu", "cuda"]) -> None:
    """UserError when this machine has not what `device` asks for; see `session`."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError("device: cuda, but no CUDA device", "a GPU with its driver", "use device: auto or cpu")
    if device == "cpu" and available:
        raise UserError("device: cpu on a machine with a GPU", "device: auto", "hide the GPUs with CUDA_VISIBLE_DEVICES= to train on CPU")


def expected() -> Runtime:
    """What `session` would choose for the first process here; joins no group and touches no device."""
    if torch.cuda.is_available():
        return Runtime(torch.device("cuda", 0), "nccl", upstream.has_transformer_engine())
    return Runtime(torch.device("cpu"), "gloo", transformer_engine=False)


def peak_flops(runtime: Runtime, dtype: str) -> float | None:
    """FLOP/s that the device of this rank can reach in `dtype`; None on a CPU, on a GPU that is not listed, and for float32."""
    if runtime.device.type != "cuda" or dtype != "bfloat16":
        return None
    return peaks.bf16_peak(torch.cuda.get_device_name(runtime.device))


def _gpu() -> Runtime:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(local_rank)
    return Runtime(torch.device("cuda", local_rank), "nccl", upstream.has_transformer_engine())


def _cpu() -> Runtime:
    cpu.install()
    upstream.mend()
    return Runtime(torch.device("cpu"), "gloo", transformer_engine=False)


def _join(backend: str, patience: float) -> bool:
    """True when this call made the process group."""
    if dist.is_initialized():
        return False
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=patience))
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    return True
