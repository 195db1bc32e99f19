"""What the tests of whole runs share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers.tiny_models import tiny_qwen3, write_tokens

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


def with_student(root: Path) -> Path:
    """A folder with a tiny student and the text of `alone`: 24 steps."""
    tiny_qwen3(root / "student", seed=2)
    write_tokens(root / "tokens", 16 * 4 * 24 + 1)
    return root


def alone(root: Path, output: str, **settings: Any) -> dict[str, Any]:
    """The config of a plain language-modelling run of `with_student`'s."""
    return {
        "student": str(root / "student"),
        "teacher": None,
        "output": str(root / output),
        "data": {"path": str(root / "tokens"), "sequence_length": 16},
        "batch": {"micro": 2, "global": 4},
        "train": {"steps": 3},
        "dtype": "float32",
        **settings,
    }
