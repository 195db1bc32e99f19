"""Seconds a rank spends in collectives: on CPU blocked in gloo, on a GPU the time its compute stream stands still for NCCL.

Every collective of `torch.distributed`, whoever calls it and by whatever name, ends in a method of `ProcessGroup` and, unless the
backend ran it on the compute stream, a `Work.wait`: these are timed. Communication that hides behind computation costs no time here.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

_COLLECTIVES = (
    *("allreduce", "allreduce_coalesced", "broadcast", "reduce", "gather", "scatter", "barrier", "send", "recv", "recv_anysource"),
    *("allgather", "allgather_coalesced", "_allgather_base", "all_gather_single"),
    *("allgather_into_tensor_coalesced", "all_gather_single_coalesced", "reduce_scatter_single_coalesced"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single", "reduce_scatter_tensor_coalesced"),
    *("alltoall", "alltoall_base", "all_to_all_single"),
)


class CollectiveTime:
    """What `timed` collected; on a GPU, reading `seconds` waits for the device."""

    def __init__(self) -> None:
        self._host = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def seconds(self) -> float:
        """Of this rank."""
        if self._events:
            torch.cuda.synchronize()
        return self._host + sum(start.elapsed_time(end) for start, end in self._events) / 1e3

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Add the duration of the block; CUDA events on the current stream measure it without waiting."""
        if torch.cuda.is_available():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            begun = time.perf_counter()
            yield
            self._host += time.perf_counter() - begun


@contextlib.contextmanager
def timed() -> Iterator[CollectiveTime]:
    """Time the collectives of this process inside the block; outside it nothing is wrapped and nothing costs."""
    spent = CollectiveTime()
    names: list[tuple[type, str]] = [(dist.ProcessGroup, name) for name in _COLLECTIVES if hasattr(dist.ProcessGroup, name)]
    names.append((dist.Work, "wait"))
    # the descriptors themselves: what getattr gives of a C++ method does not bind again
    before = [(owner, name, vars(owner)[name]) for owner, name in names]
    for owner, name in names:
        setattr(owner, name, _wrapped(getattr(owner, name), spent))
    try:
        yield spent
    finally:
        for owner, name, method in before:
            setattr(owner, name, method)


def _wrapped(method: Callable[..., Any], spent: CollectiveTime) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        with spent.measured():
            return method(*args, **options)

    return call
