"""What a run needs before anything is built or written, asked in one place: `distill` and `cache-teacher`, their `--dry-run` and `doctor`
put these questions, and what ranks check while they build is among them. Layouts have their own (`layout`), which `plan` asks too."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from megatron_moe2dense.checkpoint.assets import ASSETS
from megatron_moe2dense.common import hub
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.tokens.held_out import ADVICE, not_held_out
from megatron_moe2dense.tokens.indexed import TokenFile, long_windows
from megatron_moe2dense.trainer import balancing, identity, optim, parts, runtime
from megatron_moe2dense.trainer.agreement import raise_on_all_ranks
from megatron_moe2dense.trainer.cache.teacher import require_cache
from megatron_moe2dense.trainer.checkpoints.writer import latest, step_of
from megatron_moe2dense.trainer.config import DistillConfig, ParallelConfig
from megatron_moe2dense.trainer.data.datasets import require_samples
from megatron_moe2dense.trainer.data.samples import reading_of, require_validation
from megatron_moe2dense.trainer.layout import Layout, Question, Remark, answers, refuse
from megatron_moe2dense.trainer.metrics import require_loggers
from megatron_moe2dense.trainer.model import ModelSpec
from megatron_moe2dense.trainer.runtime import fp8
from megatron_moe2dense.trainer.weights import require_one_table


def require(questions: Iterator[Question]) -> None:
    """Put the questions on every rank; a collective. Answers that stop nothing are logged.

    Raises:
        UserError: on every rank, naming everything that would stop the run.
    """
    with raise_on_all_ranks():
        found = list(answers(questions))
        refuse(found)
    for name, answer in found:
        if isinstance(answer, Remark) and dist.get_rank() == 0:
            logger.warning("%s: %s; %s", name, answer.found, answer.do)


def processes(parallel: ParallelConfig) -> int:
    """Of a job that is talked about: torchrun's, or as few as make whole groups of every kind."""
    fewest = math.lcm(parallel.tensor * parallel.pipeline * parallel.context, parallel.pipeline * parallel.expert)
    return int(os.environ.get("WORLD_SIZE", fewest))


def of_machine(config: DistillConfig) -> Iterator[Question]:
    """Those that this machine answers, which another may answer otherwise."""
    yield Question("device", lambda: _device(config))
    yield Question("fp8", lambda: _fp8(config), ("device",))


def of_run(config: DistillConfig, world: int, opened: Opened) -> Iterator[Question]:
    """All others of `distill` on so many processes; models come to stand in `opened`."""
    yield from of_models(config, opened)
    student, teacher = opened.specs.get("student"), opened.specs.get("teacher")
    yield Question("tokenizer", lambda: _tokenizer(hub.located(config.student)), ("student",))
    layout = Layout(
        student=student,
        teacher=teacher,
        active=config.active_experts(),
        parallel=config.parallel,
        batch=config.batch,
        length=config.data.sequence_length,
        world=world,
        muon=config.optim.muon is not None,
    )
    yield from layout.questions()
    yield from _text(config, student)
    yield from (Question(f"{name}'s windows", lambda spec=spec: _windows(config, spec)) for name, spec in opened.specs.items())
    if student is not None:
        yield Question("loss", lambda: _loss(config, student, teacher))
        yield Question("parts", lambda: parts.require(config.train.parts, student))
        yield Question("balancing", lambda: balancing.require(config, student))
    yield Question("metrics", lambda: require_loggers(config.logging))
    yield Question("output", lambda: _output(config), ("student", "teacher", "text", "held-out text", "teacher cache"))


def of_models(config: DistillConfig, opened: Opened) -> Iterator[Question]:
    """Whether the checkpoints are what they should be."""
    yield Question("student", lambda: opened.open("student", config.student, config.initialize != "random"))
    if (teacher := config.teacher) is not None and (directory := teacher.live) is not None:
        yield Question("teacher", lambda: opened.open_teacher(directory, teacher.dtype))


def _text(config: DistillConfig, student: ModelSpec | None) -> Iterator[Question]:
    """Of token files and of what is known of them; without a student, whether they are there."""
    held_out = config.data.validation
    if student is None:
        yield Question("text", lambda: _files([source.path for source in config.data.sources()]))
        if held_out is not None:
            yield Question("held-out text", lambda: _files([held_out]))
        return
    vocab_size = student.dims.vocab_size
    yield Question("masks", lambda: _masks(config, vocab_size))
    yield Question("text", lambda: _samples(config, vocab_size), ("masks",))
    if held_out is not None:
        yield Question("held-out text", lambda: require_validation(config, held_out, vocab_size), ("masks",))
        yield Question("overlap of texts", lambda: _overlap(config, held_out), ("text", "held-out text"))
    if config.teacher_cache is not None:
        yield Question("teacher cache", lambda: _cache(config, vocab_size), ("text",))


