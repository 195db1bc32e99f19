"""Integers of 1 to 8 bits packed into words of 32: compressed-tensors (`weight_packed`), GPTQ and AWQ (`qweight`).

Each group of inputs has a scale, and where it is not symmetric a zero point, for every output: (code - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from megatron_moe2dense.checkpoint.index import CheckpointIndex, TensorInfo
from megatron_moe2dense.checkpoint.schemes.encoded import Encoded, ReadPart, beside, unpacked, words_for
from megatron_moe2dense.checkpoint.schemes.settings import Settings

# Where AWQ's eight numbers of four bits stand in a word: number i is the `_AWQ_ORDER[i]`th of four bits, from the low end.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
_BESIDE = ("_shape",)


def find(index: CheckpointIndex, settings: Settings) -> Iterator[tuple[str, Encoded]]:
    """Packed tensors, by the name of the numbers."""
    of_words = {"awq": _awq, "gptq": _gptq}.get(settings.method or "")
    for name, info in index.tensors.items():
        if info.dtype != "I32" or len(info.shape) != 2:
            continue
        weight, found = name, None
        if name.endswith(".weight_packed") and settings.method == "compressed-tensors":
            weight = name.removesuffix("_packed")
            found = _compressed(index, weight, info, settings.weights(weight.removesuffix(".weight")))
        elif name.endswith(".qweight") and of_words is not None:
            module = name.removesuffix("qweight")
            weight, found = f"{module}weight", of_words(index, module, info, settings.content)
        if found is not None:
            yield weight, found


def _rows(numbers: torch.Tensor, rows: slice | None) -> torch.Tensor:
    return numbers if rows is None else numbers[rows]


def _compressed(index: CheckpointIndex, weight: str, packed: TensorInfo, told: Any) -> Encoded | None:
    """compressed-tensors: rows of numbers with an offset of half their range, a scale a row or a group of columns."""
    scale, zero, columns = (index.tensors.get(f"{weight}_{end}") for end in ("scale", "zero_point", "g_idx"))
    bits, size = int(told.get("num_bits") or 0), int(told.get("group_size") or 0)
    if scale is None or len(scale.shape) != 2 or not 1 <= bits <= 8 or told.get("type", "int") != "int":
        return None
    if zero is None and told.get("symmetric") is False:
        return None
    rows, count = packed.shape[0], scale.shape[1]
    width = count * size if count > 1 and size > 0 else packed.shape[1] * 32 // bits
    if packed.shape[1] != words_for(width, bits) or width % count or scale.shape[0] not in (1, rows):
        return None
    parts = [packed.name, scale.name, *(each.name for each in (zero, columns) if each is not None), *beside(index, weight, _BESIDE)]
    half = 1 << (bits - 1)

    def decode(read: ReadPart, rows: slice | None) -> torch.Tensor:
        numbers = unpacked(read(packed.name, rows), bits, width) - half
        scales = read(scale.name, rows if scale.shape[0] > 1 else None).float()
        group = torch.arange(width) // (width // count)
        if columns is not None and int((stored := read(columns.name, None).long()).min()) >= 0:  # -1: columns are in order
            group = stored
        if zero is not None:
            zeros = read(zero.name, None)
            of_rows = unpacked(zeros.T, bits, packed.shape[0]).T - half if zero.dtype == "I32" else zeros.int()
            numbers = numbers - (_rows(of_rows, rows) if len(of_rows) > 1 else of_rows)[:, group]
        return numbers.float() * scales[:, group]

    return Encoded(f"INT{bits}", tuple(parts), (rows, width), decode)


def _gptq(index: CheckpointIndex, module: str, packed: TensorInfo, told: Any) -> Encoded | None:
    """GPTQ: columns of numbers; each input says which group it is of. The first format stores a zero point less 1, modulo its range
    (AutoGPTQ), the second as it is (GPTQModel)."""
    scales, zeros, groups = (index.tensors.get(module + end) for end in ("scales", "qzeros", "g_idx"))
    bits, form, size = told.get("bits"), told.get("checkpoint_format", "gptq"), told.get("group_size") or -1
    if scales is None or zeros is None or bits not in (2, 3, 4, 8) or form not in ("gptq", "gptq_v2") or told.get("dynamic"):
        return None
    outputs, inputs, less = packed.shape[1], packed.shape[0] * 32 // bits, 1 if form == "gptq" else 0
    size = inputs if size < 0 else size
    count = -(-inputs // size)
    if scales.shape != (count, outputs) or zeros.shape != (count, words_for(outputs, bits)):
        return None
    if groups is not None and groups.shape != (inputs,):
        return None

    def decode(read: ReadPart, rows: slice | None) -> torch.Tensor:
        numbers = unpacked(read(packed.name, None).T, bits, inputs).T
        group = read(groups.name, None).long() if groups is not None else torch.arange(inputs) // size
        zero = (unpacked(read(zeros.name, None), bits, outputs) + less) & ((1 << bits) - 1)
        return _rows(((numbers - zero[group]).float() * read(scales.name, None).float()[group]).T, rows)

    parts = (packed.name, scales.name, zeros.name, *(() if groups is None else (groups.name,)))
    return Encoded(f"GPTQ of {bits} bits", parts, (outputs, inputs), decode)


def _awq(index: CheckpointIndex, module: str, packed: TensorInfo, told: Any) -> Encoded | None:
    """AWQ: rows of numbers in an order of their own; of each group of inputs a scale and a zero point for every output."""
    scales, zeros = (index.tensors.get(module + end) for end in ("scales", "qzeros"))
    bits, version = told.get("bits", told.get("w_bit", 4)), str(told.get("version", "gemm")).lower()
    if scales is None or zeros is None or bits != 4 or version != "gemm" or len(scales.shape) != 2:
        return None
    inputs, outputs = packed.shape[0], packed.shape[1] * 8
    count = scales.shape[0]
    if scales.shape != (count, outputs) or zeros.shape != (count, packed.shape[1]) or inputs % count:
        return None

    def ordered(words: torch.Tensor) -> torch.Tensor:
        return unpacked(words, 4, outputs).unflatten(-1, (-1, 8))[..., list(_AWQ_ORDER)].flatten(-2)

    def decode(read: ReadPart, rows: slice | None) -> torch.Tensor:
        group = torch.arange(inputs) // (inputs // count)
        numbers = ordered(read(packed.name, None)) - ordered(read(zeros.name, None))[group]
        return _rows((numbers.float() * read(scales.name, None).float()[group]).T, rows)

    return Encoded("AWQ", (packed.name, scales.name, zeros.name), (outputs, inputs), decode)
