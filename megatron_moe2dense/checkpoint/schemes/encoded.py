"""What every scheme of quantised weights is made of: codes, scales that a block of them shares, and bits packed into words."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from megatron_moe2dense.checkpoint.index import CheckpointIndex, TensorInfo
from megatron_moe2dense.common.errors import UserError

Shape = tuple[int, ...]
# (tensor name, None for the whole tensor or the rows of its first axis that are wanted) -> values as stored
ReadPart = Callable[[str, slice | None], torch.Tensor]
_EXPONENTS = ("U8", "F8_E8M0")
_BIAS, _NAN = 127, 255
_PIECE = 2**18  # codes that are widened at once: what stands between stays in the cache
_E4M3_NAN = 0x7F  # the one code without its sign; there is no infinity


@dataclass(frozen=True)
class Encoded:
    """Numbers that several tensors of the files make together.

    scheme: its name. parts: these tensors, the codes first, then the scales; last those beside them that weights do not need (scales of
    activations). shape: of the numbers. decode: reads parts and gives float32 numbers, all of them or these rows of the first axis.
    scales: where the codes are E4M3 and these times them are the numbers, so that both can be kept as they are.
    """

    scheme: str
    parts: tuple[str, ...]
    shape: Shape
    decode: Callable[[ReadPart, slice | None], torch.Tensor]
    scales: Scales | None = None


def is_exponents(info: TensorInfo) -> bool:
    """Whether scales are powers of two, stored as eight-bit exponents (E8M0)."""
    return info.dtype in _EXPONENTS


def require_numbers(exponents: torch.Tensor, where: str) -> None:
    """UserError when an exponent is 255, which stands for NaN. where: the tensor, for the message."""
    count = int((exponents == _NAN).sum())
    if count:
        raise UserError(f"{where}: {count} MXFP4 exponents of 255 (NaN)", "finite weights", "download the checkpoint again")


def block_of(count: int, scales: int, told: int | None) -> int | None:
    """How many rows (or columns) share a scale; None where the numbers do not fit.

    Args:
        count: rows. scales: along them. told: by config.json; the last block may be shorter then. The grid alone does not tell: 192 rows
            with two scales are blocks of 128 and 64, or of 96 twice.
    """
    if told and -(-count // told) == scales:
        return told
    return count // scales if scales and count % scales == 0 else None


@dataclass(frozen=True)
class Scales:
    """Scales of blocks of a tensor's numbers.

    info: where they are stored. shape: of the numbers. grid: theirs, with as many axes. block: rows and columns that share one.
    """

    info: TensorInfo
    shape: Shape
    grid: Shape
    block: tuple[int, int]

    def read(self, read: ReadPart, rows: slice | None) -> torch.Tensor:
        """float32, of these rows of the numbers' first axis, in a shape that broadcasts to them."""
        return self.spread(self.stored(read, rows), rows)

    def times(self, numbers: torch.Tensor, read: ReadPart, rows: slice | None) -> torch.Tensor:
        """float32 numbers, all or these rows, multiplied in place: a scale a number would be another matrix of them."""
        found, height = self.stored(read, rows), self.block[0]
        if found.shape[-2] == 1 or height == 1:
            return numbers.mul_(self.spread(found, rows))
        wide = self._along(found, -1)
        start = 0 if rows is None or numbers.ndim > 2 else rows.indices(self.shape[0])[0]
        stop = start + numbers.shape[-2]
        for block in range(start // height, -(-stop // height)):
            low, high = max(block * height, start) - start, min((block + 1) * height, stop) - start
            numbers[..., low:high, :].mul_(wide[..., block : block + 1, :])
        return numbers

    def stored(self, read: ReadPart, rows: slice | None) -> torch.Tensor:
        """float32, one a block; no more of them than the rows need where each row, or expert, has its own."""
        found = read(self.info.name, rows if self._by_rows else None)
        if is_exponents(self.info):
            exponents = found.view(torch.uint8)
            require_numbers(exponents, self.info.name)
            found = torch.ldexp(torch.ones(()), exponents.int() - _BIAS)
        return found.float().reshape(-1, *self.grid[1:])

    def spread(self, found: torch.Tensor, rows: slice | None) -> torch.Tensor:
        """One a block to one a number, where they differ along an axis."""
        found = self._along(self._along(found, -2), -1)
        return found if rows is None or self._by_rows or found.shape[0] == 1 else found[rows]

    def _along(self, found: torch.Tensor, axis: int) -> torch.Tensor:
        """One a number along an axis."""
        size = self.block[axis]
        return found.repeat_interleave(size, axis).narrow(axis, 0, self.shape[axis]) if found.shape[axis] > 1 and size > 1 else found

    @property
    def _by_rows(self) -> bool:
        return self.grid[0] == self.shape[0] and self.info.shape[:1] == self.shape[:1]


def widened(codes: torch.Tensor) -> torch.Tensor:
    """Eight-bit numbers as float32. torch takes 0.2 billion FP8 codes a second on a CPU core; float16 is a shift away, and fast."""
    if codes.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        return codes.float()
    octets, e4m3 = codes.contiguous().view(torch.int8).view(-1).numpy(), codes.dtype == torch.float8_e4m3fn
    if e4m3 and octets.size and (int(octets.max()) == _E4M3_NAN or int(octets.view(np.uint8).max()) == 0x80 | _E4M3_NAN):
        return codes.float()
    found = torch.empty(codes.shape, dtype=torch.float32)
    flat, halves, signs = found.view(-1), *np.empty((2, _PIECE), np.int16)
    for start in range(0, octets.size, _PIECE):
        piece = octets[start : start + _PIECE]
        wide, sign, out = halves[: piece.size], signs[: piece.size], flat[start : start + piece.size]
        np.copyto(wide, piece)
        if e4m3:  # sign in its place, the rest at the upper end of the mantissa: a bias of 15 in place of 7, so 2^8 too small
            np.bitwise_and(wide, np.int16(-0x8000), out=sign)
            np.bitwise_and(wide, np.int16(0x7F), out=wide)
            np.left_shift(wide, np.int16(7), out=wide)
            np.bitwise_or(wide, sign, out=wide)
            out.copy_(torch.from_numpy(wide.view(np.float16))).mul_(256)
        else:  # the upper half
            np.left_shift(wide, np.int16(8), out=wide)
            out.copy_(torch.from_numpy(wide.view(np.float16)))
    return found


def beside(index: CheckpointIndex, name: str, ends: tuple[str, ...]) -> tuple[str, ...]:
    """The tensors called `name` and one of these ends."""
    return tuple(name + end for end in ends if name + end in index.tensors)


def unpacked(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 words along the last axis to their first `count` unsigned numbers of `bits` bits, int32. Number i begins at bit i * bits and
    may reach into the next word."""
    if 8 % bits == 0:
        octets = words.contiguous().view(torch.uint8)
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return ((octets[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)[..., :count].int()
    position = torch.arange(count) * bits
    word, offset = position // 32, position % 32
    wide = words.long() & 0xFFFFFFFF
    following = torch.cat([wide[..., 1:], torch.zeros_like(wide[..., :1])], dim=-1)
    pair = wide[..., word] | (following[..., word] << 32)
    return ((pair >> offset) & ((1 << bits) - 1)).int()


def words_for(count: int, bits: int) -> int:
    """Words of 32 bits that hold so many numbers."""
    return math.ceil(count * bits / 32)
