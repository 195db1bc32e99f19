"""Lazy reading of checkpoint tensors with positioned reads: whole, a slice, or passed by in chunks to check or copy them.
Nothing is memory-mapped, so resident memory is what the caller holds, however large the checkpoint."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from megatron_moe2dense.checkpoint.index import CheckpointIndex, TensorInfo
from megatron_moe2dense.common.errors import UserError

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.uint8,  # exponents; torch has a type of its own for them from 2.7 on
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# By dtype: integers of the same width and the bits of +infinity (of NaN where the type has no infinity). Everything that is not
# finite lies at or above them, with the sign bit too: two maxima without temporaries tell, at the speed of memory.
_NOT_FINITE = {
    "F64": (np.int64, np.uint64, 0x7FF << 52),
    "F32": (np.int32, np.uint32, 0xFF << 23),
    "BF16": (np.int16, np.uint16, 0x7F80),
    "F16": (np.int16, np.uint16, 0x7C00),
    "F8_E4M3": (np.int8, np.uint8, 0x7F),
    "F8_E5M2": (np.int8, np.uint8, 0x7C),
}
# By torch's type of the same numbers: its name, and torch's integers of the same width.
_WORDS = {
    TORCH_DTYPES[code]: (code, {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[np.dtype(signed).itemsize])
    for code, (signed, _, _) in _NOT_FINITE.items()
}
_CHUNK = 1024**2  # bytes of one read: it is still in the cache when it is checked


class CheckpointReader:
    """Context manager that opens each file once and reads tensors on demand, from any number of threads.

    Args:
        index: the opened checkpoint.
    """

    def __init__(self, index: CheckpointIndex):
        self.index = index
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def _place(self, name: str) -> tuple[TensorInfo, int]:
        self.index.require([name])
        info = self.index.tensors[name]
        with self._lock:
            if info.file not in self._files:
                self._files[info.file] = os.open(info.file, os.O_RDONLY)
            return info, self._files[info.file]

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU, in the dtype it is stored in. UserError when absent."""
        return self._whole(name, check=False)

    def finite(self, name: str) -> torch.Tensor:
        """As `tensor`, but a NaN or infinite value is a UserError."""
        return self._whole(name, check=True)

    def check(self, name: str) -> None:
        """As `finite`, without keeping the tensor: UserError when a value is NaN or infinite."""
        info, file = self._place(name)
        if info.dtype in _NOT_FINITE:
            scratch = np.empty(min(_CHUNK, info.nbytes), np.uint8)
            # Several threads read one file in turns, which the system takes for random access: tell it what is coming.
            os.posix_fadvise(file, info.start, info.nbytes, os.POSIX_FADV_WILLNEED)
            for start in range(0, info.nbytes, _CHUNK):
                chunk = scratch[: info.nbytes - start]
                _read(file, info.start + start, chunk)
                self._require_finite(info, chunk)

    def chunks(self, name: str, nbytes: int, finite: bool = False) -> Iterator[tuple[int, np.ndarray]]:
        """(offset, bytes) pieces of a tensor's stored bytes, each a new array of at most `nbytes`.

        Args:
            nbytes: a multiple of 8. finite: a NaN or infinite value is a UserError.
        """
        info, file = self._place(name)
        for start in range(0, info.nbytes, nbytes):
            chunk = np.empty(min(nbytes, info.nbytes - start), np.uint8)
            _read(file, info.start + start, chunk)
            if finite:
                self._require_finite(info, chunk)
            yield start, chunk

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors have the same type, shape and bytes; reads no further than the first difference."""
        ours, theirs = self._place(name)[0], self._place(other)[0]
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            return False
        pairs = zip(self.chunks(name, _CHUNK), self.chunks(other, _CHUNK), strict=True)
        return all(np.array_equal(mine[1], its[1]) for mine, its in pairs)

    def rows(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        """Only `start:stop` along `axis` (0 or 1); memory holds little more than the result."""
        info, file = self._place(name)
        assert axis in (0, 1), "slices are along the first or the second axis"
        per_row = info.nbytes // info.shape[0] if info.shape[0] else 0
        if axis == 0:
            start, stop, _ = slice(start, stop).indices(info.shape[0])
            raw = torch.empty(max(0, stop - start) * per_row, dtype=torch.uint8)
            _read(file, info.start + start * per_row, raw.numpy())
            return raw.view(TORCH_DTYPES[info.dtype]).view(-1, *info.shape[1:])
        at_once = max(1, _CHUNK // max(1, per_row))
        parts = [self.rows(name, 0, first, first + at_once)[:, start:stop] for first in range(0, info.shape[0], at_once)]
        return torch.cat(parts) if parts else self.tensor(name)

    def _whole(self, name: str, check: bool) -> torch.Tensor:
        info, file = self._place(name)
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        buffer = raw.numpy()
        for start in range(0, info.nbytes, _CHUNK):
            chunk = buffer[start : start + _CHUNK]
            _read(file, info.start + start, chunk)
            if check:
                self._require_finite(info, chunk)
        return raw.view(TORCH_DTYPES[info.dtype]).view(info.shape)

    def _require_finite(self, info: TensorInfo, chunk: np.ndarray) -> None:
        if not _are_finite(chunk, info.dtype):
            whole = self.tensor(info.name)
            bad = int((~torch.isfinite(whole.float() if whole.element_size() == 1 else whole)).sum())
            raise UserError(
                f"{info.file}: {info.name} has {bad} NaN or infinite of {whole.numel()} values",
                "finite weights",
                "download the checkpoint again",
            )


def are_finite(tensor: torch.Tensor) -> bool:
    """Whether no value of a tensor on the CPU is NaN or infinite."""
    if tensor.dtype not in _WORDS:
        return bool(torch.isfinite(tensor).all())
    code, words = _WORDS[tensor.dtype]
    return _are_finite(tensor.detach().view(words).numpy(), code)


def _are_finite(bits: np.ndarray, dtype: str) -> bool:
    """bits: of values of this type, in words of any type; true for types that hold nothing else."""
    if dtype not in _NOT_FINITE or not bits.size:
        return True
    signed, unsigned, first = _NOT_FINITE[dtype]
    sign = 1 << (8 * np.dtype(signed).itemsize - 1)
    return int(bits.view(signed).max()) < first and int(bits.view(unsigned).max()) < first | sign


def _read(file: int, offset: int, into: np.ndarray) -> None:
    """Fill `into` from `offset` on; UserError when the file ends before."""
    view = into.data
    done = 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], offset + done)
        if count == 0:
            raise UserError(f"file ends at byte {offset + done}", "the length it had when it was opened", "do not change it meanwhile")
        done += count
