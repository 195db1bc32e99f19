"""Gated FFNs between their layout on disk (families/layout.py: stacked, packed, transposed, MXFP4) and gate, up and down."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from megatron_moe2dense.checkpoint import mxfp4
from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families import FfnTensors
from megatron_moe2dense.surgery.types import DenseFfn

# (tensor name, None for the whole tensor or a number for that entry of its first axis) -> the values as stored
ReadTensor = Callable[[str, int | None], torch.Tensor]


def stored_tensors(reader: CheckpointReader) -> ReadTensor:
    """Reads from a checkpoint whose values were looked at before."""
    return lambda name, entry: reader.tensor(name) if entry is None else reader.rows(name, 0, entry, entry + 1)[0]


def finite_tensors(reader: CheckpointReader) -> ReadTensor:
    """Reads from a checkpoint; a NaN or infinite value is a UserError."""

    def read(name: str, entry: int | None) -> torch.Tensor:
        if entry is None:
            return reader.finite(name)
        tensor = reader.rows(name, 0, entry, entry + 1)[0]
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{reader.index.tensors[name].file}: {name} has NaN or infinite values in entry {entry}",
                "finite weights",
                "download the checkpoint again, or leave this expert out",
            )
        return tensor

    return read


def read_ffn(read: ReadTensor, layout: FfnTensors, layer: int, expert: int = 0) -> DenseFfn:
    """One FFN, on the CPU, in the dtype it is stored in (MXFP4: bfloat16)."""
    entry = expert if layout.stacked else None

    def name(template: str) -> str:
        return template.format(layer=layer, expert=expert)

    def matrix(template: str) -> torch.Tensor:
        if layout.mxfp4:
            blocks, scales = (read(f"{name(template)}_{part}", entry) for part in ("blocks", "scales"))
            tensor = mxfp4.decode(blocks, scales, name(template))
        else:
            tensor = read(name(template), entry)
        return tensor.T if layout.transposed else tensor

    matrices = [matrix(template) for template in layout.gate_up]
    gate, up = matrices if len(matrices) == 2 else _halves(matrices[0], layout.interleaved)
    gate_bias, up_bias, down_bias = None, None, None
    if layout.gate_up_bias is not None:
        gate_bias, up_bias = _halves(read(name(layout.gate_up_bias), entry), layout.interleaved)
    if layout.down_bias is not None:
        down_bias = read(name(layout.down_bias), entry)
    return DenseFfn(gate, up, matrix(layout.down), gate_bias, up_bias, down_bias)


def write_ffn(layout: FfnTensors, layer: int, ffn: DenseFfn) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that hold `ffn` as expert 0 of the layer in this layout, by name. MXFP4 is never written."""
    assert not layout.mxfp4, "dense results are written in a floating-point type"

    def placed(template: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        stored = tensor.T if layout.transposed and tensor.ndim == 2 else tensor
        return template.format(layer=layer, expert=0), (stored[None] if layout.stacked else stored).contiguous()

    parts = (ffn.gate_FD, ffn.up_FD)
    matrices = parts if len(layout.gate_up) == 2 else (_joined(*parts, layout.interleaved),)
    yield from (placed(template, tensor) for template, tensor in zip(layout.gate_up, matrices, strict=True))
    yield placed(layout.down, ffn.down_DF)
    if layout.gate_up_bias is not None and layout.down_bias is not None:
        assert ffn.gate_bias_F is not None, "a family with biases is made from experts with biases"
        assert ffn.up_bias_F is not None, "a family with biases is made from experts with biases"
        assert ffn.down_bias_D is not None, "a family with biases is made from experts with biases"
        yield placed(layout.gate_up_bias, _joined(ffn.gate_bias_F, ffn.up_bias_F, layout.interleaved))
        yield placed(layout.down_bias, ffn.down_bias_D)


def _halves(rows: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up out of one tensor with the rows of both."""
    gate, up = (rows[0::2], rows[1::2]) if interleaved else rows.chunk(2)
    return gate, up


def _joined(gate: torch.Tensor, up: torch.Tensor, interleaved: bool) -> torch.Tensor:
    return torch.stack((gate, up), dim=1).flatten(0, 1) if interleaved else torch.cat((gate, up))
