"""Whether one config of `distill` can run on this machine: the run's own questions (`trainer.startup`), memory and disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.machine import free_memory
from megatron_moe2dense.operations import dry_run
from megatron_moe2dense.operations.doctor.machine import Gpu, free_disk
from megatron_moe2dense.operations.doctor.packages import Finding
from megatron_moe2dense.trainer import startup
from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.layout import Remark, answers


@dataclass(frozen=True)
class Resources:
    """Where the job would run. processes: asked for, None: unknown."""

    gpus: list[Gpu]
    processes: int | None


def judge(config: DistillConfig, resources: Resources) -> list[Finding]:
    """Lines of the report; what would stop the run is an error, with what to do."""
    world = _world(config, resources)
    found = answers(chain(startup.of_machine(config), startup.of_run(config, world, startup.Opened(config.dtype))))
    rows = [_row(name, answer, resources) for name, answer in found]
    if any(row.level == "error" for row in rows):
        return rows
    return [*rows, *_room(config, world, resources)]


def _row(name: str, answer: str | Remark | UserError, resources: Resources) -> Finding:
    if isinstance(answer, str):
        return Finding(name, answer)
    if isinstance(answer, Remark):
        return Finding(name, answer.found, "warning", answer.do)
    nodes = name == "processes" and resources.processes is None and resources.gpus
    do = f"{answer.do}; for several nodes: moe2dense doctor processes=N" if nodes else answer.do
    return Finding(name, answer.found, "error", f"{do} (expected: {answer.expected})")


def _world(config: DistillConfig, resources: Resources) -> int:
    if resources.processes is None and "WORLD_SIZE" not in os.environ and resources.gpus:
        return len(resources.gpus)
    return resources.processes or startup.processes(config.parallel)


def _room(config: DistillConfig, world: int, resources: Resources) -> Iterator[Finding]:
    """What `plan` says that the fullest process takes, against memory; the checkpoints that are kept against the disk."""
    facts: dict[str, Any] = dry_run.facts(config, world)
    stage, parts = max(facts["memory_per_process"].items(), key=lambda item: item[1]["total"])
    if resources.gpus:
        have, what = min(gpu.free for gpu in resources.gpus), "free on the fullest GPU"
        need, of = parts["total"], f"on a GPU of {stage}"
    else:
        have, what = free_memory(), "of host memory"
        need, of = parts["total"] * world, f"in {world} processes"
    text = f"{need / 1e9:.2f} GB {of}, {parts['activations'] / parts['total']:.0%} of it activations"
    if have is not None and need > have:
        do = "see moe2dense plan; more processes, a larger parallel.tensor or parallel.pipeline, recompute, or dtype: bfloat16"
        yield Finding("memory", f"{text}; {have / 1e9:.2f} GB {what}", "error", do)
    else:
        yield Finding("memory", f"{text}; {'unknown' if have is None else f'{have / 1e9:.2f} GB'} {what}")
    one = facts["checkpoint_bytes"]
    disk = free_disk(Path(config.output))
    text = f"{one / 1e9:.2f} GB a checkpoint, {config.train.keep} kept; {disk / 1e9:.1f} GB free"
    if one * (config.train.keep + 1) > disk:  # the next one is written before the oldest goes
        yield Finding("disk", text, "error", "make room at `output`, or lower train.keep")
    else:
        yield Finding("disk", text)
