"""Trainer checkpoints through Megatron's distributed checkpointing: `checkpoints/step_00000100/`, complete or absent."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import disk_errors
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.model import HeadlessGPT

_NAME = re.compile(r"step_(\d{8})")


def latest(directory: Path) -> Path | None:
    """The complete checkpoint of the highest step, None when there is none. Half-written ones end in .tmp and never match."""
    found = [path for path in directory.glob("step_*") if _NAME.fullmatch(path.name)]
    return max(found, default=None)


def step_of(path: Path) -> int:
    """The step a checkpoint was taken after."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise UserError(f"{path} is no checkpoint", "a folder like step_00000100", "point to a run directory or one of its checkpoints")
    return int(match[1])


class Checkpointer:
    """Saves and loads model, optimizer, schedule and progress; on every rank alike.

    Args:
        directory: `<output>/checkpoints`. keep: how many to keep.
    """

    def __init__(self, directory: Path, keep: int, groups: Groups):
        self.directory, self._keep = directory, keep
        self._metadata = {
            "dp_cp_group": groups.collection.dp_cp,
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
            "chained_optim_avoid_prefix": True,
            "singleton_local_shards": False,
        }

    def _state(self, chunks: list[HeadlessGPT], optimizer: MegatronOptimizer, loading: bool) -> dict[str, Any]:
        weights = _weights(chunks, self._metadata)
        state = optimizer.sharded_state_dict(weights, is_loading=loading, metadata=self._metadata)
        return {"model": weights, "optimizer": state}

    def save(
        self, chunks: list[HeadlessGPT], optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, progress: dict[str, Any]
    ) -> None:
        """Write `step_N` (N = progress["step"]) beside the others, then drop the oldest."""
        final = self.directory / f"step_{progress['step']:08d}"
        partial = final.with_name(final.name + ".tmp")
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        content = {**self._state(chunks, optimizer, loading=False), "scheduler": scheduler.state_dict(), "progress": progress}
        described = {name: value for name, value in self._metadata.items() if name != "dp_cp_group"}
        with disk_errors(final):
            dist_checkpointing.save(content, str(partial), content_metadata=described)
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            self._drop_old()
        dist.barrier()

    def _drop_old(self) -> None:
        complete = sorted(path for path in self.directory.glob("step_*") if _NAME.fullmatch(path.name))
        for path in complete[: -self._keep]:
            shutil.rmtree(path)

    def load(
        self, path: Path, chunks: list[HeadlessGPT], optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler
    ) -> dict[str, Any]:
        """Restore everything from `path`; returns its progress. The parallel layout may differ from the one that saved."""
        state: Any = dist_checkpointing.load(self._state(chunks, optimizer, loading=True), str(path))
        _fill(chunks, state)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        return state["progress"]


def load_weights(path: Path, chunks: list[HeadlessGPT], groups: Groups) -> None:
    """Only the weights, for export."""
    _fill(chunks, dist_checkpointing.load({"model": _weights(chunks, {"dp_cp_group": groups.collection.dp_cp})}, str(path)))


def _weights(chunks: list[HeadlessGPT], metadata: dict[str, Any]) -> dict[str, Any]:
    """By number of the chunk; on disk tensors are known by global layer numbers, so chunks may change between runs."""
    return {str(number): chunk.sharded_state_dict(metadata=metadata) for number, chunk in enumerate(chunks)}


def _fill(chunks: list[HeadlessGPT], state: Any) -> None:
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(state["model"][str(number)])
