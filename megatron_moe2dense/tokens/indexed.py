"""Megatron's indexed token files (`<prefix>.bin`, `<prefix>.idx`, format MMIDIDX version 1): open, write, cut into windows.

Byte-identical to megatron.core.datasets.indexed_dataset (a test holds it), but needs numpy alone, so that surgery and
evaluation run without Megatron-Core.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.common.outputs import disk_errors
from megatron_moe2dense.tokens.config import TokensConfig

_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
_HEADER = struct.Struct("<9sQBQQ")
_SAMPLES, _SAMPLE_BYTES = 64, 65536  # of a fingerprint
_PIECE = 1 << 24  # tokens that are searched for padding at once
_MOST = 0.5  # the share from which one token is taken for padding


@dataclass(frozen=True)
class TokenFile:
    """An opened pair of files. tokens: the whole stream, memory-mapped, 1-D. document_ends: end offset of each document."""

    prefix: str
    tokens: np.ndarray
    document_ends: np.ndarray

    @classmethod
    def open(cls, prefix: str) -> TokenFile:
        """Map the files of `prefix`; UserError when they are missing, damaged or do not fit together."""
        index, data = Path(prefix + ".idx"), Path(prefix + ".bin")
        for path in (index, data):
            if not path.exists():
                raise UserError(f"no file {path}", "a token file pair <prefix>.bin/.idx", "make it with `moe2dense data`")
        raw = index.read_bytes()
        if len(raw) < _HEADER.size or raw[:9] != _MAGIC:
            raise UserError(f"{index} is no Megatron index", "MMIDIDX version 1", "make it again with `moe2dense data`")
        _, version, code, sequences, documents = _HEADER.unpack_from(raw)
        if version != 1 or code not in _DTYPES or len(raw) < _HEADER.size + 12 * sequences + 8 * documents:
            raise UserError(f"{index}: version {version}, {len(raw)} bytes", "a complete MMIDIDX version 1", "make it again")
        lengths = np.frombuffer(raw, np.int32, sequences, _HEADER.size).astype(np.int64)
        borders = np.frombuffer(raw, np.int64, documents, _HEADER.size + 12 * sequences)
        if np.any(lengths < 0) or np.any(borders < 0) or np.any(borders > sequences):
            raise UserError(f"{index}: lengths or borders out of range", "a complete MMIDIDX version 1", "make it again")
        ends = np.concatenate([[0], np.cumsum(lengths)])[borders[1:]]
        dtype, total = np.dtype(_DTYPES[code]), int(lengths.sum())
        if data.stat().st_size != total * dtype.itemsize:
            raise UserError(f"{data}: {data.stat().st_size} bytes", f"{total * dtype.itemsize} by its .idx", "make the pair again")
        tokens = np.memmap(data, dtype, "r") if total else np.empty(0, dtype)
        return cls(prefix, tokens, ends)

    def fingerprint(self) -> str:
        """A hash of the index, and of the length and 64 samples of 64 KiB of the tokens: cheap on a terabyte, tells files apart."""
        index, data = Path(self.prefix + ".idx"), Path(self.prefix + ".bin")
        size = data.stat().st_size
        digest = hashlib.sha256(index.read_bytes() + size.to_bytes(8, "little"))
        with data.open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()


class TokenFileWriter:
    """Streams documents into `<prefix>.bin.tmp/.idx.tmp`; `publish` puts the complete pair in its place, `discard` removes it.

    The token type is the one Megatron chooses: uint16 below 65,500 vocabulary entries, else int32.
    """

    def __init__(self, prefix: str, vocab_size: int):
        self.prefix = prefix
        self.dtype, self._code = (np.dtype(np.uint16), 8) if vocab_size < 65_500 else (np.dtype(np.int32), 4)
        self._data, self._index = Path(prefix + ".bin.tmp"), Path(prefix + ".idx.tmp")
        self._lengths: list[int] = []
        with disk_errors(self._data):
            self._data.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._data.open("wb")

    @property
    def documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    @property
    def tokens(self) -> int:
        """Tokens added so far."""
        return sum(self._lengths)

    def add(self, document: np.ndarray) -> None:
        """Append one document, a 1-D integer array."""
        with disk_errors(Path(self.prefix + ".bin")):
            self._file.write(np.ascontiguousarray(document, self.dtype).tobytes())
        self._lengths.append(len(document))

    def publish(self) -> None:
        """Write the index and rename both files into place."""
        sizes = np.asarray(self._lengths, np.int32)
        starts = np.concatenate([[0], np.cumsum(sizes.astype(np.int64) * self.dtype.itemsize)])[:-1].astype(np.int64)
        with disk_errors(Path(self.prefix + ".idx")):
            self._file.close()
            with self._index.open("wb") as file:
                file.write(_HEADER.pack(_MAGIC, 1, self._code, len(sizes), len(sizes) + 1))
                file.write(sizes.tobytes() + starts.tobytes() + np.arange(len(sizes) + 1, dtype=np.int64).tobytes())
            self._data.replace(self.prefix + ".bin")
            self._index.replace(self.prefix + ".idx")

    def discard(self) -> None:
        """Remove the unfinished files."""
        with contextlib.suppress(OSError):  # closing flushes, which a full disk refuses again
            self._file.close()
        self._data.unlink(missing_ok=True)
        self._index.unlink(missing_ok=True)


def write_token_file(prefix: str, documents: Iterable[np.ndarray], vocab_size: int) -> tuple[int, int]:
    """Write documents (1-D integer arrays) as `<prefix>.bin/.idx`, streamed and atomic. Returns (documents, tokens)."""
    writer = TokenFileWriter(prefix, vocab_size)
    try:
        for document in documents:
            writer.add(document)
        writer.publish()
    except BaseException:
        writer.discard()
        raise
    return writer.documents, writer.tokens


class ReadsText(Protocol):
    """What a model can read."""

    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def max_positions(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Limits:
    """Of what a model can read. max_positions: 0 where nobody says."""

    vocab_size: int
    max_positions: int = 0


def windows(config: TokensConfig, model: ReadsText, stride: int | None = None) -> np.ndarray:
    """The windows of a token stream, int64 [sequences, sequence_length].

    Consecutive from the first token on, a new one every `stride` tokens (None: `sequence_length`, they don't overlap); a last,
    shorter one is dropped and said; `sequences` of them, drawn by `seed` and kept in stream order when there are more. No token
    is added, none is skipped but `pad_token`. Said too: windows longer than the model's positions, and one token that is most of them.

    Raises:
        UserError: fewer tokens than one window, or a token outside the model's vocabulary (another tokenizer).
    """
    stream, length = _without_padding(config), config.sequence_length
    step = stride or length
    if len(stream) < length:
        raise UserError(f"{config.path}: {len(stream)} tokens", f"at least sequence_length={length}", "use more text or shorter windows")
    say_long_windows(config.path, length, model.max_positions)
    count, rest = (len(stream) - length) // step + 1, (len(stream) - length) % step
    if rest:
        logger.info("%s: the last %d tokens fill no window of %d and are left out", config.path, rest, length)
    chosen = np.arange(count)
    if config.sequences is not None and count > config.sequences:
        chosen = np.sort(np.random.default_rng(config.seed).choice(count, config.sequences, replace=False))
    elif config.sequences is not None and count < config.sequences:
        logger.info("%s: %d windows of %d tokens, fewer than the %d asked for", config.path, count, length, config.sequences)
    result = np.lib.stride_tricks.sliding_window_view(stream, length)[::step][chosen].astype(np.int64)
    require_vocabulary(config.path, int(result.min()), int(result.max()), model.vocab_size)
    _say_padding(config.path, result)
    return result


def require_vocabulary(where: str, lowest: int, highest: int, vocab_size: int) -> None:
    """UserError when the lowest or the highest token of some text is no number of the vocabulary."""
    if lowest < 0 or highest >= vocab_size:
        raise UserError(
            f"{where}: token {lowest if lowest < 0 else highest}",
            f"tokens from 0 to below the model's vocabulary of {vocab_size}",
            "tokenise the text with the model's own tokenizer (`moe2dense data`)",
        )


@functools.cache  # once for each text, however often it is cut
def say_long_windows(where: str, length: int, max_positions: int) -> None:
    """Warn of what `long_windows` finds."""
    said = long_windows(length, max_positions)
    if said is not None:
        logger.warning("%s: %s", where, said)


def long_windows(length: int, max_positions: int) -> str | None:
    """What to say of windows longer than those the model was made for, None otherwise. max_positions: 0, nobody says."""
    too_long = 0 < max_positions < length
    return f"windows of {length} tokens, and max_position_embeddings of the model is {max_positions}" if too_long else None


def _without_padding(config: TokensConfig) -> np.ndarray:
    """The stream, memory-mapped; copied without the padding where there is said to be any."""
    stream = TokenFile.open(config.path).tokens
    if config.pad_token is None:
        return stream
    parts = (stream[start : start + _PIECE] for start in range(0, len(stream), _PIECE))
    kept = np.concatenate([stream[:0], *(part[part != config.pad_token] for part in parts)])
    if len(kept) == len(stream):
        raise UserError(
            f"{config.path}: no token {config.pad_token}", "the padding token of this text", "correct pad_token, or leave it out"
        )
    logger.info("%s: %d of %d tokens are padding and left out", config.path, len(stream) - len(kept), len(stream))
    return kept


def _say_padding(where: str, windows_NS: np.ndarray) -> None:
    counts = np.bincount(windows_NS.reshape(-1))
    most = int(counts.argmax())
    if counts[most] > _MOST * windows_NS.size:
        _warn_of_padding(where, most, f"{counts[most] / windows_NS.size:.0%}")


@functools.cache
def _warn_of_padding(where: str, token: int, share: str) -> None:
    logger.warning("%s: %s of the tokens are token %d; if that is padding, leave it out with pad_token=%d", where, share, token, token)
