"""The parameters of a pipeline stage, from the outline of its model, and the buffers that Megatron-Core's DistributedDataParallel puts
them into, element by element."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_moe2dense.checkpoint.schemes.settings import Settings
from megatron_moe2dense.families.spec import FfnPart
from megatron_moe2dense.operations.plan.job import Job, Which
from megatron_moe2dense.trainer.model import ModelSpec
from megatron_moe2dense.trainer.muon import is_matrix
from megatron_moe2dense.trainer.outline import Weight, outline
from megatron_moe2dense.trainer.parts import Parts
from megatron_moe2dense.trainer.runtime import stored_fp8

# Megatron-Core 0.16, param_and_grad_buffer.py: with the distributed optimizer a parameter starts at a multiple of 64 elements, and a
# bucket ends at one of lcm(ranks, 128).
_START, _END = 64, 128


@dataclass(frozen=True)
class Parameter:
    """A parameter of one rank.

    elements: on this rank. kind: "alone" is a tied embedding that stands on two stages, in a bucket of its own.
    summed: whether tensor-parallel ranks add up its gradients, each having seen a part of the work: never, with sequence parallelism
        only, or always.
    matrix: whether Muon takes it.
    stored: bytes of codes and scales, where it is kept in FP8. expert: of a routed expert.
    trained: it has a gradient and optimizer state.
    """

    elements: int
    kind: Literal["dense", "expert", "alone"] = "dense"
    summed: Literal["never", "sequence", "always"] = "never"
    matrix: bool = False
    stored: int | None = None
    expert: bool = False
    trained: bool = True


@dataclass(frozen=True)
class Buffer:
    """A DDP buffer: the range of each bucket, and of each parameter in it."""

    buckets: tuple[tuple[int, int], ...]
    parameters: tuple[tuple[int, int], ...]

    @property
    def elements(self) -> int:
        """Padding included."""
        return self.buckets[-1][1] if self.buckets else 0

    def shard(self, rank: int, ranks: int) -> int:
        """Elements of parameters in the parts of the buckets that `rank` updates; their sum over the ranks is that of the parameters."""
        total = 0
        for start, end in self.buckets:
            part = (end - start) // ranks
            low, high = start + rank * part, start + (rank + 1) * part
            total += sum(max(0, min(last, high) - max(first, low)) for first, last in self.parameters)
        return total


def buffer_of(parameters: list[Parameter], ranks: int, sharded: bool) -> Buffer:
    """How Megatron-Core lays parameters out over `ranks` data-parallel ranks: from the last to the first, padded when `sharded`."""
    buckets: list[tuple[int, int]] = []
    places: list[tuple[int, int]] = []
    bucket, at = 0, 0

    def close(end: int) -> int:
        divisor = math.lcm(ranks, _END) if sharded else 1
        buckets.append((bucket, -(-end // divisor) * divisor))
        return buckets[-1][1]

    for parameter in reversed(parameters):
        at = -(-at // _START) * _START if sharded else at
        alone = parameter.kind == "alone" and sharded
        if alone and at > bucket:
            bucket = at = close(at)
        places.append((at, at + parameter.elements))
        at += parameter.elements
        if alone:
            bucket = at = close(at)
    if at > bucket:
        close(at)
    return Buffer(tuple(buckets), tuple(places))


def buffers(job: Job, stage: int) -> list[tuple[Buffer, int]]:
    """Of the student on this stage: each chunk's buffer and its expert-parallel one, with the number of ranks that share each."""
    found = []
    for chunk in chunks(job, "student", stage):
        own = [parameter for parameter in chunk if parameter.trained]
        kinds = {
            "dense": ([p for p in own if p.kind != "expert"], job.shards),
            "expert": ([p for p in own if p.kind == "expert"], job.expert_shards),
        }
        found += [(buffer_of(kind, ranks, job.parallel.distributed_optimizer), ranks) for kind, ranks in kinds.values() if kind]
    return found


def chunks(job: Job, which: Which, stage: int) -> list[list[Parameter]]:
    """Parameters of each chunk of a model on this stage, in the order in which Megatron-Core registers them."""
    key = ("parameters", _place(job, which, stage))
    if key not in job.memo:
        job.memo[key] = _chunks(job, which, stage)
    return job.memo[key]


