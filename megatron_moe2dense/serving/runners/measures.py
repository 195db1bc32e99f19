"""What the scripts of this folder measure alike. They find it beside them, in whichever interpreter they run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_bytes(pid: int | str = "self") -> int | None:
    """The most memory that a process has held, where the system says so; getrusage's is that of the process before it as well."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def rates(timed: Callable[[int, int], float], speed: dict[str, Any]) -> dict[str, float]:
    """Tokens a second of reading a prompt and of writing, alone and for a batch. timed: seconds for so many copies of the prompt with so
    many tokens after each."""
    new, batch, read = speed["new_tokens"], speed["batch"], timed(1, 1)
    return {
        "prompt": len(speed["prompt"]) / read,
        "decode": (new - 1) / max(timed(1, new) - read, 1e-9),
        "decode_batch": batch * (new - 1) / max(timed(batch, new) - timed(batch, 1), 1e-9),
    }
