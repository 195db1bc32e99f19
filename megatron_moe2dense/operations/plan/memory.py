"""Bytes of a GPU by part, for every pipeline stage."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from megatron_moe2dense.checkpoint.values import DECODED
from megatron_moe2dense.operations.plan import activations
from megatron_moe2dense.operations.plan.job import Job
from megatron_moe2dense.operations.plan.parameters import buffers, chunks
from megatron_moe2dense.trainer.losses import LogitLoss, chunked
from megatron_moe2dense.trainer.model import padded_vocabulary
from megatron_moe2dense.trainer.outline import outline
from megatron_moe2dense.trainer.parts import Parts

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
        teacher_pass=round(activations.teacher_bytes(job)) + decoded_bytes(job, stage) if job.teacher is not None else 0,
        allowance=ALLOWANCE if job.kernels else 0,
    )


def parameter_bytes(job: Job, stage: int) -> int:
    """The student's weights in the compute type, with the padding of their buffers (`parameters.buffer_of`); frozen ones are in none.

    In FP8 Transformer Engine keeps a copy of each weight and its transpose besides, one byte a value each: counted for all of them.
    """
    frozen = sum(weight.elements for chunk in chunks(job, "student", stage) for weight in chunk if not weight.trained)
    return (job.element + (2 if job.fp8 else 0)) * (frozen + sum(buffer.elements for buffer, _ in buffers(job, stage)))


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
        parameters = [parameter for chunk in chunks(job, "student", stage) for parameter in chunk if parameter.trained]
        return sum((each - _FLOAT * (job.muon and parameter.matrix)) * parameter.elements for parameter in parameters)
    return each * sum(buffer.shard(shard % ranks, ranks) for buffer, ranks in buffers(job, stage))


def teacher_bytes(job: Job, stage: int) -> int:
    """The teacher's weights on this stage, in the compute type or as codes and scales; it has neither gradients nor padding."""
    if job.teacher is None:
        return 0
    weights = [weight for chunk in chunks(job, "teacher", stage) for weight in chunk]
    return sum(job.element * weight.elements if weight.stored is None else weight.stored for weight in weights)


def decoded_bytes(job: Job, stage: int) -> int:
    """The most that weights kept in FP8 take while they are used: a matrix, float32 and bfloat16, and with grouped products the others of
    a layer's experts in the compute type."""
    weights = [weight for chunk in chunks(job, "teacher", stage) for weight in chunk if weight.stored is not None]
    if not weights:
        return 0
    assert job.teacher is not None
    largest, together = max(weight.elements for weight in weights), 0
    experts = [weight.elements for weight in weights if weight.expert]
    if experts and job.kernels:
        together = (job.teacher.dims.experts // job.parallel.expert - 1) * max(experts) * job.element
    return together + largest * (_FLOAT + DECODED.itemsize)


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
    head = rows * dims.hidden_size * (_FLOAT + 2 * e) if _learns_head(job) else 0
    return logits + head + job.tokens * dims.hidden_size * e + gathered


def _learns_head(job: Job) -> bool:
    """Whether the LM head has a gradient."""
    head = next((weight for weight in outline(job.student).last if weight.name.startswith("output_layer")), outline(job.student).embedding)
    return Parts(job.parts, job.student).trains_weight(head, 0)
