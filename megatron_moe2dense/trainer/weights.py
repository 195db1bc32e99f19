"""Hugging Face weights into this rank's part of a Megatron model, slice by slice, and back out of a whole one."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from pathlib import Path

import torch
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.mapping import Entry, WeightMapping, is_packed, join, pack, split, unpack
from megatron_moe2dense.trainer.model import HeadlessGPT, ModelSpec, padded_vocabulary

_ROWS = 8192  # of the vocabulary, that are compared at once


@torch.no_grad()
def load(chunks: Sequence[HeadlessGPT], spec: ModelSpec, groups: Groups, directory: Path) -> None:
    """Fill every parameter of the model's chunks from the checkpoint; each rank reads only its slices.

    Raises:
        UserError: a tensor is missing, of another shape, NaN or infinite.
    """
    index = CheckpointIndex.open(directory)
    with CheckpointReader(index) as reader:
        _require_one_table(reader, spec, directory)
        for parameter, entry, _ in weights_of_rank(chunks, spec, groups, index.tensors):
            index.require(entry.hf)
            parameter.copy_(_checked(_local(reader, entry, spec, groups), parameter, f"{directory}: {', '.join(entry.hf)}"))


def _require_one_table(reader: CheckpointReader, spec: ModelSpec, directory: Path) -> None:
    """UserError for tied embeddings beside a head of its own: stock transformers keeps both, this model has one."""
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if not spec.dims.tied_embeddings or head not in reader.index.tensors or embedding not in reader.index.tensors:
        return
    rows = reader.index.tensors[head].shape[0]
    pieces = ((start, min(start + _ROWS, rows)) for start in range(0, rows, _ROWS))
    if any(not reader.rows(head, 0, *piece).equal(reader.rows(embedding, 0, *piece)) for piece in pieces):
        raise UserError(
            f"{directory}: tie_word_embeddings is true, and {head} differs from {embedding}",
            "one table of embeddings, or a config.json that says there are two",
            'set "tie_word_embeddings": false in config.json, which is how stock transformers reads it',
        )


def weights_of_rank(
    chunks: Sequence[HeadlessGPT], spec: ModelSpec, groups: Groups, present: Container[str]
) -> Iterator[tuple[Tensor, Entry, bool]]:
    """Every parameter (and stored buffer) of this rank with its entry, and whether this rank counts it in sums over all ranks: those
    that hold copies do not, so that every value counts once.

    Args:
        present: the names of the checkpoint's tensors.
    """
    local_experts = spec.dims.experts // groups.parallel.expert
    for chunk in chunks:
        first_layer = get_transformer_layer_offset(chunk.config, chunk.vp_stage, groups.stage)
        mapping = WeightMapping(spec.family, spec.dims, first_layer, groups.expert_rank * local_experts, present)
        for name, parameter in _stored(chunk):
            entry = mapping.entry(name)
            yield parameter, entry, _counts(entry, groups) and not mapping.is_copy(name)


def _counts(entry: Entry, groups: Groups) -> bool:
    is_expert = "{expert}" in entry.rule.megatron
    replicas, slices = (
        (groups.collection.expt_dp, groups.collection.expt_tp) if is_expert else (groups.collection.dp_cp, groups.collection.tp)
    )
    return replicas.rank() == 0 and (entry.rule.split is not None or slices.rank() == 0)


def _checked(value: Tensor, parameter: Tensor, where: str) -> Tensor:
    if value.shape != parameter.shape:
        raise UserError(
            f"{where} give {list(value.shape)}",
            f"{list(parameter.shape)} by config.json",
            "check that config.json and the weights are of the same model",
        )
    if not torch.isfinite(value).all():
        raise UserError(f"{where}: NaN or infinite values", "finite weights", "get the weights again")
    return value


def _local(reader: CheckpointReader, entry: Entry, spec: ModelSpec, groups: Groups) -> Tensor:
    """This rank's slice of one Megatron parameter."""
    axis, kv_heads = entry.rule.split, spec.dims.kv_heads
    if is_packed(entry.rule):
        return _local_of_packed(reader, entry, groups)
    if axis is None:
        return join(entry.rule.kind, (reader.tensor(name) for name in entry.hf), kv_heads)
    parts, rank = _share(entry, groups)
    slices = []
    for name in entry.hf:
        size = reader.index.tensors[name].shape[axis]
        whole = padded_vocabulary(size) if entry.rule.kind == "vocab" else size
        step = whole // parts
        rows = reader.rows(name, axis, min(rank * step, size), min((rank + 1) * step, size))
        slices.append(_pad_rows(rows, step) if entry.rule.kind == "vocab" else rows)
    return join(entry.rule.kind, slices, kv_heads // parts)


def _share(entry: Entry, groups: Groups) -> tuple[int, int]:
    """In how many parts tensor parallelism splits this parameter, and which of them is this rank's."""
    is_expert = "{expert}" in entry.rule.megatron
    parts = groups.parallel.expert_tensor if is_expert else groups.parallel.tensor
    return parts, groups.tensor_rank if parts > 1 else 0


def _local_of_packed(reader: CheckpointReader, entry: Entry, groups: Groups) -> Tensor:
    """This rank's slice where it does not lie in one piece: the expert is read whole."""
    rule, expert = entry.rule, entry.expert
    stored = [reader.rows(name, 0, expert, expert + 1)[0] if rule.packing.stacked else reader.tensor(name) for name in entry.hf]
    whole = unpack(rule, stored, f"{reader.index.tensors[entry.hf[0]].file}: {entry.hf[0]}")
    parts, rank = _share(entry, groups)
    slices = whole if rule.split is None else [tensor.chunk(parts, rule.split)[rank] for tensor in whole]
    return join(rule.kind, slices, kv_heads=1)


def _stored(model: HeadlessGPT) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the buffers that are part of a checkpoint (a router's correction)."""
    yield from model.named_parameters()
    names = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in names)


def _pad_rows(rows: Tensor, count: int) -> Tensor:
    """Zero rows for the padded end of the vocabulary."""
    return torch.cat([rows, rows.new_zeros(count - rows.shape[0], *rows.shape[1:])])


def unload(model: HeadlessGPT, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors of a model built whole (tensor = pipeline = expert = 1), vocabulary padding removed.

    Tensors of all experts of a layer are gathered first; a router that has nothing to choose from is zero.
    """
    mapping = WeightMapping(spec.family, spec.dims)
    experts: dict[str, list[Tensor]] = {}
    for name, parameter in _stored(model):
        if mapping.is_copy(name):
            continue
        entry = mapping.entry(name)
        tensors = pack(entry.rule, split(entry.rule.kind, parameter.detach(), spec.dims))
        if not entry.rule.packing.stacked:
            yield from zip(entry.hf, tensors, strict=True)
            continue
        for hf, tensor in zip(entry.hf, tensors, strict=True):
            gathered = experts.setdefault(hf, [])
            assert len(gathered) == entry.expert, "experts come in the order of their numbers"
            gathered.append(tensor)
            if len(gathered) == max(1, spec.dims.experts):
                yield hf, torch.stack(experts.pop(hf))
    assert not experts, "every layer has all its experts"
    for hf, shape in spec.idle_router().items():
        yield hf, torch.zeros(shape, dtype=spec.dtype)
