"""What holds for all tests of the trainer."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_moe2dense.trainer  # noqa: F401 - before tests import Megatron-Core by themselves: 0.18 and later need its stand-in for triton

# Process groups of one run have some fifty threads.
_MANY_THREADS = 64


@pytest.fixture(autouse=True)
def _groups_of_refused_runs_end() -> Iterator[None]:
    """An error keeps the frames it went through, and with them the run's process groups, whose threads poll, until Python looks for
    cycles: a worker with a thousand of them leaves the tests after it a third of the machine."""
    yield
    if sum(1 for _ in Path("/proc/self/task").iterdir()) > _MANY_THREADS:
        gc.collect()
