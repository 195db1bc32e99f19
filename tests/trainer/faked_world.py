"""One rank of a job of any size in this process: torch's fake process groups, whose collectives return at once. What a rank checks and
what Megatron-Core asserts while models, optimizer and data are built is real; what ranks would send each other is not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_moe2dense.trainer import distill, initialize, loop
from megatron_moe2dense.trainer.state import TrainState


@contextlib.contextmanager
def world(processes: int) -> Iterator[None]:
    """Rank 0 of so many; no training, and weights that are not compared over ranks."""
    create_group = parallel_state.create_group

    def without_gloo(*arguments: Any, **options: Any) -> Any:
        return create_group(*arguments, **{name: value for name, value in options.items() if name != "backend"})

    def everyone(found: list[Any], own: Any, *_: Any, **__: Any) -> None:
        found[:] = [own] * len(found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel_state, "create_group", without_gloo)
        patch.setattr(dist, "all_gather_object", everyone)
        patch.setattr(initialize.fingerprint, "verify", lambda *_: None)
        patch.setattr(distill, "_verify_teacher", lambda *_: None)
        patch.setattr(loop.Trainer, "fit", _not)
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
        try:
            yield
        finally:
            dist.destroy_process_group()


def _not(_trainer: loop.Trainer, _state: TrainState) -> bool:
    return False
