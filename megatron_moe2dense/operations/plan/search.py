"""Layouts worth trying, those of them that the trainer takes and that fit, and why the others fall out."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.operations.plan import memory, timing
from megatron_moe2dense.operations.plan.hardware import Machine
from megatron_moe2dense.operations.plan.job import Job
from megatron_moe2dense.operations.plan.memory import Memory
from megatron_moe2dense.operations.plan.timing import StepTime
from megatron_moe2dense.trainer.config import BatchConfig, ParallelConfig
from megatron_moe2dense.trainer.layout import answers, refuse

_STAGES, _CHUNKS, _MICRO = (1, 2, 4, 8, 16), (1, 2, 4), (1, 2, 4, 8)
# Fewer tokens of a sequence on a rank make context parallelism a poor choice (ours).
_LEAST_TOKENS = 1024
NO_ROOM = "more than the memory of a GPU without the reserve, even with full recomputation"


@dataclass(frozen=True)
class Verdict:
    """A job judged. memory: by the stages of `Job.stages`."""

    job: Job
    memory: dict[int, Memory]
    step: StepTime

    @property
    def worst(self) -> int:
        """The stage that takes most."""
        return max(self.memory, key=lambda stage: self.memory[stage].total)

    @property
    def bytes(self) -> int:
        """Of that stage's GPUs."""
        return self.memory[self.worst].total


def judge(job: Job, machine: Machine) -> Verdict:
    """Memory and time of a layout; UserError with all that the trainer would refuse."""
    refuse(answers(job.questions()))
    return Verdict(job, {stage: memory.of_stage(job, stage) for stage in job.stages()}, timing.step_time(job, machine))


def search(start: Job, machine: Machine, micro: int | None) -> tuple[list[Verdict], Counter[str]]:
    """Layouts that fit, the fastest first, and how many of the others there are by reason.

    Args:
        start: models, data and number of processes; its layout does not matter. micro: of the batch when it is given, else all are tried.
    """
    found, left_out = [], Counter[str]()
    for parallel, batch in _candidates(start, machine, micro):
        job = dataclasses.replace(start, parallel=parallel, batch=batch)
        refused = next((answer for _, answer in answers(job.of_layout()) if isinstance(answer, UserError)), None)
        if refused is not None:
            left_out[refused.do] += 1
            continue
        fits = next(_fitting(job, machine), None)
        if fits is None:
            left_out[NO_ROOM] += 1
        else:
            found.append(Verdict(fits[0], fits[1], timing.step_time(fits[0], machine)))
    return sorted(found, key=lambda verdict: (verdict.step.seconds, verdict.bytes)), left_out


def _fitting(job: Job, machine: Machine) -> Iterator[tuple[Job, dict[int, Memory]]]:
    """With as little recomputation as has room."""
    for recompute in ("none", "selective", "full"):
        tried = dataclasses.replace(job, parallel=job.parallel.model_copy(update={"recompute": recompute}))
        held = {stage: memory.of_stage(tried, stage) for stage in tried.stages()}
        if max(each.total for each in held.values()) <= machine.usable:
            yield tried, held


def _candidates(start: Job, machine: Machine, micro: int | None) -> Iterator[tuple[ParallelConfig, BatchConfig]]:
    """Tensor parallelism inside a node, with sequence parallelism; experts over ranks where a model has them."""
    world, tensors = start.world, _powers(min(machine.config.on_node(), start.student.dims.heads))
    contexts = _powers(max(1, start.length // _LEAST_TOKENS))
    experts = max(start.spec(which).dims.experts for which in start.models())
    for tensor in tensors:
        for pipeline in _STAGES:
            for context in contexts:
                if world % (tensor * pipeline * context):
                    continue
                for expert in _powers(min(max(1, experts), world // pipeline)):
                    for chunks in _CHUNKS if pipeline > 1 else (1,):
                        parallel = ParallelConfig(
                            tensor=tensor,
                            pipeline=pipeline,
                            context=context,
                            expert=expert,
                            virtual_pipeline=chunks,
                            sequence=tensor > 1,
                            distributed_optimizer=not start.muon,
                        )
                        for size in _MICRO if micro is None else (micro,):
                            yield parallel, start.batch.model_copy(update={"micro": size})


def _powers(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length())]
