"""A machine whose /dev/shm takes nothing: a full, closed or read-only one, where processes can share no semaphore."""

from __future__ import annotations

import _multiprocessing
import errno
import os
from typing import Any

import pytest


def no_semaphores(monkeypatch: pytest.MonkeyPatch, code: int = errno.ENOSPC) -> None:
    """For this process and its forks."""

    def refuse(*_arguments: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(_multiprocessing, "SemLock", refuse)
