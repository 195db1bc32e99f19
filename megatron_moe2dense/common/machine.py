"""This machine, as far as every command may ask: nothing to install, nothing heavy to import."""

from __future__ import annotations

from pathlib import Path


def free_memory() -> int | None:
    """Bytes of host memory that new processes may take; None where the kernel does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
