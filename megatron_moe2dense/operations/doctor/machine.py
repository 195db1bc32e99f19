"""GPUs, memory, disk and environment of this machine. No process group is made and no GPU memory taken: the driver's tool is asked."""

from __future__ import annotations

import netrc
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_moe2dense.common.machine import free_memory
from megatron_moe2dense.operations.doctor.packages import Finding, version

_QUERY = "name,memory.total,memory.free,compute_cap,driver_version"
_MIB = 2**20
# They change how a run communicates or where memory comes from; nothing here sets any of them.
_PREFIXES = ("NCCL_", "TORCH_NCCL_", "NVTE_", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF", "GLOO_")


@dataclass(frozen=True)
class Gpu:
    """Bytes, and compute capability as (major, minor)."""

    name: str
    total: int
    free: int
    capability: tuple[int, int]
    driver: str


def gpus() -> list[Gpu]:
    """What nvidia-smi lists; empty without it. CUDA_VISIBLE_DEVICES is not applied."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return [_gpu(line) for line in done.stdout.splitlines() if line.count(",") == 4] if done.returncode == 0 else []


def _gpu(line: str) -> Gpu:
    name, total, free, capability, driver = (part.strip() for part in line.split(","))
    major, minor = capability.split(".")
    return Gpu(name, int(total) * _MIB, int(free) * _MIB, (int(major), int(minor)), driver)


def free_disk(path: Path) -> int:
    """Bytes free where `path` is, or will be."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def machine(found: list[Gpu], environment: Mapping[str, str]) -> list[Finding]:
    """Lines of the report on GPUs, host and environment."""
    rows = [
        Finding(
            f"GPU {number}", f"{gpu.name}, {_gb(gpu.total)} ({_gb(gpu.free)} free), sm_{gpu.capability[0]}{gpu.capability[1]}, {gpu.driver}"
        )
        for number, gpu in enumerate(found)
    ]
    memory = free_memory()
    rows = rows or [Finding("GPU", "none: nvidia-smi lists no device")]
    rows += [
        Finding("host memory", f"{_gb(memory)} free" if memory is not None else "unknown"),
        Finding("processors", str(len(os.sched_getaffinity(0)))),
        Finding("disk, here", f"{_gb(free_disk(Path.cwd()))} free"),
        Finding("wandb", _wandb(environment)),
        Finding(
            "Hugging Face hub", "offline" if environment.get("HF_HUB_OFFLINE", "0") not in ("", "0") else "online, where there is a network"
        ),
    ]
    rows += [Finding(name, value) for name, value in sorted(environment.items()) if name.startswith(_PREFIXES)]
    return rows


def torch_on(found: list[Gpu]) -> list[Finding]:
    """torch and the GPUs together; imports torch."""
    import torch
    from torch.cuda import nccl

    cuda = torch.version.cuda
    available = torch.cuda.is_available()  # counts devices, creates no context
    rows = [Finding("torch's CUDA", f"{cuda or 'none'}, {torch.cuda.device_count()} devices visible" if available else f"{cuda or 'none'}")]
    if found and not available:
        do = "install the torch build for your CUDA version, or check the driver and CUDA_VISIBLE_DEVICES"
        rows = [Finding("torch's CUDA", f"{cuda or 'none'}: it sees none of {len(found)} GPUs", "warning", do)]
    if available and torch.distributed.is_nccl_available():
        rows.append(Finding("NCCL", ".".join(map(str, nccl.version()))))
    return rows


def _wandb(environment: Mapping[str, str]) -> str:
    if version("wandb") is None:
        return "not installed"
    if environment.get("WANDB_API_KEY"):
        return "key in WANDB_API_KEY"
    try:
        keys = netrc.netrc(Path(environment.get("NETRC", Path.home() / ".netrc"))).hosts
    except (OSError, RuntimeError, netrc.NetrcParseError):  # RuntimeError: a user without a home
        keys = {}
    return "key in the netrc file" if any("wandb" in host for host in keys) else "no key: runs are kept offline"


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"
