"""`moe2dense export`: a trainer checkpoint of any layout to the Hugging Face checkpoint of its student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe2dense.checkpoint.assets import copy_assets
from megatron_moe2dense.checkpoint.shards import ShardWriter, TensorSpec, shards_of
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.common.outputs import MANIFEST, output_directory, read_json, write_json
from megatron_moe2dense.families.account import require_opens
from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer import model as models
from megatron_moe2dense.trainer import runtime, weights
from megatron_moe2dense.trainer.checkpoints.checkpointer import load_weights
from megatron_moe2dense.trainer.checkpoints.writer import latest, step_of
from megatron_moe2dense.trainer.config import ExportConfig, ParallelConfig
from megatron_moe2dense.trainer.pipeline import PipelineLayout

# How much may wait for the disk.
_QUEUE_BYTES = 1024**3


def run(config: ExportConfig) -> None:
    """Load the weights into a whole model and write them under their Hugging Face names.

    Raises:
        UserError: no complete checkpoint at `checkpoint`; started with several processes; the stock class does not open what was written,
            which is gone then.
    """
    source, content = _locate(config)
    with runtime.session("auto") as device, process_groups.initialized(ParallelConfig(), seed=0) as groups:
        if dist.get_world_size() > 1:
            raise UserError(f"{dist.get_world_size()} processes", "one process", "run export without torchrun")
        dtype = _dtype(config, content)
        spec = models.ModelSpec.of(content, str(source), dtype)
        chunks = models.build(spec, groups, device, PipelineLayout.of_student(groups.parallel, spec.dims.layers))
        load_weights(source, chunks, groups)
        manifest = read_json(source.parents[1] / MANIFEST, "the manifest of the run")
        facts = {"step": step_of(source), "plan_hash": manifest.get("plan_hash")}
        with output_directory(Path(config.output), "export", config.model_dump(mode="json"), **facts) as working:
            _write(chunks[0], spec, working)
            write_json(working / "config.json", _with_dtype(content, dtype))
            copy_assets(source.parents[1] / "student", working)
            require_opens(working)
        logger.info("exported %s to %s", source, config.output)


def _write(model: models.HeadlessGPT, spec: models.ModelSpec, directory: Path) -> None:
    """One tensor after the other, each straight to its place."""
    specs = [TensorSpec.of(name, tensor) for name, tensor in weights.unload(model, spec)]
    with ShardWriter(directory, shards_of(specs), _QUEUE_BYTES) as writer:
        for name, tensor in weights.unload(model, spec):
            if not torch.isfinite(tensor).all():
                raise UserError(
                    f"{name} of the checkpoint has NaN or infinite values",
                    "finite weights",
                    "export an earlier step: checkpoint=.../step_*",
                )
            writer.write(name, tensor.cpu())
        writer.finish()


def dry_run(config: ExportConfig) -> dict[str, Any]:
    """What would be read and written."""
    source, content = _locate(config)
    return {"reads": str(source), "writes": config.output, "dtype": str(_dtype(config, content))}


def _locate(config: ExportConfig) -> tuple[Path, dict[str, Any]]:
    path = Path(config.checkpoint)
    source = latest(path / "checkpoints") if (path / "checkpoints").is_dir() else path
    if source is None or not source.is_dir():
        raise UserError(f"no complete checkpoint in {path}", "a run of `distill` with checkpoints/step_*", "run distill to its first save")
    step_of(source)
    return source, read_json(source.parents[1] / "student" / "config.json", "the student's config.json in the run directory")


def _dtype(config: ExportConfig, content: dict[str, Any]) -> torch.dtype:
    name = config.dtype if config.dtype != "source" else content.get("dtype") or content.get("torch_dtype") or "bfloat16"
    return getattr(torch, name)


def _with_dtype(content: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json as it was, naming the type the weights now have; they are not quantised, whatever they came from."""
    name = "torch_dtype" if "torch_dtype" in content and "dtype" not in content else "dtype"
    content = {key: value for key, value in content.items() if key != "quantization_config"}
    return {**content, name: str(dtype).removeprefix("torch.")}
