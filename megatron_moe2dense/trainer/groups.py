"""Process groups of a run, made once and passed on; nothing else in the trainer asks for a global group."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import distributed_c10d

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.trainer.config import BatchConfig, ParallelConfig
from megatron_moe2dense.trainer.runtime import PATIENCE


class _Alone:
    """Stands for a process group of one member."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@dataclass(frozen=True)
class Groups:
    """Megatron's collection of groups and this rank's place in them."""

    collection: ProcessGroupCollection
    parallel: ParallelConfig

    @classmethod
    def alone(cls) -> Groups:
        """Of a process that communicates with nobody: there is no process group behind them."""
        return cls(ProcessGroupCollection(**{field.name: _Alone() for field in fields(ProcessGroupCollection)}), ParallelConfig())

    @property
    def tensor_rank(self) -> int:
        """Place in the tensor-parallel group."""
        return self.collection.tp.rank()

    @property
    def expert_rank(self) -> int:
        """Place in the expert-parallel group."""
        return self.collection.ep.rank()

    @property
    def stage(self) -> int:
        """Pipeline stage."""
        return self.collection.pp.rank()

    @property
    def is_first_stage(self) -> bool:
        """Holds the embedding."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Holds the final norm and the LM head."""
        return self.stage == self.parallel.pipeline - 1

    @property
    def data_rank(self) -> int:
        """Place in the data-parallel group."""
        return self.collection.dp.rank()

    @property
    def data_size(self) -> int:
        """Ranks that read different samples."""
        return self.collection.dp.size()

    @property
    def writes_metrics(self) -> bool:
        """True on the one rank that writes metrics: first of its kind on the last stage, where the loss is."""
        return self.is_last_stage and self.tensor_rank == 0 and self.collection.dp_cp.rank() == 0


@contextlib.contextmanager
def initialized(parallel: ParallelConfig, seed: int, patience: float = PATIENCE) -> Iterator[Groups]:
    """Megatron's process groups for this layout, with seeded random states; destroyed at the end. patience: as of `runtime.session`.

    Raises:
        UserError: the number of processes does not fit the layout.
    """
    require_world(parallel, dist.get_world_size())
    outer = _existing()
    parallel_state.initialize_model_parallel(
        parallel.tensor,
        parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        distributed_timeout_minutes=patience,  # type: ignore[arg-type] - becomes a timedelta
    )
    try:
        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        yield Groups(ProcessGroupCollection.use_mpu_process_groups(), parallel)
    finally:
        parallel_state.destroy_model_parallel()
        _destroy(_existing() - outer)


def _existing() -> set[dist.ProcessGroup]:
    return set(distributed_c10d._world.pg_map)


def _destroy(groups: set[dist.ProcessGroup]) -> None:
    """Megatron (all versions) only forgets its groups; each goes on holding a polling thread, sockets or a NCCL communicator."""
    for group in groups:
        dist.destroy_process_group(group)


def require_world(parallel: ParallelConfig, world: int) -> None:
    """UserError when so many processes do not make whole groups of every kind."""
    model = parallel.tensor * parallel.pipeline * parallel.context
    if world % model or (world // parallel.pipeline) % parallel.expert:
        raise UserError(
            f"{world} processes",
            f"a multiple of tensor x pipeline x context = {model} whose stages hold whole groups of expert = {parallel.expert}",
            "start another number of processes (torchrun --nproc-per-node) or change `parallel`",
        )


def require_rounds(parallel: ParallelConfig, batch: BatchConfig, data_size: int) -> None:
    """UserError when the sequences of a step do not come out as whole micro-batches of all ranks and, interleaved, as whole rounds of the
    pipeline.

    Args:
        data_size: ranks that read different samples.
    """
    per_round = batch.micro * data_size
    if batch.global_ % per_round:
        raise UserError(
            f"batch.global={batch.global_}, batch.micro={batch.micro}, {data_size} data-parallel ranks",
            f"batch.global a multiple of micro x ranks = {per_round}",
            "change batch.global or batch.micro",
        )
    if parallel.virtual_pipeline > 1 and batch.global_ % (per_round * parallel.pipeline):
        raise UserError(
            f"batch.global={batch.global_} with parallel.virtual_pipeline={parallel.virtual_pipeline}",
            f"micro-batches in whole rounds of the pipeline: a multiple of micro x ranks x stages = {per_round * parallel.pipeline}",
            "change batch.global, batch.micro or parallel.virtual_pipeline",
        )


def require_sequence(parallel: ParallelConfig, length: int) -> None:
    """UserError when a sequence does not divide over context- and sequence-parallel ranks."""
    halves, slices = (2 if parallel.context > 1 else 1), (parallel.tensor if parallel.sequence else 1)
    blocks = parallel.context * math.lcm(halves, slices)
    if length % blocks:
        raise UserError(
            f"data.sequence_length={length} with context={parallel.context}, sequence={parallel.sequence}",
            f"a multiple of {blocks}: of 2 x context with context parallelism, of context x tensor with sequence parallelism",
            "change data.sequence_length or `parallel`",
        )
