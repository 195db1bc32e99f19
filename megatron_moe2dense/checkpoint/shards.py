"""Writing a checkpoint whose names, shapes and dtypes are known beforehand: shard files get their headers and full size at once,
then each tensor goes straight to its place, in any order, from a thread behind a bounded queue. No shard is held in memory."""

from __future__ import annotations

import json
import os
import struct
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from megatron_moe2dense.checkpoint.index import DTYPE_BYTES
from megatron_moe2dense.checkpoint.reader import TORCH_DTYPES
from megatron_moe2dense.common.outputs import disk_errors, write_json

SHARD_BYTES = 4 * 1024**3
_CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written. dtype: safetensors code."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> TensorSpec:
        """That of a tensor (which may be on the meta device)."""
        return cls(name, _CODES[tensor.dtype], tuple(tensor.shape))

    @property
    def parameters(self) -> int:
        """Values."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.parameters * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Shard:
    """One file: its name, header bytes, and the tensors in the order they lie in it."""

    file: str
    tensors: tuple[TensorSpec, ...]

    def header(self) -> bytes:
        """Length and JSON header as in the safetensors format, padded so that the data begin on 8 bytes."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for spec in self.tensors:
            entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, offset + spec.nbytes]}
            offset += spec.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(spec.nbytes for spec in self.tensors)

    def is_laid_out(self, directory: Path) -> bool:
        """Whether the file stands in `directory` with this header and its whole size."""
        path, header = directory / self.file, self.header()
        if not path.exists() or path.stat().st_size != len(header) + self.nbytes:
            return False
        with path.open("rb") as file:
            return file.read(len(header)) == header

    def lay_out(self, directory: Path) -> None:
        """Make the file with its header, its whole size reserved on the disk."""
        header = self.header()
        with disk_errors(directory / self.file), (directory / self.file).open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, len(header) + self.nbytes)
            file.write(header)


def shards_of(specs: Sequence[TensorSpec], shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Tensors in the given order to files of at most `shard_bytes` of data (a larger tensor has one of its own).

    Inside a file wide types come first, as safetensors itself orders them, so that every tensor is aligned.
    """
    parts: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if parts[-1] and sum(other.nbytes for other in parts[-1]) + spec.nbytes > shard_bytes:
            parts.append([])
        parts[-1].append(spec)
    count = len(parts)
    names = ["model.safetensors"] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    ordered = (tuple(sorted(part, key=lambda spec: -DTYPE_BYTES[spec.dtype])) for part in parts)
    return [Shard(name, tensors) for name, tensors in zip(names, ordered, strict=True)]


class ShardWriter:
    """Context manager: `write` tensors in any order, `mark` points that a resumed run need not repeat, `finish`.

    Files that already have the same header and size are kept as they are, so that a resumed run goes on in them.

    Args:
        directory: the working directory of `common.outputs.output_directory`. shards: from `shards_of`.
        queue_bytes: how much may wait to be written; one tensor always may.

    Raises:
        UserError: the disk is full or read-only (on entry for the whole size, else from any method).
    """

    def __init__(self, directory: Path, shards: Sequence[Shard], queue_bytes: int):
        self._directory, self._shards, self._limit = directory, shards, queue_bytes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._pending: deque[tuple[Future[None], int]] = deque()
        self._pending_bytes = 0
        self._error: BaseException | None = None
        self._files: list[int] = []
        self._places: dict[str, tuple[int, int, TensorSpec]] = {}

    def __enter__(self) -> ShardWriter:
        try:
            for shard in self._shards:
                if not shard.is_laid_out(self._directory):
                    shard.lay_out(self._directory)
                with disk_errors(self._directory / shard.file):
                    file = os.open(self._directory / shard.file, os.O_WRONLY)
                self._files.append(file)
                offset = len(shard.header())
                for spec in shard.tensors:
                    assert spec.name not in self._places, f"{spec.name} is written twice"
                    self._places[spec.name] = (file, offset, spec)
                    offset += spec.nbytes
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    def _close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        for file in self._files:
            os.close(file)
        self._files.clear()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Queue one tensor; it must not change any more."""
        spec = self._places[name][2]
        assert tuple(tensor.shape) == spec.shape, f"{name} is {list(tensor.shape)}, the header says {list(spec.shape)}"
        self.write_bytes(name, 0, tensor.contiguous().view(-1).view(torch.uint8).numpy())

    def write_bytes(self, name: str, offset: int, data: np.ndarray) -> None:
        """Queue a piece of a tensor's bytes, uint8, which lies `offset` bytes into it."""
        file, start, spec = self._places[name]
        assert offset + data.nbytes <= spec.nbytes, f"{name} has {spec.nbytes} bytes"
        self._submit(lambda: _write(file, start + offset, data), data.nbytes)

    def mark(self, reached: Callable[[], None]) -> None:
        """Call `reached` when everything queued so far is on the disk."""

        def settle() -> None:
            for file in self._files:
                os.fdatasync(file)
            reached()

        self._submit(settle, 0)

    def finish(self) -> None:
        """Wait for all writes; write the index where there are several shards."""
        while self._pending:
            self._settle_oldest()
        if len(self._shards) > 1:
            total = sum(shard.nbytes for shard in self._shards)
            weight_map = {spec.name: shard.file for shard in self._shards for spec in shard.tensors}
            write_json(self._directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})

    def _submit(self, task: Callable[[], None], nbytes: int) -> None:
        while self._pending and (self._pending[0][0].done() or self._pending_bytes + nbytes > self._limit):
            self._settle_oldest()
        self._pending.append((self._thread.submit(self._unless_failed, task), nbytes))
        self._pending_bytes += nbytes

    def _unless_failed(self, task: Callable[[], None]) -> None:
        """Once a write has failed nothing goes on behind it: a mark must not claim what is not on disk."""
        if self._error is not None:
            raise self._error
        try:
            task()
        except BaseException as error:
            self._error = error
            raise

    def _settle_oldest(self) -> None:
        future, nbytes = self._pending.popleft()
        self._pending_bytes -= nbytes
        with disk_errors(self._directory):
            future.result()


def _write(file: int, offset: int, data: np.ndarray) -> None:
    view = data.data
    done = 0
    while done < len(view):
        done += os.pwrite(file, view[done:], offset + done)
