"""Time of a step from FLOPs, messages and the pipeline's schedule."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe2dense.operations.plan import communication
from megatron_moe2dense.operations.plan.communication import Traffic
from megatron_moe2dense.operations.plan.hardware import Machine
from megatron_moe2dense.operations.plan.job import Job, Which
from megatron_moe2dense.trainer.flops import attention_flops, forward_flops, training_flops

_BOTH: tuple[Which, ...] = ("student", "teacher")


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, of the slowest stage; their sum is the step.

    student, teacher: floating-point work of the micro-batches. messages: those inside models and between stages, which nothing hides.
    bubble: of the student's schedule and the teacher's pass together. update: gradients and weights over data-parallel ranks, as far as
    the backward pass of the last micro-batch does not hide them.
    """

    student: float
    teacher: float
    messages: float
    bubble: float
    update: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.student + self.teacher + self.messages + self.bubble + self.update


def step_time(job: Job, machine: Machine) -> StepTime:
    """Every stage does its micro-batches, the pipeline waits for the slowest: M t + (P - 1) t / V (Narayanan et al. 2021, section 2.2),
    for the student's t and the teacher's (V = 1) each."""
    batches, both = job.micro_batches, _BOTH
    traffic = {stage: communication.of_stage(job, stage) for stage in job.stages()}
    work = {which: {stage: _work(job, machine, which, stage) / batches for stage in traffic} for which in both}
    sent = {which: {stage: _messages(job, machine, which, own) / batches for stage, own in traffic.items()} for which in both}
    slow = {which: max(traffic, key=lambda stage: work[which][stage] + sent[which][stage]) for which in both}
    each = {which: work[which][slow[which]] + sent[which][slow[which]] for which in work}
    idle = job.parallel.pipeline - 1
    return StepTime(
        student=work["student"][slow["student"]] * batches,
        teacher=work["teacher"][slow["teacher"]] * batches,
        messages=sum(sent[which][slow[which]] for which in work) * batches,
        bubble=idle * (each["student"] / job.parallel.virtual_pipeline + each["teacher"]),
        update=max(_update(job, machine, own, work["student"][stage]) for stage, own in traffic.items()),
    )


def mfu(job: Job, machine: Machine, seconds: float) -> float:
    """Model FLOPs (`flops.training_flops`) over the peak of all GPUs."""
    tokens = job.batch.global_ * job.length
    return training_flops(job.student, job.teacher, job.length, job.active) * tokens / (seconds * machine.peak * job.world)


def flops_of_rank(job: Job, which: Which, stage: int, matrices: float = 1.0) -> float:
    """Of a rank of this stage in a step: its layers and, on the last stage, the head; three passes for the student, and what it computes
    again: whole layers (full), or FFN blocks (selective). Layers count alike.

    Args:
        matrices: what a FLOP of a layer's matrices counts; those of attention's scores and of the head count 1.
    """
    spec = job.spec(which)
    dims = spec.dims
    head = 2.0 * dims.vocab_size * dims.hidden_size
    active = job.active if which == "teacher" else None
    scores = attention_flops(dims, job.length)
    layer = scores + matrices * ((forward_flops(spec, job.length, active) - head) / dims.layers - scores)
    passes = 3 if which == "student" else 1
    again = 0.0
    if which == "student" and job.parallel.recompute != "none":
        projections = 4.0 * dims.hidden_size * dims.head_dim * (dims.heads + dims.kv_heads)
        again = layer if job.parallel.recompute == "full" else layer - scores - matrices * projections
    layers = sum(len(chunk) for chunk in job.layers(which, stage))
    tokens = job.batch.global_ * job.length / (job.data * job.parallel.context * job.parallel.tensor)
    return tokens * (layers * (passes * layer + again) + (passes * head if job.is_last(stage) else 0.0))


def _work(job: Job, machine: Machine, which: Which, stage: int) -> float:
    """In FP8 the student's layers multiply at twice the rate of bfloat16 (the data sheets of H100, H200 and B200)."""
    if which not in job.models():
        return 0.0
    return flops_of_rank(job, which, stage, 0.5 if which == "student" and job.fp8 else 1.0) / machine.flops


def _messages(job: Job, machine: Machine, which: Which, traffic: list[Traffic]) -> float:
    return sum(machine.seconds(job, each) for each in traffic if each.phase == which)


def _update(job: Job, machine: Machine, traffic: list[Traffic], micro_batch: float) -> float:
    """A reduction hides behind the last micro-batch's backward pass, two thirds of its time, when it is overlapped."""
    traffic = [each for each in traffic if each.phase == "update"]
    reduced = [each for each in traffic if each.kind == "DP" and each.operation != "all-gather"]
    hidden = 2 / 3 * micro_batch if job.overlap else 0.0
    exposed = max(0.0, sum(machine.seconds(job, each) for each in reduced) - hidden)
    return exposed + sum(machine.seconds(job, each) for each in traffic if each not in reduced)
