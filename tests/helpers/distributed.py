"""What processes that a test starts have in common: environment and ports."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """One thread a process and the loopback interface, so that several jobs do not spin against each other."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # an unpacked Megatron-Core may be on it
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}


def free_port() -> int:
    """Of this machine, at this moment: below those that the system hands out itself, which a connection may take before it is used."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.SystemRandom().randrange(10_000, 32_000)))
            return probe.getsockname()[1]
