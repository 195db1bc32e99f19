"""Stock transformers models from directories, whole: quantised weights go through this project's reader, one tensor at a time, so that a
model is the same for every command and needs no kernels and no other library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.checkpoint.values import Values
from megatron_moe2dense.common.outputs import read_json
from megatron_moe2dense.families.disk import ReadTensor
from megatron_moe2dense.families.stock import model_class


def load_pretrained(index: CheckpointIndex, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model and transformers' loading info.

    Args:
        options: of from_pretrained, and keys of the config.

    Raises:
        ValueError, OSError, RuntimeError: what from_pretrained raises. UserError: a NaN or infinite value in quantised weights.
    """
    of_config = {name: options.pop(name) for name in list(options) if name == "num_experts_per_tok"}
    config = AutoConfig.from_pretrained(index.directory, local_files_only=True, trust_remote_code=False, **of_config)
    with _source(index, config) as (cls, where):
        model, info = cls.from_pretrained(
            **where, config=config, local_files_only=True, trust_remote_code=False, output_loading_info=True, **options
        )
    return model, info


@contextmanager
def _source(index: CheckpointIndex, config: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The class, and what its from_pretrained reads: the directory itself where nothing in it is quantised."""
    values, cls = Values(index), model_class(config)
    if not values.encoded:
        yield cls, {"pretrained_model_name_or_path": index.directory}
        return
    if hasattr(cls, "_model_mapping"):  # auto classes take no tensors in the place of a directory
        cls = cls._model_mapping[type(config)]
    for each in (config, config.get_text_config()):
        if hasattr(each, "quantization_config"):
            del each.quantization_config
    generation = {}
    if (place := index.directory / "generation_config.json").exists():
        generation = {"generation_config": GenerationConfig.from_dict(read_json(place, "a generation config"))}
    with CheckpointReader(index) as reader:
        read = values.reader(reader, finite=False)
        tensors = {name: _Lazy(read, name) for name in values.shapes}
        yield cls, {"pretrained_model_name_or_path": None, "state_dict": tensors, **generation}


class _Lazy:
    """A tensor that is read when transformers takes it, as its own slices of safetensors files are."""

    def __init__(self, read: ReadTensor, name: str):
        self._read, self._name = read, name

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self._read(self._name, None)
