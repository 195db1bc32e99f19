"""SIGTERM and SIGUSR1 (a cluster taking its machines back) end a run after the current step, with a checkpoint."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

import torch
import torch.distributed as dist

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers that this process was asked to stop; `agreed` tells whether any process was."""

    def __init__(self) -> None:
        self._asked = False

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the block."""
        before = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agreed(self, device: torch.device) -> bool:
        """The same answer on every rank, so that all save the same step: a collective of one number."""
        asked = torch.tensor(int(self._asked), device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked)
