"""Bytes that autograd keeps for the backward pass, and the most of them at once under a pipeline schedule.

After Korthikanti et al. 2022 (arXiv:2205.05198), section 4, with what differs here: no dropout (no masks), flash attention (no [S, S]
scores), SwiGLU (three matrices), grouped queries, RMSNorm, QK norms. Flash attention is their "selective recomputation".
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe2dense.operations.plan.job import Job
from megatron_moe2dense.trainer.model import ModelSpec, family_fields

_FLOAT, _INDEX = 4, 8


@dataclass(frozen=True)
class LayerBytes:
    """Of one micro-batch in one layer. entry: the layer's input. attention: with its norm, without the entry.
    boundary: what selective recomputation keeps of the FFN block. ffn: the rest of it, its norm included where that is fused."""

    entry: float
    attention: float
    boundary: float
    ffn: float

    @property
    def whole(self) -> float:
        """Without recomputation."""
        return self.entry + self.attention + self.boundary + self.ffn


def layer_bytes(job: Job, spec: ModelSpec, has_experts: bool) -> LayerBytes:
    """Of one decoder layer, T = `job.tokens` of which `job.outside` between the tensor-parallel parts, e bytes a value.

    With kernels: input and output of each norm, 2 x 2 T h e; attention and FFN below. The plain modules norm in float32 and keep input,
    normed input and output; in float32 the input is the residual stream itself.
    """
    hidden = job.outside * spec.dims.hidden_size
    entry = hidden * job.element
    ffn = _moe_bytes(job, spec) if has_experts else _ffn_bytes(job, (spec.dims.dense_width or spec.dims.expert_width))
    attention = (_latent_bytes if family_fields(spec).get("multi_latent_attention") else _attention_bytes)(job, spec)
    if job.kernels:
        norm = entry + _FLOAT * job.outside
        return LayerBytes(entry, attention + norm, entry, ffn + norm)
    copy = 0 if job.element == _FLOAT else _FLOAT * hidden - entry  # kept in place of the residual stream
    norm = copy + _FLOAT * (hidden + job.outside) + entry
    return LayerBytes(entry, attention + norm, entry + norm, ffn)


def _attention_bytes(job: Job, spec: ModelSpec) -> float:
    """Grouped-query attention: QKV, queries and keys after norm and rotation, output, and one float32 a head (log-sum-exp).

    T (2 (q + 2 k) + [q norm] q + (q + k) + q) e / t: values are a view of QKV, queries before their norm are a copy unless the rank has
    one group alone. Ranks that share a KV head keep the QKV of all, gathered. The plain modules also keep the normed queries and keys in
    float32, cosines and sines; under context parallelism keys and values of the whole sequence.
    """
    dims, tensor, e = spec.dims, job.parallel.tensor, job.element
    fields = family_fields(spec)
    heads, kv_heads = dims.heads // tensor, max(1, dims.kv_heads // tensor)
    q, k = heads * dims.head_dim, kv_heads * dims.head_dim
    projected = q + 2 * k if dims.kv_heads >= tensor else (dims.heads + 2 * dims.kv_heads) * dims.head_dim
    kept = projected * e + (q + k) * e + q * e + _FLOAT * heads
    norm = bool(fields.get("qk_layernorm") or fields.get("qk_norm_over_heads"))
    if norm and job.kernels:
        kept += (q if kv_heads > 1 else 0) * e + _FLOAT * (heads + kv_heads)
    if not job.kernels:
        kept += 4 * dims.head_dim * e / job.batch.micro  # cosines and sines, twice, whatever the batch
        if norm:
            inputs = (_FLOAT * (q + k)) if e != _FLOAT else (_FLOAT * q if kv_heads > 1 else 0)
            kept += inputs + _FLOAT * (q + k) + _FLOAT * (heads + kv_heads)
        if job.parallel.context > 1:
            kept += 2 * k * e * job.parallel.context - k * e
    return job.tokens * kept


def _latent_bytes(job: Job, spec: ModelSpec) -> float:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): latents and their norm, up projections, queries and keys put together with
    their rotated part, values, output, log-sum-exp."""
    dims, fields, tensor, e = spec.dims, family_fields(spec), job.parallel.tensor, job.element
    heads, kv_rank, q_rank = dims.heads // tensor, fields["kv_lora_rank"], fields["q_lora_rank"] or 0
    q, v = heads * dims.head_dim, heads * fields["v_head_dim"]
    kept = (2 * kv_rank + fields["qk_pos_emb_head_dim"] + 2 * q_rank) * e
    kept += (heads * (fields["qk_head_dim"] + fields["v_head_dim"]) + 3 * q + 2 * v) * e + _FLOAT * heads
    if not job.kernels:
        kept += _FLOAT * (kv_rank + q_rank) + 4 * fields["qk_pos_emb_head_dim"] * e / job.batch.micro
        kept += (heads * fields["qk_pos_emb_head_dim"] * 2) * e
    return job.tokens * kept


