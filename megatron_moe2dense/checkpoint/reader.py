"""Lazy reading of checkpoint tensors: whole, or only the slice a rank needs."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.common.errors import UserError


class CheckpointReader:
    """Context manager that opens files once, memory-mapped, and reads tensors on demand.

    Args:
        index: the opened checkpoint.
    """

    def __init__(self, index: CheckpointIndex):
        self.index = index
        self._stack = ExitStack()
        self._files: dict[Path, Any] = {}

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()
        self._files.clear()

    def _file(self, name: str) -> Any:
        self.index.require([name])
        path = self.index.tensors[name].file
        if path not in self._files:
            self._files[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._files[path]

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU, in the dtype it is stored in. UserError when absent."""
        return self._file(name).get_tensor(name)

    def finite(self, name: str) -> torch.Tensor:
        """As `tensor`, but a NaN or infinite value is a UserError."""
        tensor = self.tensor(name)
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise UserError(
                f"{self.index.tensors[name].file}: {name} has {bad} NaN or infinite of {tensor.numel()} values",
                "finite weights",
                "download the checkpoint again, or leave this expert out",
            )
        return tensor

    def rows(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        """Only `start:stop` along `axis` (0 or 1), read from disk without the rest where the layout allows."""
        view = self._file(name).get_slice(name)
        return view[start:stop] if axis == 0 else view[:, start:stop]
