"""Models over processes, from their config.json alone: everything that Megatron-Core or the trainer asks of a layout, as questions that
`plan`, `doctor`, `--dry-run`, `cache-teacher` and the run all put."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.trainer import model as models
from megatron_moe2dense.trainer import muon
from megatron_moe2dense.trainer.config import BatchConfig, ParallelConfig
from megatron_moe2dense.trainer.groups import require_rounds, require_sequence, require_world
from megatron_moe2dense.trainer.model import ModelSpec
from megatron_moe2dense.trainer.pipeline import PipelineLayout
from megatron_moe2dense.trainer.runtime.routers import require_router
from megatron_moe2dense.trainer.teacher import active_experts, require_same_vocabulary


@dataclass(frozen=True)
class Remark:
    """An answer that stops nothing. do: what would be better."""

    found: str
    do: str


@dataclass(frozen=True)
class Question:
    """Something that has to hold. name: in reports. ask: says what there is; UserError when it does not hold. after: questions, by name,
    without which this one has no answer."""

    name: str
    ask: Callable[[], str | Remark | None]
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """A job as far as its layout goes.

    Attributes:
        student: None where a teacher runs alone. teacher: None without a live one. active: experts a token of the teacher, None: its own
            number. batch: None where nothing is trained. length: tokens of a sequence. world: processes. muon: the matrices of the
            student's layers are Muon's.
    """

    student: ModelSpec | None
    teacher: ModelSpec | None
    active: int | None
    parallel: ParallelConfig
    batch: BatchConfig | None
    length: int
    world: int
    muon: bool = field(default=False, kw_only=True)

    @property
    def data(self) -> int:
        """Ranks that read different samples."""
        return self.world // (self.parallel.tensor * self.parallel.pipeline * self.parallel.context)

    def questions(self) -> Iterator[Question]:
        """All that a run would meet, cause before effect."""
        return chain(self.of_models(), self.of_layout())

    def of_models(self) -> Iterator[Question]:
        """Those that no other layout would answer."""
        student, teacher = self.student, self.teacher
        if teacher is not None:
            yield Question("teacher's routing", lambda: _require_routing(teacher, self.active))
        if student is not None and teacher is not None:
            yield Question("vocabulary", lambda: require_same_vocabulary(teacher, student))
        if student is not None and self.muon:
            yield Question("optimizer", lambda: muon.require_dense(student))

    def of_layout(self) -> Iterator[Question]:
        """Those of the layout."""
        parallel, batch, student, teacher = self.parallel, self.batch, self.student, self.teacher
        yield Question("processes", self._processes)
        yield Question("sequence", lambda: require_sequence(parallel, self.length))
        if batch is not None:
            yield Question("batch", lambda: self._batch(batch), ("processes",))
        if student is not None:
            yield from _of_model("student", student, parallel, PipelineLayout.of_student)
            yield Question("student's experts", lambda: _require_trained_experts(student, parallel))
        if teacher is not None:
            yield from _of_model("teacher", teacher, parallel, PipelineLayout.of_teacher)

    def _processes(self) -> str:
        require_world(self.parallel, self.world)
        sizes = f"tensor {self.parallel.tensor} x pipeline {self.parallel.pipeline} x context {self.parallel.context}"
        return f"{self.world}: {sizes} x data {self.data}"

    def _batch(self, batch: BatchConfig) -> str:
        require_rounds(self.parallel, batch, self.data)
        return f"{batch.global_} sequences a step, {batch.global_ // (batch.micro * self.data)} micro-batches on a rank"


def _of_model(
    who: str, spec: ModelSpec, parallel: ParallelConfig, of: Callable[[ParallelConfig, int], PipelineLayout]
) -> Iterator[Question]:
    yield Question(f"{who}'s layers", lambda: f"{' + '.join(map(str, of(parallel, spec.dims.layers).layers))} layers")
    yield Question(f"{who}'s sizes", lambda: models.require_division(spec, parallel))
    yield Question(f"{who}'s attention", lambda: _require_attention(spec, parallel))
    if spec.dims.experts:
        yield Question(f"{who}'s biases", lambda: _require_biases(spec, parallel))


def _require_biases(spec: ModelSpec, parallel: ParallelConfig) -> None:
    parts = {"add_bias_linear": models.family_fields(spec)["add_bias_linear"], "expert_tensor_parallel_size": parallel.expert_tensor}
    models.require_whole_biases({**parts, "tensor_model_parallel_size": parallel.tensor})


def _require_attention(spec: ModelSpec, parallel: ParallelConfig) -> None:
    all_to_all = models.family_fields(spec).get("cp_comm_type") == "a2a"
    if parallel.context > 1 and all_to_all and spec.dims.kv_heads % (parallel.tensor * parallel.context):
        raise UserError(
            f"parallel.context {parallel.context} with {spec.dims.kv_heads} KV heads, windows or sinks",
            "KV heads that divide by tensor x context",
            "choose another parallel.context",
        )


def _require_trained_experts(student: ModelSpec, parallel: ParallelConfig) -> str:
    """UserError for what Megatron-Core's MoE layer refuses in training."""
    models.require_sequence_for_experts(student, parallel)
    if not student.dims.experts:
        return "none"
    require_router(student.router, student.dims.experts, student.dims.active)
    return f"{student.dims.experts}, {student.dims.active} active"


def _require_routing(teacher: ModelSpec, active: int | None) -> str:
    if not teacher.dims.experts and active is not None:
        raise UserError(f"teacher.routing.active: {active} of a dense teacher", "a MoE, whose routing it widens", "drop teacher.routing")
    if not teacher.dims.experts:
        return "no experts"
    chosen = active_experts(active, teacher.dims)
    require_router(teacher.router, teacher.dims.experts, chosen)
    return f"{chosen} of {teacher.dims.experts} experts"


def answers(questions: Iterable[Question]) -> Iterator[tuple[str, str | Remark | UserError]]:
    """Names and what was found; questions without an answer are left out. A question is asked before the next is taken, which may be
    about what it found."""
    failed: set[str] = set()
    for question in questions:
        if failed.intersection(question.after):
            failed.add(question.name)
            continue
        try:
            yield question.name, question.ask() or "fits"
        except UserError as error:
            failed.add(question.name)
            yield question.name, error


def refuse(found: Iterable[tuple[str, object]]) -> None:
    """UserError that names every problem among `answers`, if there is one."""
    problems = [(name, answer) for name, answer in found if isinstance(answer, UserError)]
    if len(problems) == 1:
        raise problems[0][1]
    if problems:
        lines = (f"  - {name}: {error.found} (expected: {error.expected})" for name, error in problems)
        raise UserError(
            "\n".join([f"{len(problems)} things that this run can not start with", *lines]),
            "a config whose layout, models, text and output go together",
            "; ".join(dict.fromkeys(error.do for _, error in problems)),
        )
