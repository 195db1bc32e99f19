"""Bytes of a GPU by part, for every pipeline stage."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from megatron_moe2dense.operations.plan import activations
from megatron_moe2dense.operations.plan.job import Job
from megatron_moe2dense.operations.plan.parameters import buffers, chunks
from megatron_moe2dense.trainer.losses import LogitLoss, chunked
from megatron_moe2dense.trainer.model import padded_vocabulary

# CUDA context, cuBLAS workspaces and NCCL's buffers of about six communicators: an allowance (ours), not a formula.
ALLOWANCE = 2 * 1024**3
_FLOAT = 4


def checkpoint_bytes(parameters: int, element: int) -> int:
    """Of a checkpoint of the trainer, at most: weights in the compute type, of so many bytes, float32 ones and AdamW's two moments."""
    return parameters * (element + 3 * _FLOAT)


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU.

    parameters, gradients, optimizer: of the student. teacher: its weights. targets: its final hidden states of a whole step.
    activations: of the student. loss: workspace of LM heads and loss. teacher_pass: of a teacher's forward pass, which ends before the
    student's begins. allowance: see ALLOWANCE.
    """

    parameters: int
    gradients: int
    optimizer: int
    teacher: int
    targets: int
    activations: int
    loss: int
    teacher_pass: int
    allowance: int

    @property
    def total(self) -> int:
        """The most at once."""
        state = self.parameters + self.gradients + self.optimizer + self.teacher + self.targets + self.allowance
        return state + max(self.activations + self.loss, self.teacher_pass)

    def parts(self) -> dict[str, int]:
        """By name, with the total."""
        return {**asdict(self), "total": self.total}


def of_stage(job: Job, stage: int, shard: int = 0) -> Memory:
    """Of a GPU of this stage, the `shard`th of those that share the optimizer state (the first has the largest part, or nearly so)."""
    return Memory(
        parameters=parameter_bytes(job, stage),
        gradients=gradient_bytes(job, stage),
        optimizer=optimizer_bytes(job, stage, shard),
        teacher=teacher_bytes(job, stage),
        targets=target_bytes(job, stage),
        activations=round(activations.student_bytes(job, stage)),
        loss=loss_bytes(job, stage),
        teacher_pass=round(activations.teacher_bytes(job)) if job.teacher is not None else 0,
        allowance=ALLOWANCE if job.kernels else 0,
    )


def parameter_bytes(job: Job, stage: int) -> int:
    """The student's weights in the compute type, with the padding of their buffers (`parameters.buffer_of`).

    In FP8 Transformer Engine keeps a copy of each weight and its transpose besides, one byte a value each: counted for all of them.
    """
    return (job.element + (2 if job.fp8 else 0)) * sum(buffer.elements for buffer, _ in buffers(job, stage))


def gradient_bytes(job: Job, stage: int) -> int:
    """float32, whatever the compute type (DistributedDataParallelConfig.grad_reduce_in_fp32); the same buffers."""
    return _FLOAT * sum(buffer.elements for buffer, _ in buffers(job, stage))


def optimizer_bytes(job: Job, stage: int, shard: int) -> int:
    """Adam's two moments in float32, and in bfloat16 float32 master weights: 8 or 12 bytes a parameter that this rank updates.

    With the distributed optimizer those are 1 / ranks of each bucket (ZeRO stage 1, Rajbhandari et al. 2020, arXiv:1910.02054); Adam's step
    counts, one number a parameter, are left out. Of the matrices that Muon takes there is one moment.
    """
    each = 2 * _FLOAT + (_FLOAT if job.element < _FLOAT else 0)
    if not job.parallel.distributed_optimizer:
        parameters = [parameter for chunk in chunks(job, "student", stage) for parameter in chunk]
        return sum((each - _FLOAT * (job.muon and parameter.matrix)) * parameter.elements for parameter in parameters)
    return each * sum(buffer.shard(shard % ranks, ranks) for buffer, ranks in buffers(job, stage))


def teacher_bytes(job: Job, stage: int) -> int:
    """The teacher's weights on this stage, in the compute type; it has neither gradients nor padding."""
    if job.teacher is None:
        return 0
    return job.element * sum(parameter.elements for chunk in chunks(job, "teacher", stage) for parameter in chunk)


def target_bytes(job: Job, stage: int) -> int:
    """Final hidden states of the teacher for all micro-batches of a step, on the last stage: [S / t, B, D] each."""
    if job.teacher is None or not job.is_last(stage):
        return 0
    return job.micro_batches * job.outside * job.teacher.dims.hidden_size * job.element


def loss_bytes(job: Job, stage: int) -> int:
    """Workspace of the loss of one micro-batch on the last stage (`losses.chunked`): the float32 copies of a chunk's logits and their
    product in the compute type; the head's gradient, float32, a product to add to it and the copy that is handed back, in the compute
    type; the gradient of the hidden states, and those gathered over sequence-parallel ranks."""
    if not job.is_last(stage):
        return 0
    dims, e = job.student.dims, job.element
    widths = dims.hidden_size + (job.teacher.dims.hidden_size if job.teacher is not None else 0)
    gathered = job.tokens * widths * e if job.parallel.sequence else 0
    if not isinstance(job.loss, LogitLoss):
        return gathered + job.tokens * widths * _FLOAT
    rows = padded_vocabulary(dims.vocab_size) // job.parallel.tensor
    size = max(part.stop - part.start for part in chunked.token_slices(job.tokens, rows))
    logits = size * rows * (chunked.COPIES * _FLOAT + e)
    return logits + rows * dims.hidden_size * (_FLOAT + 2 * e) + job.tokens * dims.hidden_size * e + gathered
