"""What the tests of interrupted runs share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Columns of metrics.jsonl that come from a clock, or from how much memory the process happened to take.
TIMED = {"step_seconds", "data_seconds", "collective_seconds", "tokens_per_second", "flops_per_second", "mfu", "peak_memory_bytes"}


def command(root: Path, output: Path, length: int, settings: dict[str, Any], overrides: dict[str, Any]) -> list[str]:
    """Arguments of a distillation of `root`'s student; overrides are keyword arguments, with `__` for the dots of their keys."""
    given = {
        "student": root / "student",
        "teacher": root / "teacher",
        "output": output,
        "data.path": root / "tokens",
        "data.validation": root / "held-out",
        "data.validation_sequences": 4,
        "data.sequence_length": length,
        "batch.micro": 2,
        "batch.global": 4,
        "optim.lr": 1e-3,
        "teacher_check.loss_bound": "null",
        "dtype": "float32",
        **settings,
        **{name.replace("__", "."): value for name, value in overrides.items()},
    }
    return ["distill", *(f"{name}={value}" for name, value in given.items())]
