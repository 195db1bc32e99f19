"""One step: a forward-only teacher pass over the micro-batches, then the student's pipeline schedule on its hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_moe2dense.trainer.data import Batch
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.losses import Loss
from megatron_moe2dense.trainer.model import HeadlessGPT


@dataclass(frozen=True)
class Models:
    """What a step needs of the models. `wrapped` is the student inside DDP (or the bare student for evaluation)."""

    student: HeadlessGPT
    wrapped: torch.nn.Module
    teacher: HeadlessGPT | None
    vocab_size: int


@dataclass(frozen=True)
class StepLoss:
    """Mean over all unmasked tokens of all data-parallel ranks, the same on every rank.

    Attributes:
        means: nats per token of every loss, the trained one first. tokens: unmasked tokens.
    """

    means: tuple[float, ...]
    tokens: int


def teacher_pass(models: Models, batches: list[Batch]) -> list[Tensor]:
    """The teacher's final hidden states [S, B, D] of every micro-batch on the last stage, an empty list elsewhere."""
    if models.teacher is None:
        return []

    def forward(batches: Iterator[Batch], model: HeadlessGPT) -> tuple[Tensor, Callable[..., Tensor]]:
        batch = next(batches)
        return model(batch.tokens, batch.positions, None), lambda hidden, non_loss_data: hidden  # noqa: ARG005

    with torch.no_grad():
        return _schedule(forward, models.teacher, batches, forward_only=True, collect_non_loss_data=True)


def student_pass(models: Models, losses: Sequence[Loss], batches: list[Batch], groups: Groups, forward_only: bool = False) -> StepLoss:
    """Forward (and backward) over the micro-batches; gradients end up reduced and divided by the number of tokens.

    Only the first of `losses` is trained; the others are reported.
    """
    hidden_of_teacher = iter(teacher_pass(models, batches))

    def forward(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        batch = next(batches)
        return model(batch.tokens, batch.positions, None), lambda hidden: _loss(models, losses, hidden, (batch, hidden_of_teacher))

    model = models.student if forward_only else models.wrapped
    sums = _schedule(forward, model, batches, forward_only=forward_only)
    return _reduce(sums, len(losses), groups)


def _loss(models: Models, losses: Sequence[Loss], hidden: Tensor, against: tuple[Batch, Iterator[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """What Megatron's schedule wants with `calculate_per_token_loss`: summed loss, number of tokens, what to report."""
    batch, teacher = against
    labels_T, mask_T = batch.flat()
    shard = None
    if models.teacher is not None:
        with torch.no_grad():
            shard = models.teacher.vocab_shard(next(teacher), models.vocab_size)
    student = models.student.vocab_shard(hidden, models.vocab_size)
    totals = [(loss.per_token(student, shard, labels_T, mask_T) * mask_T).sum() for loss in losses]
    count = mask_T.sum()
    # the schedule divides the returned loss in place, so the report gets its own copy
    return totals[0], count.to(torch.int), torch.stack([*totals, count]).detach().double()


def _schedule(forward: Callable[..., Any], model: torch.nn.Module, batches: list[Batch], **options: Any) -> list[Tensor]:
    batch_size, length = batches[0].tokens.shape
    run = get_forward_backward_func()
    return run(
        forward_step_func=forward,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=batch_size,
        **{"forward_only": False, **options},
    )


def _reduce(sums: list[Tensor], losses: int, groups: Groups) -> StepLoss:
    """Sum over micro-batches and over ranks; only one rank of each tensor-parallel group of the last stage counts."""
    counts = groups.is_last_stage and groups.tensor_rank == 0
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    total = torch.stack(sums).sum(0).to(device) if counts else torch.zeros(losses + 1, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    *values, tokens = total.tolist()
    return StepLoss(tuple(value / max(tokens, 1.0) for value in values), int(tokens))
