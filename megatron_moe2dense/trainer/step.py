"""One step: a forward-only teacher pass over the micro-batches, then the student's pipeline schedule on its hidden states."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_moe2dense.trainer.data.samples import Batch
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.losses import Loss, measures
from megatron_moe2dense.trainer.losses.vocab_parallel import VocabParallelLogits
from megatron_moe2dense.trainer.model import HeadlessGPT
from megatron_moe2dense.trainer.pipeline import run_schedule
from megatron_moe2dense.trainer.runtime.context import local_part
from megatron_moe2dense.trainer.teacher import Teacher


@dataclass(frozen=True)
class Models:
    """What a step needs of the models.

    Attributes:
        student: this rank's model chunks, one for each virtual pipeline stage. wrapped: the same inside DDP.
        teacher: None for plain language modelling.
    """

    student: list[HeadlessGPT]
    wrapped: list[DistributedDataParallel]
    teacher: Teacher | None
    vocab_size: int


@dataclass(frozen=True)
class StepLoss:
    """Mean over all unmasked tokens of all data-parallel ranks, the same on every rank; NaN when all are masked.

    Attributes:
        means: nats per token of every loss, the trained one first. tokens: unmasked tokens.
        measures: by the names in `measures`; empty when nothing was measured, without what takes the teacher's logits when it has none.
    """

    means: tuple[float, ...]
    tokens: int
    measures: dict[str, float] = field(default_factory=dict)


def student_pass(models: Models, losses: Sequence[Loss], batches: list[Batch], groups: Groups, measure: bool = False) -> StepLoss:
    """Forward and backward over the micro-batches; gradients end up reduced and divided by the number of tokens.

    Args:
        losses: the first is trained, the others are reported; with none it is a forward pass of the bare student.
        batches: whole sequences, of which a rank takes its part here.
        measure: also take the measures, which costs both heads' products once more.
    """
    batches = [on_this_rank(batch, groups) for batch in batches]
    # the teacher's targets are on the last stage only
    targets = models.teacher.targets(batches) if models.teacher is not None else []
    pairs = list(zip(batches, targets or [None] * len(batches), strict=True))

    def forward(pairs: Iterator[tuple[Batch, Any]], chunk: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        batch, target = next(pairs)
        return chunk(batch.tokens, batch.positions, None), lambda hidden: _loss(models, (losses, measure), hidden, (batch, target))

    chunks: Sequence[torch.nn.Module] = models.wrapped if losses else models.student
    sums = run_schedule(forward, chunks, pairs, forward_only=not losses)
    return _reduce(sums, (len(losses), measure), groups)


def on_this_rank(batch: Batch, groups: Groups) -> Batch:
    """The part of every sequence that context parallelism gives this rank."""
    if groups.parallel.context == 1:
        return batch
    parts = {name: local_part(getattr(batch, name), groups.collection.cp) for name in ("tokens", "labels", "mask", "positions")}
    return dataclasses.replace(batch, **parts)


def _loss(models: Models, wanted: tuple[Sequence[Loss], bool], hidden: Tensor, against: tuple[Batch, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """What Megatron's schedule wants with `calculate_per_token_loss`: summed loss, number of tokens, what to report."""
    (losses, measure), (batch, target) = wanted, against
    labels_T, mask_T = batch.flat()
    output = models.teacher.output(target) if models.teacher is not None else None
    student = models.student[-1].parallel_logits(hidden, models.vocab_size)
    totals = [(loss.per_token(student, output, labels_T, mask_T) * mask_T).sum() for loss in losses]
    count = mask_T.sum()
    # the schedule divides the returned loss in place, so the report gets its own copy
    report = torch.stack([*totals, count]).detach().double()
    if measure:
        logits_of_teacher = output if isinstance(output, VocabParallelLogits) else None
        report = torch.cat([measures.masked_sums(student, logits_of_teacher, labels_T, mask_T), report])
    return totals[0] if totals else torch.zeros_like(count), count.to(torch.int), report


def _reduce(sums: list[Tensor], wanted: tuple[int, bool], groups: Groups) -> StepLoss:
    """Sum over micro-batches and over ranks; only one rank of each tensor-parallel group of the last stage counts."""
    losses, measure = wanted
    names = measures.AGAINST_TEACHER if measure else ()
    counts = groups.is_last_stage and groups.tensor_rank == 0
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    total = torch.stack(sums).sum(0).to(device) if counts else torch.zeros(len(names) + losses + 1, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    *values, tokens = total.tolist()
    means = [value / tokens if tokens else math.nan for value in values]
    # what every rank called NaN is unknown; a NaN of the logits shows in the student's own measures and in the loss
    measured = {name: mean for name, mean in zip(names, means, strict=False) if name in measures.ALONE or not math.isnan(mean)}
    return StepLoss(tuple(means[len(names) :]), int(tokens), measured)
