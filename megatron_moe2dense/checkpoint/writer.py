"""Streaming writer of sharded safetensors checkpoints: tensors go in one by one, memory holds one shard at most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_moe2dense.common.outputs import disk_errors, write_json

DEFAULT_SHARD_BYTES = 4 * 1024**3


class CheckpointWriter:
    """Collects tensors into shards of at most `shard_bytes` and writes each when it is full.

    Write into the working directory of `common.outputs.output_directory`; `finish` names the shards
    (`model.safetensors`, or `model-00001-of-0000N.safetensors` with an index) and writes config.json.
    """

    def __init__(self, directory: Path, shard_bytes: int = DEFAULT_SHARD_BYTES):
        self._directory, self._shard_bytes = directory, shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Queue one tensor; it must not change until the shard is written."""
        nbytes = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + nbytes > self._shard_bytes:
            self._flush()
        assert name not in self._pending, f"{name} is written twice"
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += nbytes
        self._total_bytes += nbytes

    def _part(self, number: int) -> Path:
        return self._directory / f"shard-{number:05d}.partial"

    def _flush(self) -> None:
        path = self._part(len(self._shards) + 1)
        with disk_errors(path):
            save_file(self._pending, path, metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def finish(self, config: dict[str, Any]) -> None:
        """Write what is pending, give the shards their final names, write the index and config.json."""
        self._flush()
        count = len(self._shards)
        names = ["model.safetensors"] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        for number, name in enumerate(names, 1):
            _readable(self._part(number)).replace(self._directory / name)
        if count > 1:
            weight_map = {tensor: name for name, shard in zip(names, self._shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            write_json(self._directory / "model.safetensors.index.json", index)
        write_json(self._directory / "config.json", config)


def _readable(path: Path) -> Path:
    """safetensors 0.8 creates files only their owner can read; give them the mode any new file gets."""
    sibling = path.with_name(path.name + ".mode")
    sibling.touch()
    path.chmod(sibling.stat().st_mode)
    sibling.unlink()
    return path
