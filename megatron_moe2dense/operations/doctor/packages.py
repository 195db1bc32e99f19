"""Installed packages and their known traps, from metadata and file names: nothing is imported, so nothing can break."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Versions of Megatron-Core that the tests have run against; see "Versions of Megatron-Core" in docs/operations.md.
TESTED = ((0, 16), (0, 19))
_KERNELS_OF_TRITON = ("triton", "liger-kernel", "flash-linear-attention")


@dataclass(frozen=True)
class Finding:
    """One line of the report. do: the next step, for a warning or an error."""

    name: str
    found: str
    level: Literal["fine", "warning", "error"] = "fine"
    do: str = ""


def version(distribution: str) -> str | None:
    """Of an installed distribution, None when there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def packages(has_gpu: bool) -> list[Finding]:
    """Everything the trainer imports or is offered, in the order of the report."""
    plain = [Finding("python", sys.version.split()[0])]
    plain += [Finding(name, version(name) or "not installed") for name in ("transformers", "flash-attn", "nvidia-resiliency-ext")]
    return [*plain, _torch(), _megatron(), _psutil(), _transformer_engine(has_gpu), _apex(), *_triton(has_gpu)]


def _torch() -> Finding:
    found = version("torch")
    return Finding("torch", found) if found else Finding("torch", "not installed", "error", "install torch for your CUDA version first")


def _megatron() -> Finding:
    found = version("megatron-core")
    if found is None:
        return Finding("megatron-core", "not installed", "error", "install the extra `train` of this package")
    number = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if not TESTED[0] <= number <= TESTED[1]:
        tested = " to ".join(".".join(map(str, each)) for each in TESTED)
        return Finding("megatron-core", found, "warning", f"the tests have run with {tested}: install one of these, or run them")
    return Finding("megatron-core", found)


def _psutil() -> Finding:
    """Megatron-Core needs it for its writers and does not declare it."""
    found = version("psutil")
    return Finding("psutil", found) if found else Finding("psutil", "not installed", "error", "pip install psutil: saving hangs without it")


def _transformer_engine(has_gpu: bool) -> Finding:
    name = "transformer-engine"
    found = version(name)
    if found is None:
        if has_gpu:
            return Finding(
                name, "not installed", "warning", "pip install --no-build-isolation 'transformer-engine[pytorch]': several times faster"
            )
        return Finding(name, "not installed")
    if importlib.util.find_spec("transformer_engine_torch") is None:
        do = "install 'transformer-engine[pytorch]', or uninstall it: importing this one fails, and import megatron.core with it"
        return Finding(name, f"{found}, without its part for torch", "error", do)
    return Finding(name, found)


def _apex() -> Finding:
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Finding("apex", "not installed")
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers").is_dir() for folder in folders):
        do = "pip uninstall apex: it is another project, which Megatron-Core imports for NVIDIA's; build NVIDIA's from its source tree"
        return Finding("apex", f"{version('apex') or 'no version'}, not NVIDIA's", "warning", do)
    return Finding("apex", version("apex") or "NVIDIA's")


def _triton(has_gpu: bool) -> Iterable[Finding]:
    for name in _KERNELS_OF_TRITON:
        found = version(name)
        if found is not None and not has_gpu:
            yield Finding(name, found, "warning", f"pip uninstall {name}: without a GPU, transformers picks its kernels and fails")
        elif found is not None:
            yield Finding(name, found)
