"""The hidden states of all windows between two layers: in memory while they fit a budget, else in a memory-mapped file. With a
directory, the states before each layer are also on disk, complete or not at all, so that a killed run goes on from there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_moe2dense.common.outputs import disk_errors


@dataclass(frozen=True)
class HiddenPlace:
    """Where hidden states live. directory: of their files, None to keep them in memory alone. budget: bytes of memory above which
    they live in the files only. name: tells the files of several ranks apart."""

    directory: Path | None = None
    budget: int | None = None
    name: str = "hidden"

    def path(self, layer: int) -> Path:
        """The file with the states before `layer` (after the last one: the number of layers)."""
        assert self.directory is not None, "states in memory alone have no file"
        return self.directory / f"{self.name}-{layer:05d}.bin"


class HiddenStates:
    """States [N, S, D] of one layer, read and replaced batch by batch: `states[i]` before the layer, `put(i, ...)` after it, and
    `advance` when all are put.

    Args:
        shape: N windows, S tokens, D channels (or several streams of D). batch: windows of one batch.
        layer: where they stand. At a layer above 0 the file of an earlier run is taken up.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, batch: int, place: HiddenPlace, layer: int = 0):
        self._shape, self._dtype, self._batch, self._place = shape, dtype, batch, place
        self.layer = layer
        self.nbytes = prod(shape) * dtype.itemsize
        self.spills = place.directory is not None and place.budget is not None and self.nbytes > place.budget
        self._now = self._map(place.path(layer)) if layer else None
        if not self.spills:
            # One buffer for all layers: a batch is read before it is replaced.
            memory_NSD = torch.empty(shape, dtype=dtype)
            self._now = memory_NSD if self._now is None else memory_NSD.copy_(self._now)
        self._next: torch.Tensor | None = None

    def __len__(self) -> int:
        return -(-self._shape[0] // self._batch)

    def __getitem__(self, i: int) -> torch.Tensor:
        """Batch i, [batch, S, D], on the CPU; it may change with the next `put`."""
        if i not in range(len(self)):
            raise IndexError(i)
        assert self._now is not None, "states before layer 0 have to be put first"
        return self._now[i * self._batch : (i + 1) * self._batch]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[i] for i in range(len(self)))

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self._shape[1]

    @property
    def batch(self) -> int:
        """Windows of a batch."""
        return self._batch

    def windows(self, chosen: torch.Tensor) -> torch.Tensor:
        """[len(chosen), S, D], a copy on the CPU."""
        assert self._now is not None, "every batch was put"
        return self._now[chosen]

    def put(self, i: int, y_BSD: torch.Tensor) -> None:
        """Batch i after the layer."""
        if self.spills and self._next is None:
            self._next = self._create(self._partial)
        target = self._next if self.spills else self._now
        assert target is not None, "memory is there from the start"
        target[i * self._batch : (i + 1) * self._batch].copy_(y_BSD)

    def advance(self, layer: int) -> None:
        """All batches are put: they are the states before `layer` from now on. The file of the layer before stays."""
        self.layer = layer
        if self._place.directory is None or (layer == 0 and not self.spills):  # what comes before layer 0 is quickly made again
            return
        if not self.spills:
            assert self._now is not None, "memory is there from the start"
            self._next = self._create(self._partial).copy_(self._now)
        assert self._next is not None, "every batch was put"
        self._next = None  # unmapped
        with disk_errors(self._partial):
            descriptor = os.open(self._partial, os.O_RDWR)
            os.fsync(descriptor)
            os.close(descriptor)
            self._partial.replace(self._place.path(layer))
        if self.spills:
            self._now = self._map(self._place.path(layer))

    def forget_others(self) -> None:
        """Remove the files of other layers: what they are for has been done."""
        if self._place.directory is not None:
            for path in self._place.directory.glob(f"{self._place.name}-*"):
                if path != self._place.path(self.layer):
                    path.unlink()

    @property
    def _partial(self) -> Path:
        assert self._place.directory is not None, "states in memory alone have no file"
        return self._place.directory / f"{self._place.name}-next.tmp"

    def _create(self, path: Path) -> torch.Tensor:
        """A mapped file of the states' size; its blocks are reserved, since a full disk would kill a process that writes to a map."""
        with disk_errors(path), path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, self.nbytes)
        return self._map(path)

    def _map(self, path: Path) -> torch.Tensor:
        count: Any = self.nbytes // self._dtype.itemsize
        return torch.from_file(str(path), shared=True, size=count, dtype=self._dtype).view(self._shape)
