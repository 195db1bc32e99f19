"""The processes of one torchrun job that share a pass over text: who takes which batches, sums over all of them, errors told to all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import output_directory


@dataclass(frozen=True)
class Ranks:
    """This process's number and how many there are. One process needs no torch.distributed."""

    rank: int = 0
    world: int = 1

    def share(self, windows_BS: np.ndarray, batch: int) -> np.ndarray:
        """This rank's windows: whole batches, so that every batch is what it would be in a single process.

        Raises:
            UserError: fewer batches than processes.
        """
        batches = -(-len(windows_BS) // batch)
        if batches < self.world:
            raise UserError(
                f"{len(windows_BS)} windows, {batch} a batch, for {self.world} processes",
                "at least one batch for every process",
                "lower batch_tokens, use more windows or fewer processes",
            )
        start, stop = (batches * rank // self.world * batch for rank in (self.rank, self.rank + 1))
        return windows_BS[start:stop]

    def sum(self, sums: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Over all ranks, by name, in float64 (gloo: they are small and lie on the CPU)."""
        if self.world == 1:
            return sums
        flat = torch.from_numpy(np.concatenate([value.ravel() for value in sums.values()]))
        dist.all_reduce(flat)
        ends = np.cumsum([value.size for value in sums.values()])
        parts = zip(sums.items(), np.split(flat.numpy(), ends[:-1]), strict=True)
        return {name: part.reshape(value.shape) for (name, value), part in parts}

    def on_node(self) -> int:
        """Processes of this job on this machine."""
        return int(os.environ["LOCAL_WORLD_SIZE"]) if self.world > 1 else 1

    def least(self, value: int) -> int:
        """The smallest of all ranks' values."""
        found = torch.tensor(value)
        if self.world > 1:
            dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found)

    def average(self, tensors: Sequence[torch.Tensor]) -> None:
        """Each becomes the mean over all ranks (by way of the CPU: gloo)."""
        if self.world > 1:
            flat = torch.cat([tensor.detach().flatten().cpu() for tensor in tensors])
            dist.all_reduce(flat)
            for tensor, part in zip(tensors, (flat / self.world).split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            dist.barrier()

    @contextlib.contextmanager
    def output_directory(self, output: Path, stage: str, config: dict[str, Any], **facts: Any) -> Iterator[Path]:
        """`common.outputs.output_directory`, claimed and published by rank 0; a refusal reaches every rank."""
        refusal: list[tuple[str, str, str] | None] = [None]
        with contextlib.ExitStack() as stack:
            if self.rank == 0:
                try:
                    stack.enter_context(output_directory(output, stage, config, **facts))
                except UserError as error:
                    refusal = [(error.found, error.expected, error.do)]
            if self.world > 1:
                dist.broadcast_object_list(refusal, src=0)
            if refusal[0] is not None:
                raise UserError(*refusal[0])
            yield output.with_name(output.name + ".tmp")
            self.wait()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of the job that torchrun started, or the one process there is."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        if started:
            dist.destroy_process_group()
