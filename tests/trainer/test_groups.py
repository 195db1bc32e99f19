"""Process groups live as long as their run, and so does everything that holds them."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path

import pytest

from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.trainer import distill, runtime
from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer.config import DistillConfig, ParallelConfig
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe, write_tokens


def gloo_threads() -> int:
    """Each group of gloo has one, which polls."""
    gc.collect()
    return sum(task.joinpath("comm").read_text().startswith("gloo") for task in Path("/proc/self/task").iterdir())


def test_the_groups_of_a_layout_end_with_it():
    with runtime.session("cpu"):
        before = gloo_threads()
        with process_groups.initialized(ParallelConfig(), seed=0):
            assert gloo_threads() > before + 5
        assert gloo_threads() <= before + 2  # that of the default group is made late


@pytest.mark.parametrize("loss_bound", [None, 0.8])
def test_a_run_leaves_nothing_behind(loss_bound: float | None, tmp_path: Path):
    """A model or an optimizer that lives on would keep its groups; a run whose teacher is refused, for it is random, has them too."""
    tiny_qwen3_moe(tmp_path / "teacher", seed=1)
    tiny_qwen3(tmp_path / "student", seed=2)
    write_tokens(tmp_path / "tokens", 32 * 4 + 1)
    settings = {
        "student": str(tmp_path / "student"),
        "teacher": str(tmp_path / "teacher"),
        "output": str(tmp_path / "run"),
        "data": {"path": str(tmp_path / "tokens"), "sequence_length": 32},
        "batch": {"micro": 2, "global": 2},
        "train": {"steps": 2},
        "teacher_check": {"loss_bound": loss_bound, "stock_forward": "never"},
        "dtype": "float32",
    }
    before = gloo_threads()
    with pytest.raises(UserError, match="uniform guess") if loss_bound is not None else contextlib.nullcontext():
        distill.run(build(DistillConfig, settings, "the test"))
    assert gloo_threads() <= before + 2
