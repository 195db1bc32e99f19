"""`moe2dense distill`: build student, teacher and optimizer from the config, resume if there is something to resume, train."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megatron_moe2dense.checkpoint.assets import copy_assets
from megatron_moe2dense.common import hub
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.common.outputs import read_json, write_json
from megatron_moe2dense.common.progress import StepLines
from megatron_moe2dense.trainer import balancing, identity, initialize, optim, runtime, startup, teacher
from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer import model as models
from megatron_moe2dense.trainer.agreement import raise_on_all_ranks
from megatron_moe2dense.trainer.cache.teacher import CachedTeacher, open_cache
from megatron_moe2dense.trainer.checkpoints.checkpointer import Checkpointer
from megatron_moe2dense.trainer.checkpoints.writer import latest, step_of
from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.data.samples import SampleStream, training_stream, validation_stream
from megatron_moe2dense.trainer.flops import training_flops
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.layout import answers, refuse
from megatron_moe2dense.trainer.loop import Trainer
from megatron_moe2dense.trainer.metrics import Metrics, Speed, tracked
from megatron_moe2dense.trainer.pipeline import PipelineLayout
from megatron_moe2dense.trainer.runtime import Runtime, fp8
from megatron_moe2dense.trainer.state import TrainState
from megatron_moe2dense.trainer.step import Models
from megatron_moe2dense.trainer.verification.verify import verify_teacher


def run(config: DistillConfig) -> None:
    """Train; started again with the same config after a stop, continue from the last checkpoint."""
    # twice the timeout of a step: the watchdog says more than a collective that gives up
    patience = max(runtime.PATIENCE, 2 * config.train.timeout)
    with runtime.session(config.device, patience) as device:
        opened = startup.Opened(config.dtype)
        startup.require(itertools.chain(startup.of_machine(config), startup.of_run(config, dist.get_world_size(), opened)))
        with process_groups.initialized(config.parallel, config.train.seed, patience) as groups:
            _train(config, groups, device, opened)


def _train(config: DistillConfig, groups: Groups, device: Runtime, opened: startup.Opened) -> None:
    claim_output(config)
    trainer, state = build(config, groups, device, opened)
    with contextlib.closing(trainer):
        reached_the_end = trainer.fit(state)
    if reached_the_end and dist.get_rank() == 0:
        identity.write(config, "finished", step=state.step, tokens=state.tokens, skipped_total=state.skipped_total)
        logger.info("finished: %d steps, %d tokens; weights in %s", state.step, state.tokens, latest(trainer.checkpointer.directory))
    dist.barrier()


def claim_output(config: DistillConfig) -> None:
    """Rank 0 takes the output directory and puts the student's config and tokenizer into it; errors reach every rank."""
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            output, student = Path(config.output), hub.located(config.student)
            identity.claim(config)
            (output / "student").mkdir(exist_ok=True)
            content = read_json(student / "config.json", "the student's Hugging Face directory with its config.json")
            write_json(output / "student" / "config.json", content)
            copy_assets(student, output / "student")


def _verify_teacher(config: DistillConfig, groups: Groups, frozen: teacher.LiveTeacher, training: SampleStream) -> dict[str, Any]:
    found = verify_teacher(frozen, config, groups, training.first(), identity.recorded(config).get("teacher"))
    if dist.get_rank() == 0:
        identity.write(config, "unfinished", teacher=found)
    return found


def build(config: DistillConfig, groups: Groups, device: Runtime, opened: startup.Opened | None = None) -> tuple[Trainer, TrainState]:
    """All parts of a run on this rank, restored from the last checkpoint when there is one.

    Args:
        opened: the models as they were asked about; None: opened here, of a config that is known to be right.
    """
    opened = opened if opened is not None else opened_models(config)
    spec = opened.specs["student"]
    layout = PipelineLayout.of_student(config.parallel, spec.dims.layers)
    fields = {**models.recompute_fields(config.parallel, spec), **balancing.fields(config), **fp8.fields(config.fp8, device)}
    student = models.build(spec, groups, device, layout, **fields)
    wrapped = initialize.start(config, student, spec, groups)
    with contextlib.ExitStack() as undo:
        undo.callback(optim.release, wrapped)
        trainer, state = _assemble(config, (groups, device), (spec, student, wrapped), opened.specs.get("teacher"))
        undo.pop_all()
    return trainer, state


_Student = tuple[models.ModelSpec, list[models.HeadlessGPT], list[DistributedDataParallel]]


def _assemble(
    config: DistillConfig, place: tuple[Groups, Runtime], learner: _Student, known: models.ModelSpec | None
) -> tuple[Trainer, TrainState]:
    """What stands around the student. known: the teacher, None without a live one."""
    (groups, device), (spec, student, wrapped) = place, learner
    known_of_run = identity.recorded(config)  # before rank 0 writes it again
    first_steps = (known_of_run.get("lengths") or [config.steps()])[0]
    optimizer, scheduler = optim.build(config, wrapped, (spec, groups), first_steps)
    frozen = teacher.build(known, config, groups, device) if known is not None else None
    checkpointer = Checkpointer(Path(config.output) / "checkpoints", config.train, groups)
    state = _resume(checkpointer, student, optimizer, scheduler)
    vocab_size = spec.dims.vocab_size
    training = training_stream(config, groups, device.device, vocab_size)
    validation = validation_stream(config, groups, device.device, vocab_size)
    verified = _verify_teacher(config, groups, frozen, training) if frozen is not None else None
    trainer = Trainer(
        config=config,
        groups=groups,
        models=Models(student, wrapped, frozen or _cached(config, groups, device, vocab_size), vocab_size),
        optimizer=optimizer,
        scheduler=scheduler,
        training=training,
        validation=validation,
        checkpointer=checkpointer,
        metrics=Metrics(config, groups.writes_metrics, tracked(config, known_of_run, verified), state.step),
        speed=_speed(config, spec, frozen, device),
        lines=StepLines(config.steps(), config.train.log_every),
    )
    return trainer, state


def _cached(config: DistillConfig, groups: Groups, device: Runtime, vocab_size: int) -> CachedTeacher | None:
    return open_cache(config, vocab_size, groups, device.device) if config.teacher_cache is not None else None


def _speed(config: DistillConfig, student: models.ModelSpec, frozen: teacher.LiveTeacher | None, device: Runtime) -> Speed:
    peak = runtime.peak_flops(device, config.dtype)
    flops = training_flops(student, frozen and frozen.spec, config.data.sequence_length, config.active_experts())
    return Speed(flops, config.batch.global_ * config.data.sequence_length, peak and peak * dist.get_world_size())


def _resume(checkpointer: Checkpointer, *parts: Any) -> TrainState:
    found = latest(checkpointer.directory)
    if found is None:
        return TrainState()
    state = TrainState.restored(checkpointer.load(found, *parts), str(found))
    assert state.step == step_of(found)
    logger.info("resumed from %s", found)
    return state


def opened_models(config: DistillConfig) -> startup.Opened:
    """Student and live teacher; UserError where one is not what it should be."""
    opened = startup.Opened(config.dtype)
    refuse(answers(startup.of_models(config, opened)))
    return opened
