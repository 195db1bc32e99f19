"""Time in collectives is what a rank waits for the others, whoever called and by whatever name."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed import all_reduce  # bound before anything is timed, as in Megatron

from megatron_moe2dense.trainer.runtime import collectives
from tests.helpers.forks import launch

LATE = 0.5  # seconds


def wait_for_the_late_rank() -> tuple[float, float, float, bool]:
    """On rank 0: seconds measured of two waits (one asynchronous) for rank 1, of none, and whether all is as before."""
    before = [vars(owner)[name] for owner in (dist.ProcessGroup, dist.Work) for name in ("allreduce", "wait") if name in vars(owner)]

    def late() -> None:
        time.sleep(LATE * dist.get_rank())

    dist.barrier()
    with collectives.timed() as blocking:
        late()
        all_reduce(torch.ones(3))
    dist.barrier()
    with collectives.timed() as asynchronous:
        late()
        work = dist.all_gather_into_tensor(torch.empty(2), torch.ones(1), async_op=True)
        assert work is not None
        work.wait()
    dist.barrier()
    with collectives.timed() as alone:
        late()
    all_reduce(torch.ones(3))
    after = [vars(owner)[name] for owner in (dist.ProcessGroup, dist.Work) for name in ("allreduce", "wait") if name in vars(owner)]
    return blocking.seconds, asynchronous.seconds, alone.seconds, before == after


@pytest.mark.distributed
def test_a_rank_waits_as_long_as_the_other_is_late():
    blocking, asynchronous, alone, restored = launch(2, "tests.trainer.test_collectives:wait_for_the_late_rank")
    assert 0.8 * LATE < blocking < 4 * LATE
    assert 0.8 * LATE < asynchronous < 4 * LATE
    assert alone == 0.0
    assert restored


def test_names_that_this_torch_has_are_timed():
    """A collective renamed upstream would silently cost nothing."""
    known = {name for name in collectives._COLLECTIVES if hasattr(dist.ProcessGroup, name)}
    assert {"allreduce", "broadcast", "barrier", "send", "recv", "allgather", "reduce_scatter", "alltoall"} <= known
    every = {
        name for name in vars(dist.ProcessGroup) if any(word in name for word in ("reduce", "gather", "scatter", "alltoall", "all_to_all"))
    }
    assert every <= known
