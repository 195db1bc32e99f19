"""What runs inside the worker processes of the teacher-cache tests."""

from __future__ import annotations

from typing import Any

from megatron_moe2dense.common.config import build
from megatron_moe2dense.trainer.cache.config import CacheTeacherConfig
from megatron_moe2dense.trainer.config import DistillConfig


def write_all(configs: list[dict[str, Any]]) -> None:
    """Run `cache-teacher` for several configs."""
    from megatron_moe2dense.trainer.cache import write

    for config in configs:
        write.run(build(CacheTeacherConfig, config, "the test"))


def write_and_distill(caches: list[dict[str, Any]], runs: list[dict[str, Any]]) -> None:
    """Caches in this layout, then runs that read others."""
    from megatron_moe2dense.trainer import distill

    write_all(caches)
    for config in runs:
        distill.run(build(DistillConfig, config, "the test"))
