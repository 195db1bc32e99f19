"""A job as the formulas of `plan` see it: two models, a layout, a batch; and the sizes that follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_moe2dense.trainer.config import BatchConfig
from megatron_moe2dense.trainer.layout import Layout
from megatron_moe2dense.trainer.losses import Loss
from megatron_moe2dense.trainer.model import ModelSpec
from megatron_moe2dense.trainer.pipeline import PipelineLayout

Which = Literal["student", "teacher"]


@dataclass(frozen=True)
class Job(Layout):
    """One run, and besides its layout:

    Attributes:
        kernels: Transformer Engine's layers and kernels (GPU), else the plain modules of `runtime` (CPU).
        overlap: gradients are reduced behind the backward pass. fp8: the student's layers multiply in FP8.
        experts_split: tensor parallel size inside an expert, where it is not the trainer's own choice.
        parts: what is trained of the student; activations are counted as if all were (an upper bound).
        memo: parameters and buffers found so far, shared by the jobs that `dataclasses.replace` makes of this one.
    """

    student: ModelSpec
    batch: BatchConfig
    loss: Loss
    kernels: bool = True
    overlap: bool = True
    fp8: bool = False
    experts_split: int | None = None
    parts: str | Sequence[str] = "all"
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def expert_tensor(self) -> int:
        """Ranks that share an expert."""
        return self.experts_split or self.parallel.expert_tensor

    @property
    def element(self) -> int:
        """Bytes of a value in the compute type."""
        return self.student.dtype.itemsize

    @property
    def shards(self) -> int:
        """Ranks that share the optimizer state of what is no expert: data x context."""
        return self.data * self.parallel.context

    @property
    def expert_shards(self) -> int:
        """Ranks that share the optimizer state of an expert: those of a stage that hold the same part of it."""
        return self.world // (self.parallel.pipeline * self.parallel.expert * self.expert_tensor)

    @property
    def micro_batches(self) -> int:
        """Of a rank in a step."""
        return self.batch.global_ // (self.batch.micro * self.data)

    @property
    def tokens(self) -> int:
        """Of a micro-batch on a rank, before sequence parallelism."""
        return self.batch.micro * self.length // self.parallel.context

    @property
    def outside(self) -> int:
        """Tokens of a micro-batch that a rank holds between the tensor-parallel parts: fewer with sequence parallelism."""
        return self.tokens // (self.parallel.tensor if self.parallel.sequence else 1)

    def pipeline_layout(self, which: Which) -> PipelineLayout:
        """Layers of the stages of "student" or "teacher"."""
        spec = self.spec(which)
        of = PipelineLayout.of_student if which == "student" else PipelineLayout.of_teacher
        return of(self.parallel, spec.dims.layers)

    def spec(self, which: Which) -> ModelSpec:
        """Of "student" or "teacher"."""
        if which == "student":
            return self.student
        assert self.teacher is not None
        return self.teacher

    def models(self) -> list[Which]:
        """Those that are there."""
        return ["student"] if self.teacher is None else ["student", "teacher"]

    def layers(self, which: Which, stage: int) -> list[list[int]]:
        """Global numbers of the layers of this pipeline stage, by chunk."""
        layout, stages = self.pipeline_layout(which), self.parallel.pipeline
        starts = [sum(layout.layers[:place]) for place in range(len(layout.layers))]
        return [
            list(range(starts[chunk * stages + stage], starts[chunk * stages + stage] + layout.layers[chunk * stages + stage]))
            for chunk in range(layout.chunks)
        ]

    def stages(self) -> list[int]:
        """Pipeline stages that differ: with even layers the second stands for all between the first and the last, and holds most."""
        parallel = self.parallel
        if parallel.layers_per_stage or parallel.teacher_layers_per_stage or not isinstance(self.parts, str):
            return list(range(parallel.pipeline))
        return sorted({0, min(1, parallel.pipeline - 1), parallel.pipeline - 1})

    def kinds(self, which: Which, stage: int) -> list[dict[bool, int]]:
        """How many layers without (False) and with experts (True) each chunk of this stage has; kinds that are not there are left out."""
        moe = set(self.spec(which).moe_layers)
        found = []
        for layers in self.layers(which, stage):
            experts = len(moe.intersection(layers))
            found.append({kind: count for kind, count in ((False, len(layers) - experts), (True, experts)) if count})
        return found

    def is_last(self, stage: int) -> bool:
        """Whether this stage has the heads and the loss."""
        return stage == self.parallel.pipeline - 1
