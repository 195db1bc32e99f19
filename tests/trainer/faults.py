"""What goes wrong inside a forked rank: at the n-th call of a phase's function it is killed, stopped, or finds its disk full."""

from __future__ import annotations

import functools
import importlib
import os
import resource
import signal
from collections.abc import Callable
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

# The function that is the phase, and the ranks of a data-parallel job that come through it.
PHASES = {
    "teacher or student forward": ("megatron_moe2dense.trainer.model:HeadlessGPT.forward", (0, 1)),
    "backward": ("megatron.core.pipeline_parallel.schedules:backward_step", (0, 1)),
    "optimizer": ("megatron.core.optimizer.optimizer:ChainedOptimizer.step_with_ready_grads", (0, 1)),
    "metrics": ("megatron_moe2dense.common.records:append", (0,)),
    "checkpoint writer": ("megatron_moe2dense.trainer.checkpoints.writer:_write_and_digest", (0,)),
    "checkpoint checksums": ("megatron_moe2dense.trainer.checkpoints.checksums:write", (0,)),
    "checkpoint published": ("megatron_moe2dense.trainer.checkpoints.writer:Writer._publish", (0, 1)),
    "export tensor": ("megatron_moe2dense.checkpoint.shards:ShardWriter.write", (0,)),
    "export publish": ("megatron_moe2dense.common.outputs:publish", (0,)),
    "shard of a teacher cache": ("megatron_moe2dense.trainer.cache.files:save", (0,)),
}


def kill() -> None:
    """SIGKILL this rank; from a checkpoint writer its rank as well."""
    if parent_process() is not None:
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """This rank answers no more, its sockets stay."""
    os.kill(os.getpid(), signal.SIGSTOP)


def fill_disk(path: str, room: int) -> None:
    """No file of this process may get larger than that one is, and `room` bytes."""
    size = Path(path).stat().st_size if Path(path).exists() else 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, resource.RLIM_INFINITY))


ACTIONS: dict[str, Callable[..., None]] = {"kill": kill, "stop": stop, "fill_disk": fill_disk}


def at(rank: int, where: tuple[int, str, int], action: str, *arguments: Any) -> None:
    """Arm this process when it is the one. where: rank, phase, which call of its function (the first is 1)."""
    chosen, phase, call = where
    if rank != chosen:
        return
    module, _, name = PHASES[phase][0].partition(":")
    owner: Any = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real, calls = getattr(owner, name), iter(range(1, 10**6))

    @functools.wraps(real)
    def watched(*args: Any, **options: Any) -> Any:
        if next(calls) == call:
            ACTIONS[action](*arguments)
        return real(*args, **options)

    setattr(owner, name, watched)
