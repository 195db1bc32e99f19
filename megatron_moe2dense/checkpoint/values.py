"""A checkpoint's tensors as numbers, by the name and shape of what they encode: quantised weights with their scales under one name."""

from __future__ import annotations

from functools import cached_property
from math import prod

import torch

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.checkpoint.reader import TORCH_DTYPES, CheckpointReader, are_finite
from megatron_moe2dense.checkpoint.schemes import encoded_in
from megatron_moe2dense.checkpoint.schemes.encoded import Encoded, ReadPart, Scales, is_exponents, require_numbers
from megatron_moe2dense.common.errors import UserError

# What quantised weights become; float16 beside them too (files of AWQ and GPTQ), so that a checkpoint has one type.
DECODED = torch.bfloat16


class Values:
    """Names and shapes of the numbers of a checkpoint.

    Attributes:
        shapes: of each tensor, decoded; encoded: those that are, by name, with the tensors that hold them.
    """

    def __init__(self, index: CheckpointIndex):
        """UserError for MXFP4 blocks or scales that stand alone or do not fit, and for a tensor that stands there twice."""
        self.index = index
        self.encoded: dict[str, Encoded] = encoded_in(index)
        self._of_part = {part: name for name, encoded in self.encoded.items() for part in encoded.parts}
        for name, encoded in self.encoded.items():
            if name in index.tensors and name not in encoded.parts:
                found = f"{index.directory}: {name} and {encoded.parts[0]}"
                raise UserError(found, "every tensor once", "save the checkpoint without one of them")
        self.shapes = {name: info.shape for name, info in index.tensors.items() if name not in self._of_part}
        self.shapes |= {name: encoded.shape for name, encoded in self.encoded.items()}

    def stored(self, name: str) -> tuple[str, ...]:
        """The tensors in the files that hold it; the first of them stands for it where each is counted once."""
        return self.encoded[name].parts if name in self.encoded else (name,)

    def held(self, stored: str) -> str | None:
        """What a tensor in the files holds: the name of the numbers; None for scales and whatever else stands beside them."""
        name = self._of_part.get(stored, stored)
        return name if self.stored(name)[0] == stored else None

    def parameters(self, stored: str) -> int:
        """Numbers that a tensor in the files holds: none in scales."""
        name = self.held(stored)
        return 0 if name is None else prod(self.shapes[name])

    @cached_property
    def total(self) -> int:
        """Parameters of the checkpoint."""
        return sum(prod(shape) for shape in self.shapes.values())

    def dtype(self, name: str) -> torch.dtype:
        """The type in which the numbers are read."""
        if name in self.encoded:
            return DECODED
        stored = TORCH_DTYPES[self.index.tensors[name].dtype]
        return DECODED if self.encoded and stored == torch.float16 else stored

    def is_stored(self, name: str) -> bool:
        """Whether the bytes in the files are those of the numbers, as `dtype` has them."""
        return name not in self.encoded and TORCH_DTYPES[self.index.tensors[name].dtype] == self.dtype(name)

    def reader(self, reader: CheckpointReader, finite: bool = True) -> ReadPart:
        """Reads a tensor, or rows of its first axis. finite: a NaN or infinite value is a UserError; in decoded numbers it always is."""
        raw = self._raw(reader, finite)

        def read(name: str, rows: slice | None) -> torch.Tensor:
            if name not in self.encoded:
                return raw(name, rows).to(self.dtype(name))
            encoded = self.encoded[name]
            found = encoded.decode(raw, rows).to(DECODED)
            if not are_finite(found):
                raise UserError(f"{name}: {encoded.scheme} values beyond {DECODED}", "weights of a trained model", "download it again")
            return found

        return read

    def scales(self, name: str) -> Scales | None:
        """Of a tensor of E4M3 codes that are kept with them; None for any other."""
        return self.encoded[name].scales if name in self.encoded else None

    def codes(self, reader: CheckpointReader) -> ReadPart:
        """Reads the E4M3 codes of a tensor that has `scales`, as bytes, or those of rows."""
        raw = self._raw(reader, finite=False)
        return lambda name, rows: raw(self.encoded[name].parts[0], rows).view(torch.uint8)

    def factors(self, reader: CheckpointReader) -> ReadPart:
        """Reads what each of those codes is multiplied by, float32."""
        raw = self._raw(reader, finite=False)

        def read(name: str, rows: slice | None) -> torch.Tensor:
            scales, (first, *rest) = self.scales(name), self.shapes[name]
            assert scales is not None, "the caller asked"
            count = first if rows is None else len(range(*rows.indices(first)))
            return scales.read(raw, rows).expand(count, *rest)

        return read

    def _raw(self, reader: CheckpointReader, finite: bool) -> ReadPart:
        """Reads what stands in the files."""

        def raw(name: str, rows: slice | None) -> torch.Tensor:
            if rows is None:
                return reader.finite(name) if finite else reader.tensor(name)
            found = reader.rows(name, 0, rows.start, rows.stop)
            if finite and not are_finite(found):
                raise UserError(
                    f"{self.index.tensors[name].file}: {name} has NaN or infinite values in entry {rows.start}",
                    "finite weights",
                    "download the checkpoint again",
                )
            return found

        return raw

    def part(self, reader: CheckpointReader, name: str, axis: int, share: tuple[int, int]) -> torch.Tensor:
        """Only `start, stop` of a share along an axis (0 or 1), read alone where the files allow it."""
        start, stop = share
        if name not in self.encoded:
            return reader.rows(name, axis, start, stop).to(self.dtype(name))
        return cut(self.reader(reader, finite=False), name, axis, share)

    def check(self, reader: CheckpointReader, stored: str) -> None:
        """Look at a tensor in the files without keeping it: UserError when a value is NaN or infinite."""
        if stored in self._of_part and self.held(stored) is None and is_exponents(self.index.tensors[stored]):
            require_numbers(reader.tensor(stored).view(torch.uint8), stored)
        else:
            reader.check(stored)


def cut(read: ReadPart, name: str, axis: int, share: tuple[int, int]) -> torch.Tensor:
    """Only `start, stop` of a share along an axis (0 or 1) of what a reader of whole tensors and rows reads."""
    start, stop = share
    return read(name, slice(start, stop)) if axis == 0 else read(name, None).narrow(axis, start, stop - start)
