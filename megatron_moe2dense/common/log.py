"""Logging to stderr: one logger for the package, plain lines, a rank prefix inside a distributed job."""

from __future__ import annotations

import logging
import os
import sys

logger = logging.getLogger("megatron_moe2dense")


def start_logging(level: int = logging.INFO) -> None:
    """Send the package's log lines to stderr. Ranks other than 0 only report warnings. Safe to call again."""
    rank = os.environ.get("RANK")
    prefix = f"[rank {rank}] " if rank else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{prefix}%(levelname).1s %(message)s"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level if rank in (None, "0") else logging.WARNING)
