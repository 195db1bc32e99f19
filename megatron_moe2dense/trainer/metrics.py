"""Where numbers of a run go: metrics.jsonl always, TensorBoard and W&B when asked for. Only on the rank that has them."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import torch

from megatron_moe2dense.common import records
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.trainer.config import DistillConfig


class Metrics:
    """Writes rows; `writes` is False on all ranks but one.

    Args:
        config: of the run. run_id: stable over resumes, so that W&B continues the same run. resumed_step: rows beyond it are dropped.
    """

    def __init__(self, config: DistillConfig, writes: bool, run_id: str, resumed_step: int):
        self._path = Path(config.output) / "metrics.jsonl"
        self._writes = writes
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not writes:
            return
        if self._path.exists():
            records.rewrite(self._path, [row for row in records.read(self._path) if row["step"] <= resumed_step])
        if config.logging.tensorboard:
            self._tensorboard = _tensorboard(Path(config.output) / "tensorboard", resumed_step)
        if config.logging.wandb is not None:
            self._wandb = _wandb(config, run_id)

    def write(self, row: dict[str, Any]) -> None:
        """One row; `step` is its key."""
        if not self._writes:
            return
        records.append(self._path, row)
        numbers = {name: float(value) for name, value in row.items() if name != "step" and value is not None}
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=row["step"])

    def close(self) -> None:
        """Flush and end."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _tensorboard(directory: Path, resumed_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise _missing("tensorboard", "train") from None
    return SummaryWriter(str(directory), purge_step=resumed_step + 1)


def _wandb(config: DistillConfig, run_id: str) -> Any:
    try:
        import wandb
    except ImportError:
        raise _missing("wandb", "wandb") from None
    settings = config.logging.wandb
    assert settings is not None
    mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    return wandb.init(
        project=settings.project,
        name=settings.name,
        id=run_id,
        resume="allow",
        mode=os.environ.get("WANDB_MODE", mode),  # type: ignore[arg-type]
        dir=config.output,
        config=config.model_dump(mode="json"),
    )


def _missing(package: str, extra: str) -> UserError:
    return UserError(f"logging asks for {package}, which is not installed", package, f"pip install 'megatron_moe2dense[{extra}]'")


def peak_memory_bytes() -> int:
    """Peak device memory allocated on a GPU, peak resident memory of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
