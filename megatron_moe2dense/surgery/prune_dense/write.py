"""Slices of every tensor of a dense checkpoint, written layer by layer in pieces of a few MB; a killed run goes on at the first layer
that is not on disk. Values are copied, or decoded, never computed with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.checkpoint.shards import ShardWriter, TensorSpec, shards_of
from megatron_moe2dense.checkpoint.values import Values
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import write_text
from megatron_moe2dense.common.progress import progress
from megatron_moe2dense.families.written import finish
from megatron_moe2dense.surgery.prune_dense.importance import Kept, KeptLayer
from megatron_moe2dense.surgery.prune_dense.source import AxesOf, DenseSource, Shape
from megatron_moe2dense.surgery.written import Written

KEPT_FILE = "kept.json"
_CHUNK, _QUEUE = 8 * 1024**2, 256 * 1024**2  # bytes: of one piece of a source tensor, of all pieces that wait to be written


@dataclass(frozen=True)
class Slice:
    """A tensor of the result: what it is called, and which rows (and columns) of which tensor of the source it is."""

    spec: TensorSpec
    source: str
    picked: tuple[np.ndarray | None, ...]


def steps_of(source: DenseSource, shape: Shape) -> list[list[tuple[AxesOf, TensorSpec]]]:
    """The tensors of a model of `shape`, in the order they are written: what belongs to no layer, then layer by layer.

    Each stands beside the tensor of the source's layer of the same number, whose axes it has.
    """

    def spec(tensor: AxesOf) -> tuple[AxesOf, TensorSpec]:
        name = tensor.name(tensor.layer)
        like = torch.empty(source.sizes(tensor, shape), dtype=source.account.values.dtype(name), device="meta")
        return tensor, TensorSpec.of(name, like)

    return [[spec(tensor) for tensor in source.present(layer)] for layer in (None, *range(shape.num_hidden_layers))]


def write_pruned(source: DenseSource, kept: Kept, shape: Shape, working: Path, shard_bytes: int) -> None:
    """Fill `working`: weights, config.json, kept.json, tokenizer files.

    Raises:
        UserError: a NaN or infinite weight that stays; a full disk; the stock class does not open what was written, which is gone then.
    """
    steps = steps_of(source, shape)
    shards = shards_of([spec for step in steps for _, spec in step], shard_bytes)
    chosen = json.dumps(kept.as_json())
    content = [source.fingerprint, hashlib.sha256(chosen.encode()).hexdigest()]
    written = Written.find(working, content, shards, len(steps))
    with CheckpointReader(source.index) as reader, ShardWriter(working, shards, _QUEUE) as writer:
        for number in progress(range(written.done, len(steps)), "write", "part", len(steps), done=written.done, each=True):
            for part in _slices(source, kept, steps[number]):
                _copy(source.account.values, reader, writer, part)
            writer.mark(written.reached(number + 1))
        writer.finish()
    layers = [layer.number for layer in kept.layers]
    write_text(working / KEPT_FILE, chosen + "\n")
    finish(working, source.smaller_config(shape, layers), source.index.directory)
    written.remove()


def _slices(source: DenseSource, kept: Kept, step: Sequence[tuple[AxesOf, TensorSpec]]) -> list[Slice]:
    slices = []
    for tensor, spec in step:
        layer = None if tensor.layer is None else kept.layers[tensor.layer]
        picked = tuple(_picked(axis, kept, layer, source.dims.head_dim) for axis in tensor.axes)
        slices.append(Slice(spec, tensor.name(None if layer is None else layer.number), picked))
    return slices


def _picked(axis: str, kept: Kept, layer: KeptLayer | None, head_dim: int) -> np.ndarray | None:
    """Which entries of an axis stay; None: all."""
    if axis == "D":
        return kept.channels_D
    if axis in "VH":
        return None
    assert layer is not None, "neurons and heads belong to a layer"
    if axis == "F":
        return layer.neurons
    heads = {"Q": layer.heads, "K": layer.kv_heads}[axis]
    return (heads[:, None] * head_dim + np.arange(head_dim)).ravel()


def _copy(values: Values, reader: CheckpointReader, writer: ShardWriter, part: Slice) -> None:
    """Read the tensor in pieces of whole rows (a quantised one at once), and queue what is picked of each."""
    info = reader.index.tensors[values.stored(part.source)[0]]
    count = values.shapes[part.source][0]
    rows, columns = (*part.picked, None)[:2]
    at_once, offset = count if part.source in values.encoded else max(1, _CHUNK * count // max(1, info.nbytes)), 0
    for start in range(0, count, at_once):
        piece = values.part(reader, part.source, 0, (start, min(start + at_once, count)))
        if rows is not None:
            piece = piece[torch.from_numpy(rows[(rows >= start) & (rows < start + at_once)] - start)]
        if columns is not None:
            piece = piece[:, torch.from_numpy(columns)]
        if not torch.isfinite(piece).all():
            found = f"{info.file}: {part.source} has NaN or infinite values"
            raise UserError(found, "finite weights", "download the checkpoint again")
        data = piece.contiguous().view(-1).view(torch.uint8).numpy()
        writer.write_bytes(part.spec.name, offset, data)
        offset += data.nbytes
    assert offset == part.spec.nbytes, f"{part.spec.name}: {offset} of {part.spec.nbytes} bytes"
