"""Tensors of one module written as a checkpoint, and the float32 numbers that the reader makes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.checkpoint.values import Values

MODULE = "model.layers.0.mlp.up_proj"


def values(directory: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None) -> Values:
    """Of a checkpoint that holds these tensors of MODULE, by their names in it. config: quantization_config."""
    directory.mkdir(exist_ok=True)
    whole = {f"{MODULE}.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, directory / "model.safetensors", {"format": "pt"})
    content = {"model_type": "qwen3", **({} if config is None else {"quantization_config": dict(config)})}
    (directory / "config.json").write_text(json.dumps(content))
    return Values(CheckpointIndex.open(directory))


def decoded(found: Values, rows: slice | None = None, name: str = f"{MODULE}.weight") -> torch.Tensor:
    """float32, before they become bfloat16."""
    with CheckpointReader(found.index) as reader:

        def read(part: str, of_part: slice | None) -> torch.Tensor:
            return reader.tensor(part) if of_part is None else reader.rows(part, 0, of_part.start, of_part.stop)

        return found.encoded[name].decode(read, rows)


def assert_exactly(found: Values, wanted: torch.Tensor) -> None:
    """The same float32 bits, whole and row by row, and the same numbers in bfloat16."""
    assert wanted.dtype == torch.float32
    whole = decoded(found)
    assert whole.dtype == torch.float32
    assert torch.equal(whole.contiguous().view(torch.int32), wanted.contiguous().view(torch.int32))
    for rows in (slice(0, 1), slice(3, 20), slice(len(wanted) - 1, len(wanted))):
        assert torch.equal(decoded(found, rows), wanted[rows])
    with CheckpointReader(found.index) as reader:
        assert torch.equal(found.reader(reader)(f"{MODULE}.weight", None), wanted.to(torch.bfloat16))
    assert found.parameters(found.stored(f"{MODULE}.weight")[0]) == wanted.numel() == found.total