class Opened:
    """Checkpoints whose headers were read, "student" and "teacher": what ranks build is what was asked about. dtype: of their weights."""

    def __init__(self, dtype: str):
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.specs: dict[str, ModelSpec] = {}

    def open(self, name: str, directory: str, has_weights: bool) -> str:
        """What there is; UserError for a tensor that is not what the class has, and for a model that the trainer does not know."""
        if not has_weights:
            spec = ModelSpec.read(directory, self.dtype)
        else:
            spec = ModelSpec.open(directory, self.dtype)
            require_one_table(spec)
        return self._keep(name, spec)

    def open_teacher(self, directory: str, dtype: Literal["model", "fp8"]) -> str:
        """As `open`, of a frozen model. dtype: of its matrices in memory."""
        spec = ModelSpec.open(directory, self.dtype)
        require_one_table(spec)
        return self._keep("teacher", replace(spec, in_fp8=dtype == "fp8"))

    def _keep(self, name: str, spec: ModelSpec) -> str:
        self.specs[name] = spec
        return f"{spec.family.name}, {spec.dims.layers} layers, vocabulary {spec.dims.vocab_size}"


def _tokenizer(directory: Path) -> str | Remark:
    found = [name for name in ASSETS if name.startswith(("tokenizer", "vocab")) and (directory / name).exists()]
    if found:
        return found[0]
    do = "copy tokenizer.json and tokenizer_config.json of the teacher into it, which exports of the run carry on"
    return Remark(f"{directory} has no tokenizer files", do)


def _files(prefixes: list[str]) -> str:
    return f"{sum(len(TokenFile.open(prefix).tokens) for prefix in prefixes)} tokens"


def _masks(config: DistillConfig, vocab_size: int) -> str:
    reading = reading_of(config, vocab_size)
    return f"end of document {reading.end_of_document}, padding {reading.pad}"


def _samples(config: DistillConfig, vocab_size: int) -> str:
    needed = config.steps() * config.batch.global_
    found = require_samples(reading_of(config, vocab_size), needed)
    return f"{found}, {needed * config.data.sequence_length} are trained on"


def _overlap(config: DistillConfig, held_out: str) -> str | Remark:
    same = not_held_out(held_out, config.data.files())
    return "none" if same is None else Remark(same, ADVICE)


def _windows(config: DistillConfig, spec: ModelSpec) -> str | Remark:
    said = long_windows(config.data.sequence_length, spec.dims.max_positions)
    return f"{config.data.sequence_length} tokens" if said is None else Remark(said, "shorten data.sequence_length")


def _cache(config: DistillConfig, vocab_size: int) -> str:
    facts = require_cache(config, vocab_size).facts
    return f"{facts.samples} samples, k {facts.k}"


def _loss(config: DistillConfig, student: ModelSpec, teacher: ModelSpec | None) -> str:
    loss = config.resolved_loss()
    loss.require_models(student.dims, teacher and teacher.dims)
    return loss.method_name()


def _output(config: DistillConfig) -> str | Remark:
    found = identity.claimable(config)
    if found != "extended":
        return found
    before = identity.recorded(config).get("lengths") or [config.steps()]
    saved = latest(Path(config.output) / "checkpoints")
    step, now = step_of(saved) if saved is not None else 0, config.steps()
    rates = [optim.learning_rate_at(config, step, steps, before[0]) for steps in (before[-1], now)]
    text, changes, loss = f"extended from {before[-1]} to {now} steps, from step {step} on", [], config.resolved_loss()
    if not math.isclose(*rates):
        last = optim.learning_rate_at(config, now, now, before[0])
        becomes = f"schedule.style {config.schedule.style} becomes one over {now} steps"
        changes.append(f"{becomes}: the learning rate goes from {rates[0]:.2e} to {rates[1]:.2e} there, and to {last:.2e} at the end")
    if loss.at(step / before[-1]) != loss.at(step / now):
        changes.append("terms of the loss that were over by their `until` come back")
    return Remark(text, "; ".join(changes)) if changes else text


def _device(config: DistillConfig) -> str:
    runtime.require_device(config.device)
    return runtime.expected().device.type


def _fp8(config: DistillConfig) -> str:
    if config.fp8 is None:
        return "off"
    fp8.require(config.fp8, runtime.expected())
    return f"{config.fp8.format}, {config.fp8.recipe}"