def _place(job: Job, which: Which, stage: int) -> tuple[Any, ...]:
    parallel = job.parallel
    sizes = (parallel.tensor, parallel.pipeline, parallel.expert, job.expert_tensor)
    return which, stage, sizes, tuple(map(tuple, job.layers(which, stage)))


def _chunks(job: Job, which: Which, stage: int) -> list[list[Parameter]]:
    numbers = job.layers(which, stage)
    found = []
    for place, layers in enumerate(numbers):
        first = stage == 0 and place == 0
        last = job.is_last(stage) and place == len(numbers) - 1
        found.append(list(_chunk(job, which, layers, (first, last))))
    return found


def _chunk(job: Job, which: Which, layers: list[int], ends: tuple[bool, bool]) -> Iterator[Parameter]:
    parts = Parts(job.parts, job.spec(which)) if which == "student" else None
    for weight, layer, parameter in _weights(job, which, layers, ends):
        learns = parts is None or parts.are_all or parts.trains_weight(weight, layer)
        yield parameter if learns else replace(parameter, trained=False)


def _weights(job: Job, which: Which, layers: list[int], ends: tuple[bool, bool]) -> Iterator[tuple[Weight, int, Parameter]]:
    spec, (first, last) = job.spec(which), ends
    whole = outline(spec)
    apart = spec.dims.tied_embeddings and first != last
    embedding = _of_rank(job, spec, whole.embedding, alone=apart)
    if first:
        yield whole.embedding, 0, embedding
    moe = set(spec.moe_layers)
    here = {kind: [(weight, _of_rank(job, spec, weight)) for weight in _held(job, spec, layer)] for kind, layer in whole.layers.items()}
    for layer in layers:
        yield from ((weight, layer, parameter) for weight, parameter in here[layer in moe])
    if last:
        yield from ((weight, 0, _of_rank(job, spec, weight)) for weight in whole.last)
        if apart:
            yield whole.embedding, 0, embedding


def _held(job: Job, spec: ModelSpec, layer: Sequence[Weight]) -> list[Weight]:
    """Those of a layer that a rank holds: all but the experts of others."""
    experts = spec.dims.experts // job.parallel.expert
    return [weight for weight in layer if not weight.is_expert or weight.expert < experts]


def _of_rank(job: Job, spec: ModelSpec, weight: Weight, alone: bool = False) -> Parameter:
    """A rank's part. What tensor parallelism does not split each of its ranks has whole, and with sequence parallelism sees a part of the
    tokens."""
    shape, axis = list(weight.shape), weight.rule.split
    if axis is not None:
        matrices = 2 if weight.rule.kind == "gate_up" and axis == 0 else 1  # each is split on its own
        parts = job.expert_tensor if weight.is_expert else job.parallel.tensor
        shape[axis] = shape[axis] // matrices // parts * matrices
    # with one rank a part Megatron-Core takes experts for ordinary parameters
    kind = "alone" if alone else "expert" if weight.is_expert and job.parallel.expert > 1 else "dense"
    summed = "always" if weight.summed_by_name else "sequence" if axis is None else "never"
    stored = _stored_bytes(spec, weight, shape) if spec.in_fp8 else None
    return Parameter(math.prod(shape), kind, summed, is_matrix(weight.name, len(shape)), stored, weight.is_expert)


def _stored_bytes(spec: ModelSpec, weight: Weight, shape: Sequence[int]) -> int | None:
    """Bytes of a rank's part that is kept in FP8, None for one that is not; by config.json, which says how an FP8 checkpoint cuts its
    blocks and which modules it leaves alone (of attention: FFNs are taken for quantised)."""
    if not stored_fp8.is_stored(weight.name, weight.shape):
        return None
    settings, made_of = Settings.of_config(spec.config), weight.rule.made_of
    modules = [] if isinstance(made_of, FfnPart) else [name.format(layer=0).removesuffix(".weight") for name in made_of]
    own = settings.fp8_columns(modules[0] if modules else "")
    if own is not None and any(settings.excludes(module) for module in modules):
        return None
    return stored_fp8.nbytes(shape, stored_fp8.columns_of_scale(shape[1], weight.shape[1], own or stored_fp8.BLOCK))