def _ffn_bytes(job: Job, width: int) -> float:
    """SwiGLU: gate and up, and their product: 3 T f e / t. The plain modules also keep act(gate) and a copy of up."""
    return job.tokens * (3 if job.kernels else 5) * width // job.parallel.tensor * job.element


def _moe_bytes(job: Job, spec: ModelSpec) -> float:
    """Router (float32), routed rows R = tokens x active, balanced: their input R h e, gate and up, product, weights, indices."""
    dims = spec.dims
    rows = job.outside * dims.active
    router = job.outside * dims.experts * (_FLOAT + 1) + rows * (2 * _INDEX + 2 * _FLOAT)
    width = dims.expert_width // job.expert_tensor
    routed = rows * job.expert_tensor * (dims.hidden_size + (3 if job.kernels else 6) * width) * job.element
    return router + routed + (_ffn_bytes(job, dims.shared_width) if dims.shared_width else 0)


def in_flight(job: Job, stage: int) -> list[int]:
    """Micro-batches whose activations a stage holds at most, by chunk.

    1F1B: P - p of them (Narayanan et al. 2021, arXiv:2104.04473, section 2.2). Interleaved: 2 (P - p - 1) + (V - 1) P + 1 chunk passes,
    which go through the chunks in rounds of P (Megatron-Core's schedule).
    """
    stages, chunks, batches = job.parallel.pipeline, job.parallel.virtual_pipeline, job.micro_batches
    if chunks == 1:
        return [min(batches, stages - stage)]
    passes = min(2 * (stages - stage - 1) + (chunks - 1) * stages + 1, batches * chunks)
    held = [0] * chunks
    for number in range(passes):
        held[number // stages % chunks] += 1
    return held


def student_bytes(job: Job, stage: int) -> float:
    """The most that the student's activations take on this stage, without the loss's own workspace.

    Full recomputation keeps each layer's input (and the rotary angles), selective what stands before the FFN block; both hold one layer's
    or one block's rest while it is computed again.
    """
    spec, recompute = job.student, job.parallel.recompute
    held, extra = 0.0, 0.0
    angles = _FLOAT * job.length * spec.dims.head_dim if recompute == "full" else 0
    for chunk, (count, kinds) in enumerate(zip(in_flight(job, stage), job.kinds("student", stage), strict=True)):
        for has_experts, layers in kinds.items():
            one = layer_bytes(job, spec, has_experts)
            kept = {"none": one.whole, "selective": one.whole - one.ffn, "full": one.entry}[recompute]
            held, extra = held + count * layers * kept, max(extra, one.whole - kept)
        held += angles if kinds else 0
        if stage == 0 and chunk == 0:
            held += count * job.tokens * _INDEX
    return held + max(extra, _head_bytes(job) if job.is_last(stage) else 0.0)


def _head_bytes(job: Job) -> float:
    """The final norm and the mask, of one micro-batch: its backward pass comes at once."""
    hidden = job.outside * job.student.dims.hidden_size
    kept = 2 * hidden * job.element if job.kernels else 2 * _FLOAT * hidden
    return kept + _FLOAT * (job.outside + job.tokens) + _FLOAT


def teacher_bytes(job: Job) -> float:
    """What the teacher's forward pass holds at once: as much as the layer that would keep most (an upper bound, it keeps nothing)."""
    assert job.teacher is not None
    kinds = {len(job.teacher.moe_layers) > 0, len(job.teacher.moe_layers) == job.teacher.dims.layers}
    return max(layer_bytes(job, job.teacher, kind).whole for kind in kinds)
