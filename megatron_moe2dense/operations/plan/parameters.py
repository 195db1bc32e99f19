"""The parameters of a pipeline stage and the buffers that Megatron-Core's DistributedDataParallel puts them into, element by element."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_moe2dense.operations.plan.job import Job, Which, family_fields
from megatron_moe2dense.trainer.config import BatchConfig, ParallelConfig
from megatron_moe2dense.trainer.losses import losses
from megatron_moe2dense.trainer.model import Blueprint, padded_vocabulary

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
    """

    elements: int
    kind: Literal["dense", "expert", "alone"] = "dense"
    summed: Literal["never", "sequence", "always"] = "never"
    matrix: bool = False


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
    for own in chunks(job, "student", stage):
        kinds = {
            "dense": ([p for p in own if p.kind != "expert"], job.shards),
            "expert": ([p for p in own if p.kind == "expert"], job.expert_shards),
        }
        found += [(buffer_of(kind, ranks, job.parallel.distributed_optimizer), ranks) for kind, ranks in kinds.values() if kind]
    return found


def matrices(student: Blueprint) -> int:
    """Elements of the matrices in the layers of a dense model, those that Muon takes."""
    whole = ParallelConfig()
    job = Job(student, None, None, whole, BatchConfig(), 1, 1, losses["cross_entropy"]())
    return sum(parameter.elements for chunk in chunks(job, "student", 0) for parameter in chunk if parameter.matrix)


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
    blueprint, (first, last) = job.blueprint(which), ends
    dims = blueprint.dims
    head = padded_vocabulary(dims.vocab_size) // job.parallel.tensor * dims.hidden_size
    apart = dims.tied_embeddings and first != last
    if first:
        yield Parameter(head, "alone" if apart else "dense")
    moe = set(blueprint.moe_layers)
    kinds = {kind: list(_layer(job, blueprint, kind)) for kind in {layer in moe for layer in layers}}
    for layer in layers:
        yield from kinds[layer in moe]
    if last:
        yield Parameter(dims.hidden_size, summed="sequence")
        if not dims.tied_embeddings or apart:
            yield Parameter(head, "alone" if apart else "dense")


def _layer(job: Job, blueprint: Blueprint, has_experts: bool) -> Iterator[Parameter]:
    fields, dims = family_fields(blueprint), blueprint.dims
    yield Parameter(dims.hidden_size, summed="sequence")
    yield from (_latent if fields.get("multi_latent_attention") else _attention)(job, blueprint, fields)
    yield Parameter(dims.hidden_size, summed="sequence")
    tensor = job.parallel.tensor
    if not has_experts:
        yield from _ffn(dims.hidden_size, (dims.dense_width or dims.expert_width) // tensor, "dense", fields["add_bias_linear"])
        return
    yield Parameter(dims.experts * dims.hidden_size, summed="sequence")
    if fields["add_bias_linear"]:
        yield Parameter(dims.experts, summed="sequence")
    width = dims.expert_width // job.expert_tensor
    # with one rank a part Megatron-Core takes experts for ordinary parameters
    kind = "expert" if job.parallel.expert > 1 else "dense"
    for _ in range(dims.experts // job.parallel.expert):
        yield from _ffn(dims.hidden_size, width, kind, fields["add_bias_linear"])
    if dims.shared_width:
        if fields.get("moe_shared_expert_gate"):
            yield Parameter(dims.hidden_size, summed="sequence")
        yield from _ffn(dims.hidden_size, dims.shared_width // tensor, "dense", False)


def _attention(job: Job, blueprint: Blueprint, fields: Mapping[str, Any]) -> Iterator[Parameter]:
    dims, tensor = blueprint.dims, job.parallel.tensor
    queries, keys = dims.heads * dims.head_dim // tensor, dims.kv_heads * dims.head_dim // tensor
    if fields.get("softmax_type") == "learnable":
        yield Parameter(dims.heads // tensor)
    yield Parameter(queries * dims.hidden_size, matrix=True)
    if fields["add_bias_linear"]:
        yield Parameter(dims.hidden_size, summed="sequence")
    yield Parameter((queries + 2 * keys) * dims.hidden_size, matrix=True)
    if fields["add_bias_linear"] or fields.get("add_qkv_bias"):
        yield Parameter(queries + 2 * keys)
    if fields.get("qk_norm_over_heads"):
        yield from (Parameter(queries), Parameter(keys))
    elif fields.get("qk_layernorm"):
        yield from (Parameter(dims.head_dim, summed="always"), Parameter(dims.head_dim, summed="always"))


def _latent(job: Job, blueprint: Blueprint, fields: Mapping[str, Any]) -> Iterator[Parameter]:
    """Multi-head latent attention; the down projections and latent norms are on every rank whole."""
    dims, heads = blueprint.dims, blueprint.dims.heads // job.parallel.tensor
    q_rank, kv_rank = fields["q_lora_rank"], fields["kv_lora_rank"]
    yield Parameter(heads * fields["v_head_dim"] * dims.hidden_size, matrix=True)
    if q_rank is None:
        yield Parameter(heads * dims.head_dim * dims.hidden_size, matrix=True)
    else:
        yield Parameter(q_rank * dims.hidden_size, summed="sequence", matrix=True)
        yield Parameter(heads * dims.head_dim * q_rank, matrix=True)
    yield Parameter((kv_rank + fields["qk_pos_emb_head_dim"]) * dims.hidden_size, summed="sequence", matrix=True)
    yield Parameter(heads * (fields["qk_head_dim"] + fields["v_head_dim"]) * kv_rank, matrix=True)
    if q_rank is not None:
        yield Parameter(q_rank, summed="sequence")
    yield Parameter(kv_rank, summed="sequence")


def _ffn(hidden: int, width: int, kind: Literal["dense", "expert"], bias: bool) -> Iterator[Parameter]:
    yield Parameter(2 * width * hidden, kind, matrix=True)
    if bias:
        yield Parameter(2 * width, kind)
    yield Parameter(width * hidden, kind, matrix=True)
    if bias:
        yield Parameter(hidden, kind, "sequence")
