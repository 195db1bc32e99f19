"""Whether one config of `distill` can run on this machine: layout, files, memory, disk. Reads headers only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe2dense.checkpoint.assets import ASSETS
from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.operations import dry_run
from megatron_moe2dense.operations.doctor.machine import Gpu, free_disk, free_memory
from megatron_moe2dense.operations.doctor.packages import Finding, version
from megatron_moe2dense.operations.plan.job import fewest_processes
from megatron_moe2dense.tokens.held_out import ADVICE, not_held_out
from megatron_moe2dense.tokens.indexed import TokenFile
from megatron_moe2dense.trainer import distill, runtime, teacher
from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.model import ModelSpec
from megatron_moe2dense.trainer.runtime import fp8


@dataclass(frozen=True)
class Resources:
    """Where the job would run. processes: asked for, None: unknown."""

    gpus: list[Gpu]
    processes: int | None


def judge(config: DistillConfig, resources: Resources) -> list[Finding]:
    """Lines of the report; what would stop the run is an error, with what to do."""
    world = _world(config, resources)
    checks: dict[str, Callable[[], str]] = {
        "processes": lambda: _layout(config, world, resources),
        "device": lambda: _device(config),
        "student": lambda: _student(config),
        "teacher": lambda: _teacher(config),
        "text": lambda: _text(config),
        "fp8": lambda: _fp8(config),
        "metrics": lambda: _metrics(config),
    }
    rows = [_checked(name, check) for name, check in checks.items()]
    rows += _held_out(config)
    if any(row.level == "error" for row in rows):
        return rows
    return [*rows, _checked("vocabulary", lambda: _vocabulary(config)), *_room(config, world, resources)]


def _checked(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, check())
    except UserError as error:
        return Finding(name, error.found, "error", f"{error.do} (expected: {error.expected})")


def _world(config: DistillConfig, resources: Resources) -> int:
    torchrun = int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None
    return resources.processes or torchrun or len(resources.gpus) or fewest_processes(config.parallel)


def _layout(config: DistillConfig, world: int, resources: Resources) -> str:
    parallel = config.parallel
    try:
        process_groups.require_world(parallel, world)
    except UserError as error:
        if resources.processes is None and resources.gpus:
            raise UserError(error.found, error.expected, f"{error.do}; for several nodes: moe2dense doctor processes=N") from None
        raise
    data = world // (parallel.tensor * parallel.pipeline * parallel.context)
    process_groups.require_sequence(parallel, config.data.sequence_length)
    process_groups.require_rounds(parallel, config.batch, data)
    return f"{world}: tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} x data {data}"


def _device(config: DistillConfig) -> str:
    runtime.require_device(config.device)
    return runtime.expected().device.type


def _student(config: DistillConfig) -> str:
    directory = Path(config.student)
    spec = distill.student_spec(config)
    if not any((directory / name).exists() for name in ASSETS if name.startswith(("tokenizer", "vocab"))):
        raise UserError(
            f"{directory} has no tokenizer files",
            "those of the teacher, which exports of the run would carry on",
            "copy tokenizer.json and tokenizer_config.json of the teacher into it",
        )
    return f"{spec.family.name}, {spec.dims.layers} layers, vocabulary {spec.dims.vocab_size}"


def _teacher(config: DistillConfig) -> str:
    if config.teacher is None:
        return "cached" if config.teacher_cache is not None else "none"
    index = CheckpointIndex.open(Path(config.teacher))
    return f"{len(index.tensors)} tensors, {index.nbytes / 1e9:.2f} GB"


def _vocabulary(config: DistillConfig) -> str:
    student = distill.student_spec(config)
    if config.has_live_teacher():
        assert config.teacher is not None
        teacher.require_same_vocabulary(ModelSpec.open(config.teacher, student.dtype), student)
    return str(student.dims.vocab_size)


def _text(config: DistillConfig) -> str:
    files = [source.path for source in config.data.sources()]
    tokens = sum(len(TokenFile.open(path).tokens) for path in files)
    if config.data.validation is not None:
        TokenFile.open(config.data.validation)
    needed = config.steps() * config.batch.global_ * config.data.sequence_length
    if len(files) == 1 and needed > tokens * config.data.epochs:
        raise UserError(
            f"{tokens} tokens, {config.data.epochs} epochs", f"{needed} for {config.steps()} steps", "add text, or shorten the run"
        )
    return f"{tokens} tokens in {len(files)} files, {needed} are trained on"


def _held_out(config: DistillConfig) -> list[Finding]:
    """A warning for a validation file that is training text; files that can't be read are `_text`'s to name."""
    with contextlib.suppress(UserError):
        said = config.data.validation and not_held_out(config.data.validation, config.data.files())
        return [Finding("held-out text", said, "warning", ADVICE)] if said else []
    return []


def _fp8(config: DistillConfig) -> str:
    if config.fp8 is None:
        return "off"
    fp8.require(config.fp8, runtime.expected())
    return f"{config.fp8.format}, {config.fp8.recipe}"


def _metrics(config: DistillConfig) -> str:
    logging = config.logging
    if logging.wandb is not None and version("wandb") is None:
        raise UserError("logging.wandb without the package wandb", "wandb", "install the extra `wandb`, or remove the block")
    if logging.tensorboard and version("tensorboard") is None:
        raise UserError("logging.tensorboard without the package tensorboard", "tensorboard", "install it, or remove the key")
    return ", ".join(["metrics.jsonl", *(["W&B"] if logging.wandb else []), *(["TensorBoard"] if logging.tensorboard else [])])


def _room(config: DistillConfig, world: int, resources: Resources) -> Iterator[Finding]:
    """What `plan` says that the fullest process takes, against memory; the checkpoints that are kept against the disk."""
    facts: dict[str, Any] = dry_run.distill(config, world)
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
    one = 12 * facts["student"]["parameters"]  # float32 weights and Adam's moments
    disk = free_disk(Path(config.output))
    text = f"{one / 1e9:.2f} GB a checkpoint, {config.train.keep} kept; {disk / 1e9:.1f} GB free"
    if one * (config.train.keep + 1) > disk:  # the next one is written before the oldest goes
        yield Finding("disk", text, "error", "make room at `output`, or lower train.keep")
    else:
        yield Finding("disk", text)
