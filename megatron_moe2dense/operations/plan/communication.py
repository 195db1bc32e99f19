"""What every rank hands to collectives in a step, by kind: payloads, not yet multiplied by what an algorithm sends of them.

Payload: the whole tensor of an all-reduce, the gathered one of an all-gather, the unreduced one of a reduce-scatter, what a rank puts into
an all-to-all or a send. Counted from Megatron-Core 0.16's modules. A few scalars (norms, flags) are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_moe2dense.operations.plan.job import Job, Which
from megatron_moe2dense.operations.plan.parameters import buffers, chunks
from megatron_moe2dense.trainer.model import ModelSpec, family_fields

Kind = Literal["TP", "PP", "DP", "EP", "CP", "KL"]
Phase = Literal["student", "teacher", "update"]
_FLOAT, _INDEX = 4, 8
# numbers per token that the ranks of a vocabulary exchange for the forward KL (losses/forward_kl.py), the most of any loss
_KL_NUMBERS = 5


@dataclass(frozen=True)
class Traffic:
    """One kind of message of a step.

    Attributes:
        group: process group by Megatron-Core's name; "etp" shares an expert, "edp" its gradients. phase: when it goes out.
        payload: bytes, of all messages of this rank together. ranks: of the group.
    """

    kind: Kind
    group: str
    operation: str
    phase: Phase
    payload: float
    ranks: int


def of_stage(job: Job, stage: int) -> list[Traffic]:
    """All traffic of a rank of this stage in a step."""
    found = [*_update(job, stage), *_pipeline(job, stage)]
    for which in job.models():
        for traffic in _model(job, which, stage):
            found.append(_times(traffic, job.micro_batches))
    if job.is_last(stage) and job.parallel.tensor > 1:
        payload = job.parallel.tensor * _KL_NUMBERS * job.tokens * _FLOAT * job.micro_batches
        found.append(Traffic("KL", "tp", "all-gather", "student", payload, job.parallel.tensor))
    return [traffic for traffic in found if traffic.ranks > 1 and traffic.payload]


def volume(traffic: list[Traffic]) -> dict[str, float]:
    """Payload by kind, bytes."""
    found: dict[str, float] = {}
    for each in traffic:
        found[each.kind] = found.get(each.kind, 0) + each.payload
    return found


def _times(traffic: Traffic, factor: float) -> Traffic:
    return Traffic(traffic.kind, traffic.group, traffic.operation, traffic.phase, traffic.payload * factor, traffic.ranks)


def _update(job: Job, stage: int) -> Iterator[Traffic]:
    """After the micro-batches: float32 gradients are reduced over data x context ranks and the new weights gathered (ZeRO stage 1), or
    all-reduced; gradients that tensor-parallel ranks have in parts, those of a tied embedding on two stages, the number of tokens; the
    directions of sharded matrices, for Muon."""
    found = buffers(job, stage)
    # Megatron-Core 0.16 has an optimizer of its own for expert-parallel parameters, and each of the two gathers the weights of both
    parameters = [parameter for chunk in chunks(job, "student", stage) for parameter in chunk if parameter.trained]
    gathers = 1 + any(parameter.kind == "expert" for parameter in parameters)
    for buffer, ranks in found:
        group = "dp_cp" if ranks == job.shards else "edp"
        if job.parallel.distributed_optimizer:
            yield Traffic("DP", group, "reduce-scatter", "update", buffer.elements * _FLOAT, ranks)
            yield Traffic("DP", group, "all-gather", "update", gathers * buffer.elements * job.element, ranks)
        else:
            yield Traffic("DP", group, "all-reduce", "update", buffer.elements * _FLOAT, ranks)
    yield Traffic("DP", "dp_cp", "all-reduce", "update", _FLOAT, job.shards)
    when = ("sequence", "always") if job.parallel.sequence else ("always",)
    summed = sum(parameter.elements for parameter in parameters if parameter.summed in when)
    yield Traffic("TP", "tp", "all-reduce", "update", summed * _FLOAT, job.parallel.tensor)
    if job.muon:
        sharded = sum(parameter.elements for parameter in parameters if parameter.matrix and parameter.summed == "never")
        yield Traffic("TP", "tp", "all-gather", "update", job.parallel.tensor * sharded * job.element, job.parallel.tensor)
    shared = sum(parameter.elements for parameter in parameters if parameter.kind == "alone")
    yield Traffic("PP", "embd", "all-reduce", "update", shared * _FLOAT, 2)


def _pipeline(job: Job, stage: int) -> Iterator[Traffic]:
    """Hidden states to the next stage, their gradients to the one before, and between chunks round the pipeline; the token count."""
    stages, chunks_of, batches = job.parallel.pipeline, job.parallel.virtual_pipeline, job.micro_batches
    message = job.outside * job.student.dims.hidden_size * job.element
    forward, backward = (chunks_of - job.is_last(stage)), (chunks_of - (stage == 0))
    yield Traffic("PP", "pp", "send", "student", (forward + backward) * batches * message, stages)
    if job.teacher is not None and not job.is_last(stage):
        yield Traffic("PP", "pp", "send", "teacher", batches * job.outside * job.teacher.dims.hidden_size * job.element, stages)
    yield Traffic("PP", "pp", "broadcast", "update", _FLOAT, stages)


def _model(job: Job, which: Which, stage: int) -> Iterator[Traffic]:
    """Inside a model, of one micro-batch."""
    spec = job.spec(which)
    trains = which == "student"
    whole = job.tokens * spec.dims.hidden_size * job.element
    ends = _End(job, which, whole)
    if stage == 0:
        yield ends.traffic("reduce-scatter" if job.parallel.sequence else "all-reduce")
        if trains and job.parallel.sequence:
            yield ends.traffic("all-gather")
    if job.is_last(stage):
        if job.parallel.sequence:
            yield ends.traffic("all-gather")
        if trains:
            yield ends.traffic("reduce-scatter" if job.parallel.sequence else "all-reduce")
    for kinds in job.kinds(which, stage):
        for has_experts, layers in kinds.items():
            yield from (_times(traffic, layers) for traffic in _layer(job, which, spec, has_experts))


@dataclass(frozen=True)
class _End:
    """Embedding and heads, and other messages of one model in its tensor-parallel group."""

    job: Job
    which: Which
    payload: float

    def traffic(self, operation: str, count: float = 1) -> Traffic:
        return Traffic("TP", "tp", operation, self.which, count * self.payload, self.job.parallel.tensor)


def _layer(job: Job, which: Which, spec: ModelSpec, has_experts: bool) -> Iterator[Traffic]:
    """Tensor-parallel blocks: an all-reduce forward and one backward each (Megatron-LM, Shoeybi et al. 2019, arXiv:1909.08053), or with
    sequence parallelism all-gather and reduce-scatter both ways, and once more the gather of the input for the weight's gradient."""
    trains, recompute = which == "student", job.parallel.recompute
    dims = spec.dims
    whole = job.tokens * dims.hidden_size * job.element
    again_all, again_ffn = trains and recompute == "full", trains and recompute != "none"
    blocks = [again_all]
    if not has_experts or dims.shared_width:
        blocks.append(again_ffn)
    for again in blocks:
        end, forward = _End(job, which, whole), 1 + again
        if job.parallel.sequence:
            yield end.traffic("all-gather", forward + 2 * trains)
            yield end.traffic("reduce-scatter", forward + trains)
        else:
            yield end.traffic("all-reduce", forward + trains)
    if dims.kv_heads < job.parallel.tensor:  # ranks share KV heads: what they project is gathered
        projected = _End(job, which, job.tokens * (dims.heads + 2 * dims.kv_heads) * dims.head_dim * job.element)
        yield projected.traffic("all-gather", 1 + again_all)
        if trains:
            yield projected.traffic("reduce-scatter")
    yield from _context(job, which, spec, 1 + again_all)
    if has_experts:
        yield from _experts(job, which, spec, 1 + again_ffn)


