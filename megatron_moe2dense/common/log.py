"""Logging to stderr: one logger for the package, plain lines with the clock time, a rank prefix inside a distributed job."""

from __future__ import annotations

import logging
import os
import sys
import warnings

logger = logging.getLogger("megatron_moe2dense")


def start_logging(level: int = logging.INFO) -> None:
    """Send the package's log lines to stderr, and theirs alone. Ranks other than 0 only report warnings. Safe to call again."""
    quieten_libraries()
    rank = os.environ.get("RANK")
    prefix = f"[rank {rank}] " if rank else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(levelname).1s %(message)s", "%m-%d %H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level if rank in (None, "0") else logging.WARNING)


def quieten_libraries() -> None:
    """Before they are imported: no warnings of theirs, about code that a user did not write (`python -W` and PYTHONWARNINGS bring them
    back), no bars, which a file does not bear, and no line whenever torch's profiler starts and stops."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for name, value in (("HF_HUB_DISABLE_PROGRESS_BARS", "1"), ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1"), ("KINETO_LOG_LEVEL", "99")):
        os.environ.setdefault(name, value)
