"""The numbers of a run and where they go: metrics.jsonl always, TensorBoard and W&B when asked for. Only on the rank that has them."""

from __future__ import annotations

import importlib.util
import os
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe2dense.common import records
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import commit, versions
from megatron_moe2dense.trainer.config import DistillConfig, LoggingConfig
from megatron_moe2dense.trainer.state import TrainState
from megatron_moe2dense.trainer.step import StepLoss


@dataclass(frozen=True)
class Speed:
    """What makes a rate of a step's seconds.

    Attributes:
        flops_per_token: `flops.training_flops`. tokens: processed in a step, masked ones too. peak: FLOP/s of all processes together,
            None where it is not known.
    """

    flops_per_token: float
    tokens: int
    peak: float | None

    def row(self, seconds: float) -> dict[str, float | None]:
        """flops_per_second and mfu, the share of the peak."""
        rate = self.flops_per_token * self.tokens / seconds
        return {"flops_per_second": rate, "mfu": round(rate / self.peak, 4) if self.peak else None}


@dataclass(frozen=True)
class StepFacts:
    """What one step was like.

    Attributes:
        result: losses and, at logged steps, measures. is_kl: the trained loss is KL(teacher || student) itself.
        grad_norm: None when there was no update. lr: of the matrices. seconds: of the step; data_seconds: of these, waiting for samples;
        collective_seconds: of these, in collectives (`runtime.collectives`), None where it was not timed.
    """

    result: StepLoss
    is_kl: bool
    grad_norm: float | None
    lr: float
    seconds: float
    data_seconds: float
    collective_seconds: float | None


def step_row(state: TrainState, facts: StepFacts, speed: Speed, memory: int) -> dict[str, Any]:
    """The row of a training step; the measures are in it when they were taken, the KL always when it is the loss."""
    result, seconds = facts.result, facts.seconds
    return {
        "step": state.step,
        "tokens": state.tokens,
        "loss": result.means[0],
        "kl": result.means[0] if facts.is_kl else result.measures.get("kl"),
        **{name: value for name, value in result.measures.items() if name != "kl"},
        "lr": facts.lr,
        "grad_norm": facts.grad_norm,
        "step_seconds": round(seconds, 4),
        "data_seconds": round(facts.data_seconds, 4),
        **({"collective_seconds": round(facts.collective_seconds, 4)} if facts.collective_seconds is not None else {}),
        "tokens_per_second": round(result.tokens / seconds, 1),
        **speed.row(seconds),
        "peak_memory_bytes": memory,
        "skipped": facts.grad_norm is None,
        "skipped_total": state.skipped_total,
    }


def eval_row(state: TrainState, result: StepLoss) -> dict[str, Any]:
    """The row of an evaluation: `eval_loss` is the student's cross-entropy; `eval_kl` is there in any case, None without a live teacher."""
    measured = dict(result.measures)
    loss, kl = measured.pop("cross_entropy"), measured.pop("kl", None)
    rest = {f"eval_{name}": value for name, value in measured.items()}
    return {"step": state.step, "tokens": state.tokens, "eval_loss": loss, "eval_kl": kl, **rest}


@dataclass(frozen=True)
class Tracked:
    """A run to W&B. run_id: the same through all its parts, and no other run's. facts: beside its config."""

    run_id: str
    facts: dict[str, Any]


def tracked(config: DistillConfig, recorded: dict[str, Any], teacher: dict[str, Any] | None) -> Tracked:
    """Of the run that has this manifest. teacher: what was verified of it, None without a live one."""
    facts = {
        "world_size": dist.get_world_size(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": commit(),
        "versions": versions(),
        "teacher_fingerprint": teacher and teacher["fingerprint"],
        "plan_hash": recorded.get("plan_hash"),
        "steps": config.steps(),
    }
    return Tracked(recorded.get("run_id", ""), facts)


class Metrics:
    """Writes rows; `writes` is False on all ranks but one.

    Args:
        config: of the run. known: what W&B is told of it. resumed_step: rows beyond it are dropped.
    """

    def __init__(self, config: DistillConfig, writes: bool, known: Tracked, resumed_step: int):
        self._path = Path(config.output) / "metrics.jsonl"
        self._writes = writes
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not writes:
            return
        require_loggers(config.logging)
        if self._path.exists():
            records.rewrite(self._path, [row for row in records.read(self._path) if row["step"] <= resumed_step])
        if config.logging.tensorboard:
            self._tensorboard = _tensorboard(Path(config.output) / "tensorboard", resumed_step)
        if config.logging.wandb is not None:
            self._wandb = _wandb(config, known)

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
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory), purge_step=resumed_step + 1)


def _wandb(config: DistillConfig, known: Tracked) -> Any:
    import wandb

    settings = config.logging.wandb
    assert settings is not None
    mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    return wandb.init(
        project=settings.project,
        name=settings.name or "/".join(Path(config.output).absolute().parts[-2:]),
        entity=settings.entity,
        group=settings.group,
        tags=settings.tags,
        notes=settings.notes,
        id=known.run_id,
        resume="allow",
        mode=os.environ.get("WANDB_MODE", mode),  # type: ignore[arg-type]
        dir=config.output,
        config={**config.model_dump(mode="json"), **known.facts},
        allow_val_change=True,  # machines and commits of a run's parts may differ
    )


def require_loggers(logging: LoggingConfig) -> str:
    """Where rows go; UserError for a package that is not installed."""
    asked = {"wandb": logging.wandb is not None, "tensorboard": logging.tensorboard}
    for package, extra in (("wandb", "wandb"), ("tensorboard", "train")):
        if asked[package] and importlib.util.find_spec(package) is None:
            raise UserError(f"logging asks for {package}, which is not installed", package, f"pip install 'megatron_moe2dense[{extra}]'")
    return ", ".join(["metrics.jsonl", *(package for package, wanted in asked.items() if wanted)])


def peak_memory_bytes() -> int:
    """Peak device memory allocated on a GPU, peak resident memory of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
