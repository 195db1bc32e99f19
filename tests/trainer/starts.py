"""What a student begins with, on the ranks of a layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer import initialize, runtime, weights
from megatron_moe2dense.trainer import model as models
from megatron_moe2dense.trainer.config import DistillConfig, ParallelConfig
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.pipeline import PipelineLayout
from megatron_moe2dense.trainer.runtime import Runtime


def begun(directory: Path, how: str, seed: int = 0, dtype: str = "float32") -> dict[str, torch.Tensor]:
    """The Hugging Face tensors of the student that a run starts with."""
    with runtime.session("cpu") as device, process_groups.initialized(ParallelConfig(), seed) as groups:
        (chunk,), spec = start(directory, how, (groups, device), seed, dtype)
        return {name: tensor.clone() for name, tensor in weights.unload(chunk, spec)}


def start(
    directory: Path, how: str, place: tuple[Groups, Runtime], seed: int = 0, dtype: str = "float32"
) -> tuple[list[models.HeadlessGPT], models.ModelSpec]:
    """This rank's chunks of it."""
    groups, device = place
    settings: dict[str, Any] = {"student": str(directory), "teacher": None, "output": str(directory / "run"), "initialize": how}
    train: Any = {"steps": 1, "seed": seed}
    config = DistillConfig(**settings, data={"path": "tokens"}, train=train, dtype=dtype, parallel=groups.parallel)  # type: ignore[arg-type]
    spec = models.ModelSpec.open(directory, getattr(torch, dtype))
    chunks = models.build(spec, groups, device, PipelineLayout.of_student(config.parallel, spec.dims.layers))
    initialize.start(config, chunks, spec, groups)
    return chunks, spec