def _context(job: Job, which: Which, spec: ModelSpec, forward: int) -> Iterator[Traffic]:
    """Keys and values. Plain modules gather them over the context-parallel ranks and reduce-scatter their gradients; Transformer Engine
    passes them round a ring (Liu et al. 2023, arXiv:2310.01889): C - 1 times forward, with their gradients twice as much backward."""
    dims, fields, ranks = spec.dims, family_fields(spec), job.parallel.context
    width = 2 * max(dims.kv_heads, job.parallel.tensor) * dims.head_dim  # ranks that share a head have it each
    if fields.get("multi_latent_attention"):
        width = dims.heads * (dims.head_dim + fields["v_head_dim"])
    local = job.tokens * width // job.parallel.tensor * job.element
    trains, phase = which == "student", which
    if job.kernels:
        yield Traffic("CP", "cp", "send", phase, (forward + 2 * trains) * (ranks - 1) * local, ranks)
        return
    yield Traffic("CP", "cp", "all-gather", phase, forward * ranks * local, ranks)
    if trains:
        yield Traffic("CP", "cp", "reduce-scatter", phase, ranks * local, ranks)


def _experts(job: Job, which: Which, spec: ModelSpec, forward: int) -> Iterator[Traffic]:
    """Routed rows R = tokens x active, and their weights: dispatched and combined by all-to-all over expert-parallel ranks, then gathered
    over the ranks that share an expert; the same backward (GShard, Lepikhin et al. 2020, arXiv:2006.16668). Balanced routing.

    The numbers of rows of every expert go round before, int64.
    """
    dims, expert, shared = spec.dims, job.parallel.expert, job.expert_tensor
    phase = which
    active = job.active if which == "teacher" and job.active is not None else dims.active
    rows = job.outside * active
    values, weights = rows * dims.hidden_size * job.element, rows * _FLOAT
    passes = forward + (which == "student")
    counts = dims.experts * _INDEX * expert * shared
    yield Traffic("EP", "tp_ep", "all-gather", phase, forward * counts, expert * shared)
    yield Traffic("EP", "ep", "all-to-all", phase, passes * (2 * values + weights), expert)
    backward = which == "student"
    combined = rows * dims.hidden_size * _FLOAT  # Megatron-Core adds experts' outputs up in the type of their weights
    gathered = forward * (values + weights) + backward * combined
    scattered = forward * combined + backward * (values + weights)
    yield Traffic("EP", "etp", "all-gather", phase, shared * gathered, shared)
    yield Traffic("EP", "etp", "reduce-scatter", phase, shared * scattered, shared)
