"""Process groups live as long as their run."""

from __future__ import annotations

from pathlib import Path

from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer import runtime
from megatron_moe2dense.trainer.config import ParallelConfig


def test_the_groups_of_a_run_end_with_it():
    """Each lives on with a polling thread otherwise, and Megatron makes some twenty."""

    def threads() -> int:
        return sum(task.joinpath("comm").read_text().startswith("gloo") for task in Path("/proc/self/task").iterdir())

    with runtime.session("cpu"):
        before = threads()
        with process_groups.initialized(ParallelConfig(), seed=0):
            assert threads() > before + 5
        assert threads() <= before + 2  # that of the default group is made late
