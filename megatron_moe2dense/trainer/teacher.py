"""The frozen teacher: a MoE in the same job and on the same devices, expert-parallel inside the data-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.families import Dims
from megatron_moe2dense.trainer import model as models
from megatron_moe2dense.trainer import weights
from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.data.samples import Batch
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.losses.targets import TeacherOutput
from megatron_moe2dense.trainer.losses.vocab_parallel import VocabParallelLogits
from megatron_moe2dense.trainer.pipeline import PipelineLayout, run_schedule
from megatron_moe2dense.trainer.runtime import Runtime


class Teacher(Protocol):
    """Where a step gets the teacher's knowledge from."""

    def targets(self, batches: list[Batch]) -> list[Any]:
        """Before the student's pass, on every rank: one entry a micro-batch on the last stage, an empty list elsewhere."""
        ...

    def output(self, target: Any) -> TeacherOutput:
        """On the last stage, when the student's hidden states of that micro-batch are there: what the losses take."""
        ...

    def of_other_text(self) -> Teacher | None:
        """This teacher for text that is not trained on, None when it knows no other."""
        ...


@dataclass(frozen=True)
class LiveTeacher:
    """A model of this job; its targets are final hidden states [S, B, D], never logits. lost: where weights were rounded to FP8."""

    chunks: list[models.HeadlessGPT]
    spec: models.ModelSpec
    lost: weights.Rounding = field(default_factory=weights.Rounding)

    @torch.no_grad()
    def targets(self, batches: list[Batch]) -> list[Tensor]:
        """See `Teacher.targets`: a forward-only pass."""

        def forward(batches: Iterator[tuple[Batch]], chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., Tensor]]:
            (batch,) = next(batches)
            return chunk(batch.tokens, batch.positions, None), lambda hidden, non_loss_data: hidden  # noqa: ARG005

        return run_schedule(forward, self.chunks, [(batch,) for batch in batches], forward_only=True, collect_non_loss_data=True)

    @torch.no_grad()
    def output(self, target: Tensor) -> VocabParallelLogits:
        """See `Teacher.output`."""
        return self.chunks[-1].parallel_logits(target, self.spec.dims.vocab_size)

    def of_other_text(self) -> LiveTeacher:
        """See `Teacher.of_other_text`."""
        return self


def build(spec: models.ModelSpec, config: DistillConfig, groups: Groups, runtime: Runtime) -> LiveTeacher:
    """Load the teacher, in eval mode, without gradients; `layout` and `startup` know what it has to be."""
    overrides = {"moe_router_topk": active_experts(config.active_experts(), spec.dims)} if spec.dims.experts else {}
    chunks = models.build(spec, groups, runtime, PipelineLayout.of_teacher(groups.parallel, spec.dims.layers), **overrides)
    lost = weights.load(chunks, spec, groups)
    for chunk in chunks:
        chunk.requires_grad_(False).eval()
    held = sum(tensor.nbytes for chunk in chunks for tensor in chunk.parameters())
    logger.info("teacher: %s, %d layers, %.3g GB on this rank", config.live_teacher, spec.dims.layers, held / 1e9)
    if lost.matrices:
        logger.warning("teacher: %d matrices rounded to FP8, relative error %.2e", lost.matrices, lost.relative)
    return LiveTeacher(chunks, spec, lost)


def require_same_vocabulary(teacher: models.ModelSpec, student: models.ModelSpec) -> None:
    """UserError for two sizes of vocabulary."""
    if teacher.dims.vocab_size != student.dims.vocab_size:
        raise UserError(
            f"teacher vocabulary {teacher.dims.vocab_size}, student vocabulary {student.dims.vocab_size}",
            "one vocabulary",
            "distil into a student made from this teacher, or one with its tokenizer",
        )


def active_experts(active: int | None, dims: Dims) -> int:
    """Experts a token, `active` when it is given; UserError when there are not so many, or fewer than the teacher's own number."""
    if active is None:
        return dims.active
    if not dims.active <= active <= dims.experts:
        raise UserError(f"teacher.routing.active: {active}", f"between {dims.active} and {dims.experts}", "choose a number in this range")
    return active
