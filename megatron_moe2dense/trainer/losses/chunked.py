"""The one autograd function of all logit losses: LM head and loss together, a chunk of tokens at a time.

The gradient of a chunk is formed in the forward pass, while its logits are there: four GEMMs in all (student and teacher logits,
gradients of hidden states and of the head), no recomputation, and no [T, V] tensor ever exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe2dense.trainer.losses.targets import TeacherOutput, TopKTarget
from megatron_moe2dense.trainer.losses.vocab_parallel import VocabParallelLogits

if TYPE_CHECKING:
    from megatron_moe2dense.trainer.losses import LogitLoss

# float32 copies of a chunk's logits that a loss holds at once, and the bytes they may take together. Small chunks cost time: each
# reads and writes the head's whole gradient.
COPIES, _CHUNK_BYTES = 4, 512 * 1024**2


@dataclass(frozen=True)
class Chunk:
    """The logits of some tokens, float32, real columns only; a loss may overwrite them.

    student_TV, teacher_TV: [tokens, valid]. Of teacher_TV and top (a cached teacher) one is there, or neither for losses without a
    teacher. labels_T: vocabulary numbers. start: vocabulary number of column 0. group: over which the vocabulary is split.
    """

    student_TV: Tensor
    teacher_TV: Tensor | None
    top: TopKTarget | None
    labels_T: Tensor
    start: int
    group: dist.ProcessGroup | None


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, mask_T: Tensor, inputs: tuple[Any, ...]) -> Tensor:
        student, teacher, labels_T, loss = inputs
        hidden_learns, head_learns = ctx.needs_input_grad[:2]  # not the hidden states of a stage where nothing before them is trained
        dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
        loss_T = torch.empty(len(hidden_TD), dtype=dtype, device=hidden_TD.device)
        head_VD = weight_VD[: student.valid]
        grad_hidden_TD = torch.zeros_like(hidden_TD) if hidden_learns else None
        grad_head_VD = torch.zeros_like(weight_VD, dtype=dtype) if head_learns else None
        for tokens in token_slices(len(hidden_TD), max(student.valid, 1)):
            teacher_TV = teacher.logits(tokens) if isinstance(teacher, VocabParallelLogits) else None
            top = teacher.at(tokens) if isinstance(teacher, TopKTarget) else None
            chunk = Chunk(student.logits(tokens), teacher_TV, top, labels_T[tokens], student.start, student.group)
            loss_T[tokens], grad_TV = loss.of_chunk(chunk)
            if hidden_learns or head_learns:
                # the mask goes onto the narrow factors: tokens x hidden, not tokens x vocabulary
                grad_TV, mask_T1 = grad_TV.to(weight_VD.dtype), mask_T[tokens, None].to(weight_VD.dtype)
                if grad_hidden_TD is not None:
                    grad_hidden_TD[tokens] = (grad_TV @ head_VD).mul_(mask_T1)
                if grad_head_VD is not None:
                    _add_product(grad_head_VD[: student.valid], grad_TV.t(), hidden_TD[tokens] * mask_T1)
        ctx.save_for_backward(mask_T)
        ctx.gradients = grad_hidden_TD, grad_head_VD, weight_VD.dtype
        return loss_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (mask_T,) = ctx.saved_tensors
        grad_hidden_TD, grad_head_VD, weight_dtype = ctx.gradients
        ctx.gradients = None  # scaled in place below: a second backward pass has to fail
        scale = (grads[0] @ mask_T) / (mask_T @ mask_T).clamp_min(1e-30)
        assert torch.allclose(grads[0], scale * mask_T), "the gradient was formed for a multiple of (loss * mask).sum()"
        of_hidden = None if grad_hidden_TD is None else grad_hidden_TD.mul_(scale)
        return of_hidden, None if grad_head_VD is None else grad_head_VD.mul_(scale).to(weight_dtype), None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, the total in float32 whatever the factors are; without a copy where the types agree."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def token_slices(tokens: int, columns: int) -> list[slice]:
    """Slices of `tokens` tokens, short enough for the float32 logits of `columns` columns."""
    size = max(32, _CHUNK_BYTES // (4 * COPIES * columns))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def per_token(loss: LogitLoss, shards: tuple[VocabParallelLogits, TeacherOutput | None], labels_T: Tensor, mask_T: Tensor) -> Tensor:
    """Nats per token, float32 [T], unmasked; differentiable only as a multiple of `(result * mask_T).sum()`."""
    student, teacher = shards
    if isinstance(teacher, VocabParallelLogits):
        assert (student.start, student.valid) == (teacher.start, teacher.valid), "teacher and student shard the vocabulary differently"
    result = _ChunkedLoss.apply(student.hidden_TD, student.weight_VD, mask_T, (student, teacher, labels_T, loss))
    assert isinstance(result, Tensor)
    return result
