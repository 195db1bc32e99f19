"""What a Hugging Face checkpoint directory holds, read from headers alone: config, tensor names, shapes, places."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_moe2dense.common import hub
from megatron_moe2dense.common.errors import UserError, did_you_mean
from megatron_moe2dense.common.outputs import read_json

DTYPE_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
DTYPE_BYTES |= {"BOOL": 1, "F8_E8M0": 1}
_SAMPLES, _SAMPLE_BYTES = 64, 1024
_HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its file, dtype (safetensors code), shape, and place in the file in bytes."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class CheckpointIndex:
    """A checkpoint directory: `config` (config.json) and `tensors` by name."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo] = field(repr=False)

    @classmethod
    def open(cls, directory: str | Path) -> CheckpointIndex:
        """Read config.json and every safetensors header. directory: or the name of a model in the Hugging Face cache.

        Raises:
            UserError: missing or broken config, no weights, a truncated or damaged file, a shard that is missing.
        """
        directory = hub.located(directory)
        config = read_json(directory / "config.json", "a Hugging Face checkpoint directory with a config.json")
        tensors: dict[str, TensorInfo] = {}
        for file in _weight_files(directory):
            tensors.update(read_header(file))
        return cls(directory, config, tensors)

    @classmethod
    def open_headers(cls, source: str | Path) -> CheckpointIndex:
        """As `open`; of a model by name whose weights are not all in the cache, over the network, without them.

        Raises:
            UserError: as `open`; what can not be downloaded.
        """
        hub.download(source, "small")
        directory = hub.located(source)
        if hub.revision_of(directory):
            with suppress(UserError):
                return cls.open(directory)
            config = read_json(directory / "config.json", "a Hugging Face checkpoint directory with a config.json")
            found = {name: _tensor_info(name, directory / file, entry, 0) for file, name, entry in hub.headers(source)}
            return cls(directory, config, found)
        return cls.open(directory)

    @property
    def is_here(self) -> bool:
        """Whether the files are, or the headers alone were read."""
        return all(file.exists() for file in {info.file for info in self.tensors.values()})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def require(self, names: Iterable[str]) -> None:
        """UserError naming the first absent tensor, and how many are absent."""
        missing = [name for name in names if name not in self.tensors]
        if missing:
            raise UserError(
                f"{self.directory}: no tensor {missing[0]!r} ({len(missing)} missing); {did_you_mean(missing[0], self.tensors)}",
                "every tensor that config.json calls for",
                "download the checkpoint again, or check that config.json belongs to it",
            )

    def require_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """UserError when tensor `name` is absent or of another shape than config.json implies."""
        self.require([name])
        if self.tensors[name].shape != shape:
            raise UserError(
                f"{self.directory}: {name} is {list(self.tensors[name].shape)}",
                f"{list(shape)} by config.json",
                "check that config.json and the weights are of the same model",
            )

    def fingerprint(self) -> str:
        """A hash of config.json, all headers and 64 samples of 1 KiB of every file: cheap on 60 GB, tells weights apart."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted({info.file for info in self.tensors.values()}):
            size = file.stat().st_size
            with file.open("rb") as handle:
                (length,) = struct.unpack("<Q", handle.read(8))
                digest.update(handle.read(length))
                for i in range(_SAMPLES):
                    handle.seek(8 + length + (size - 8 - length) * i // _SAMPLES)
                    digest.update(handle.read(_SAMPLE_BYTES))
        return digest.hexdigest()


def _weight_files(directory: Path) -> list[Path]:
    """In the order in which stock transformers looks: one file, then an index (which an earlier, sharded save may have left beside it)."""
    single, index = directory / "model.safetensors", directory / hub.INDEX_FILE
    if single.exists():
        return [single]
    if index.exists():
        names = _shard_names(index)
        absent = sorted(name for name in names if not (directory / name).exists())
        if absent:
            raise UserError(
                f"{directory}: {len(absent)} of {len(names)} shards absent, first {absent[0]}", "all shards", hub.advice(directory)
            )
        return [directory / name for name in sorted(names)]
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    if shards:
        raise UserError(
            f"{directory}: {len(shards)} files such as {shards[0]}, and no model.safetensors.index.json",
            "the index that says which tensor is in which file",
            hub.advice(directory),
        )
    raise UserError(
        f"{directory} has no model.safetensors and no model.safetensors.index.json",
        "a checkpoint in safetensors format",
        f"{hub.advice(directory)}; convert .bin checkpoints with transformers' save_pretrained",
    )


def _shard_names(index: Path) -> set[str]:
    """The files of an index; UserError unless all lie beside it: an index from elsewhere must not make us read other files."""
    expected = "a safetensors index: the weight_map of tensor names to names of .safetensors files in the same folder"
    content = read_json(index, expected)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: no weight_map", expected, "download the checkpoint again")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: shard {name!r}", expected, "do not use this checkpoint unless you know why it says so")
    return set(names.values())


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file; UserError when the file is cut short or is no safetensors file."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        head = handle.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 0 < length <= min(size - 8, _HEADER_LIMIT):
            raise _damaged(file, f"{size} bytes, header of {length} bytes")
        try:
            header = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            infos = {name: _tensor_info(name, file, entry, 8 + length) for name, entry in header.items()}
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
            raise _damaged(file, "a header that is no JSON") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(file, f"a header that describes no tensors ({type(error).__name__} {error})") from None
    needed = max((info.start + info.nbytes for info in infos.values()), default=8 + length)
    if needed != size:
        raise _damaged(file, f"{size} bytes")
    return infos


def _tensor_info(name: str, file: Path, entry: dict[str, Any], data: int) -> TensorInfo:
    """One entry of a header; ValueError when type, shape and place do not fit. data: where the tensors begin in the file."""
    (begin, end), shape, dtype = entry["data_offsets"], tuple(entry["shape"]), entry["dtype"]
    fits = dtype not in DTYPE_BYTES or math.prod(shape) * DTYPE_BYTES[dtype] == end - begin
    if not 0 <= begin <= end or any(size < 0 for size in shape) or not fits:
        raise ValueError(f"{name}: {dtype} {list(shape)} at bytes {begin} to {end}")
    return TensorInfo(name, file, dtype, shape, data + begin, end - begin)


def _damaged(file: Path, found: str) -> UserError:
    expected = "a complete safetensors file, as long as its header says"
    return UserError(f"{file}: {found}", expected, "the file is truncated or damaged: download it again")
