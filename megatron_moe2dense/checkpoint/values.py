"""A checkpoint's tensors as numbers, by the name and shape of what they encode: MXFP4 blocks and scales under one name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_moe2dense.checkpoint import mxfp4
from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.checkpoint.reader import TORCH_DTYPES, CheckpointReader
from megatron_moe2dense.common.errors import UserError

_BLOCKS, _SCALES = "_blocks", "_scales"


class Values:
    """Names and shapes of the numbers of a checkpoint.

    Attributes:
        shapes: of each tensor, decoded; encoded: those that are, by name, with the tensors that hold them.
    """

    def __init__(self, index: CheckpointIndex):
        """UserError for blocks or scales that stand alone, or that are no MXFP4."""
        self.index = index
        names = index.tensors
        _require_both(index)
        self.encoded = {
            name.removesuffix(_BLOCKS): (name, name.removesuffix(_BLOCKS) + _SCALES)
            for name in names
            if name.endswith(_BLOCKS) and name.removesuffix(_BLOCKS) + _SCALES in names
        }
        parts = {part for pair in self.encoded.values() for part in pair}
        self.shapes = {name: info.shape for name, info in names.items() if name not in parts}
        for name, (blocks, scales) in self.encoded.items():
            mxfp4.require_pair(names[blocks], names[scales])
            if name in names:
                raise UserError(f"{index.directory}: {name} and {blocks}", "every tensor once", "save the checkpoint without one of them")
            *count, rows, groups, packed = names[blocks].shape
            self.shapes[name] = (*count, groups * packed * 2, rows)  # stored [outputs, inputs], the class holds [inputs, outputs]

    def stored(self, name: str) -> tuple[str, ...]:
        """The tensors in the files that hold it."""
        return self.encoded.get(name, (name,))

    def dtype(self, name: str) -> torch.dtype:
        """In which it is read."""
        return torch.bfloat16 if name in self.encoded else TORCH_DTYPES[self.index.tensors[name].dtype]

    def reader(self, reader: CheckpointReader, finite: bool = True) -> Callable[[str, slice | None], torch.Tensor]:
        """Reads a tensor, or rows of its first axis. finite: a NaN or infinite value is a UserError."""

        def raw(name: str, rows: slice | None) -> torch.Tensor:
            if rows is None:
                return reader.finite(name) if finite else reader.tensor(name)
            found = reader.rows(name, 0, rows.start, rows.stop)
            if finite and found.is_floating_point() and not torch.isfinite(found).all():
                raise UserError(
                    f"{self.index.tensors[name].file}: {name} has NaN or infinite values in entry {rows.start}",
                    "finite weights",
                    "download the checkpoint again",
                )
            return found

        def read(name: str, rows: slice | None) -> torch.Tensor:
            if name not in self.encoded:
                return raw(name, rows)
            blocks, scales = (raw(part, rows) for part in self.encoded[name])
            return mxfp4.decode(blocks, scales, name).transpose(-1, -2)

        return read


def _require_both(index: CheckpointIndex) -> None:
    """UserError for blocks without scales, or scales without blocks, of a tensor that does not stand there itself."""
    names = index.tensors
    for name in (name for name, info in names.items() if info.dtype == mxfp4.STORED):
        for ending, other in ((_BLOCKS, _SCALES), (_SCALES, _BLOCKS)):
            stem = name.removesuffix(ending)
            if name.endswith(ending) and stem not in names and stem + other not in names:
                found = f"{index.directory}: {name} without {stem + other}"
                raise UserError(found, "blocks and scales of MXFP4", "download the checkpoint again")
