"""What a trainer checkpoint holds, through Megatron's distributed checkpointing: weights, optimizer, schedule, random states, progress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.trainer.agreement import raise_on_all_ranks
from megatron_moe2dense.trainer.checkpoints import checksums, pickles
from megatron_moe2dense.trainer.checkpoints.writer import Writer, complete
from megatron_moe2dense.trainer.config import TrainConfig
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.model import HeadlessGPT

# Of what a checkpoint holds besides tensors; those without a number are of format 1.
FORMAT = 1


class Checkpointer:
    """Saves and loads model, optimizer, schedule and progress; on every rank alike.

    Args:
        directory: `<output>/checkpoints`. settings: how many to keep, and whether training goes on while one is written.
    """

    def __init__(self, directory: Path, settings: TrainConfig, groups: Groups):
        self.directory, self._behind = directory, settings.async_save
        self._writer = Writer(directory, settings.keep)
        self._alike = isinstance(settings.parts, str)
        self._layout = {"processes": dist.get_world_size(), **groups.parallel.model_dump()}
        self._metadata = {
            "dp_cp_group": groups.collection.dp_cp,
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
            "chained_optim_avoid_prefix": True,
            "singleton_local_shards": False,
        }

    def _state(self, chunks: list[HeadlessGPT], optimizer: MegatronOptimizer, loading: bool) -> dict[str, Any]:
        weights = _weights(chunks, self._metadata)
        # Layers stand in one tensor on disk; where some alone are trained the optimizer has not all of it, and puts each into its own.
        known = weights if self._alike else _weights(chunks, {**self._metadata, "non_homogeneous_layers": True})
        state = optimizer.sharded_state_dict(known, is_loading=loading, metadata=self._metadata)
        return {"model": weights, "optimizer": state}

    def save(
        self, chunks: list[HeadlessGPT], optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, progress: dict[str, Any]
    ) -> None:
        """Write `step_N` (N = progress["step"]) beside the others, then drop the oldest; see `Writer.start` for errors."""
        content = {
            **self._state(chunks, optimizer, loading=False),
            "random": _random_states(),
            "scheduler": scheduler.state_dict(),
            "progress": progress,
            "layout": self._layout,
            "format": FORMAT,
        }
        described = {name: value for name, value in self._metadata.items() if name != "dp_cp_group"}
        self._writer.start(progress["step"], content, described)
        if not self._behind:
            self._writer.wait()

    def _check_layout(self, path: Path, saved: dict[str, Any], moe: bool) -> None:
        """UserError where Megatron-Core can not reshard optimizer states; all other sizes may change."""
        for name in ("distributed_optimizer", *(["expert"] if moe else [])):
            if saved[name] != self._layout[name]:
                setting = f"parallel.{name}={str(saved[name]).lower()}"
                problem = f"the same parallel.{name} in all parts of this run: optimizer states do not reshard over it"
                raise UserError(f"{path} was written with {setting}", problem, f"set {setting}")

    def poll(self) -> None:
        """Complete the save in flight if it can be; once a step, on every rank."""
        self._writer.poll()

    def wait(self) -> None:
        """Complete the save in flight; UserError when it failed."""
        self._writer.wait()

    def load(
        self, path: Path, chunks: list[HeadlessGPT], optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler
    ) -> dict[str, Any]:
        """Restore everything from `path`; returns its progress.

        The parallel layout may differ from the one that saved; random states are only restored in the same one.

        Raises:
            UserError: files changed since they were written; a checkpoint of another model.
        """
        verify(path)
        wanted = self._state(chunks, optimizer, loading=True)
        check_shapes(path, wanted["model"])
        layout = _common(path)["layout"]
        self._check_layout(path, layout, moe=chunks[0].config.num_moe_experts is not None)
        same_layout = layout == self._layout
        if same_layout:
            wanted["random"] = _random_states()
        else:
            logger.info("%s was written in another parallel layout: random states start anew", path)
        with pickles.as_data():
            state: Any = dist_checkpointing.load(wanted, str(path))
        _fill(chunks, state)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        if same_layout:
            _restore_random_states(state["random"])
        return state["progress"]


def load_weights(path: Path, chunks: list[HeadlessGPT], groups: Groups) -> None:
    """Only the weights, for export; errors as of `Checkpointer.load`."""
    verify(path)
    _common(path)
    weights = _weights(chunks, {"dp_cp_group": groups.collection.dp_cp})
    check_shapes(path, weights)
    with pickles.as_data():
        state = dist_checkpointing.load({"model": weights}, str(path))
    _fill(chunks, state)


def _common(path: Path) -> dict[str, Any]:
    """What belongs to no tensor; UserError for a format that this version does not read."""
    with pickles.as_data():
        common = dist_checkpointing.load_common_state_dict(str(path))
    found = common.get("format", 1)
    if found != FORMAT:
        raise UserError(f"{path}: a checkpoint of format {found}", f"format {FORMAT}", "use the version of this package that wrote it")
    return common


def verify(path: Path) -> None:
    """Read all files of a checkpoint, each rank its share of them, before anything is unpickled.

    Raises:
        UserError: on every rank, when a file is not as it was written or would run code of its own.
    """
    with raise_on_all_ranks():
        fault = checksums.broken(path, slice(dist.get_rank(), None, dist.get_world_size()))
        if fault is not None:
            before = [other for other in complete(path.parent) if other.name < path.name]
            then = f"the same command then continues from {before[-1].name}" if before else "the same command then starts from step 0"
            raise UserError(fault, f"the files that {checksums.LISTING} lists, as they were written", f"remove {path}; {then}")
        pickles.require_data(path)


def check_shapes(path: Path, weights: dict[str, Any]) -> None:
    """UserError when the checkpoint is one of another model than these weights belong to."""
    with pickles.as_data():
        saved = dist_checkpointing.load_tensors_metadata(str(path))
    with raise_on_all_ranks():
        for tensor in nested_values(weights):
            found: Any = saved.get(tensor.key) if isinstance(tensor, ShardedTensor) else tensor
            if found is None or (found is not tensor and tuple(found.global_shape) != tuple(tensor.global_shape)):
                has = "absent" if found is None else list(found.global_shape)
                raise UserError(
                    f"{path}: {tensor.key} is {has}, in the student's model {list(tensor.global_shape)}",
                    "a checkpoint of the student that the run began with",
                    "give `student` as it was, or start in another output",
                )


def _random_states() -> ShardedObject:
    """This rank's generators; each rank has its own."""
    tracker: Any = tensor_parallel.get_cuda_rng_tracker()
    states = {"torch": torch.get_rng_state(), "megatron": tracker.get_states()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return ShardedObject("random", states, (dist.get_world_size(),), (dist.get_rank(),))


def _restore_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    tracker: Any = tensor_parallel.get_cuda_rng_tracker()
    tracker.set_states(states["megatron"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _weights(chunks: list[HeadlessGPT], metadata: dict[str, Any]) -> dict[str, Any]:
    """By number of the chunk; on disk tensors are known by global layer numbers, so chunks may change between runs."""
    return {str(number): chunk.sharded_state_dict(metadata=metadata) for number, chunk in enumerate(chunks)}


def _fill(chunks: list[HeadlessGPT], state: Any) -> None:
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(state["model"][str(number)])
