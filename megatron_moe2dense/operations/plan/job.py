"""A job as the formulas of `plan` see it: two models, a layout, a batch; and the sizes that follow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.trainer import model as models
from megatron_moe2dense.trainer.config import BatchConfig, ParallelConfig
from megatron_moe2dense.trainer.groups import require_rounds, require_sequence, require_world
from megatron_moe2dense.trainer.losses import Loss
from megatron_moe2dense.trainer.model import ModelSpec
from megatron_moe2dense.trainer.pipeline import PipelineLayout

Which = Literal["student", "teacher"]


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        teacher: None without a live one. active: experts a token of the teacher, None: its own number.
        length: tokens of a sequence. world: processes.
        kernels: Transformer Engine's layers and kernels (GPU), else the plain modules of `runtime` (CPU).
        overlap: gradients are reduced behind the backward pass. fp8: the student's layers multiply in FP8.
        muon: the matrices of the student's layers are Muon's.
        experts_split: tensor parallel size inside an expert, where it is not the trainer's own choice.
        memo: parameters and buffers found so far, shared by the jobs that `dataclasses.replace` makes of this one.
    """

    student: ModelSpec
    teacher: ModelSpec | None
    active: int | None
    parallel: ParallelConfig
    batch: BatchConfig
    length: int
    world: int
    loss: Loss
    kernels: bool = True
    overlap: bool = True
    fp8: bool = False
    muon: bool = False
    experts_split: int | None = None
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
    def data(self) -> int:
        """Ranks that read different samples."""
        return self.world // (self.parallel.tensor * self.parallel.pipeline * self.parallel.context)

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
        if parallel.layers_per_stage or parallel.teacher_layers_per_stage:
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


def fewest_processes(parallel: ParallelConfig) -> int:
    """That make whole groups of every kind."""
    return math.lcm(parallel.tensor * parallel.pipeline * parallel.context, parallel.pipeline * parallel.expert)


def family_fields(spec: ModelSpec) -> Mapping[str, Any]:
    """The family's TransformerConfig fields."""
    return spec.family.megatron_config(spec.class_config)


def require_layout(job: Job) -> None:
    """UserError for what the trainer would refuse: sizes that do not divide, micro-batches that do not come out, ..."""
    parallel = job.parallel
    require_world(parallel, job.world)
    for which in job.models():
        spec = job.spec(which)
        models.require_division(spec.dims, parallel)
        job.pipeline_layout(which)
        _require_attention(spec, parallel)
    if job.student.dims.experts and parallel.tensor > 1 and not parallel.sequence:
        # Megatron-Core's MoE layer, in training
        raise UserError(f"a MoE student with parallel.tensor {parallel.tensor}", "sequence parallelism", "set parallel.sequence=true")
    require_sequence(parallel, job.length)
    require_rounds(parallel, job.batch, {"batch.global": job.batch.global_}, job.data)


def _require_attention(spec: ModelSpec, parallel: ParallelConfig) -> None:
    fields = family_fields(spec)
    if parallel.context > 1 and fields.get("cp_comm_type") == "a2a" and spec.dims.kv_heads % (parallel.tensor * parallel.context):
        raise UserError(
            f"parallel.context {parallel.context} with {spec.dims.kv_heads} KV heads, windows or sinks",
            "KV heads that divide by tensor x context",
            "choose another parallel.context",
        )
    if spec.dims.experts:
        parts = {"add_bias_linear": fields["add_bias_linear"], "expert_tensor_parallel_size": parallel.expert_tensor}
        models.require_whole_biases({**parts, "tensor_model_parallel_size": parallel.tensor})
