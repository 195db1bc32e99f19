"""`moe2dense export`: a trainer checkpoint of any layout, or a Hugging Face checkpoint, to what is served."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.checkpoint.shards import ShardWriter, TensorSpec, shards_of
from megatron_moe2dense.common import hub
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.common.outputs import MANIFEST, output_directory, read_json
from megatron_moe2dense.families.account import Account
from megatron_moe2dense.families.disk import Disk
from megatron_moe2dense.families.written import finish
from megatron_moe2dense.serving import gguf
from megatron_moe2dense.serving.config import ExportConfig
from megatron_moe2dense.serving.fp8 import Fp8Weights, require_library
from megatron_moe2dense.trainer.checkpoints.writer import latest, step_of
from megatron_moe2dense.trainer.config import ParallelConfig

# How much may wait for the disk.
_QUEUE_BYTES = 1024**3


def run(config: ExportConfig) -> None:
    """Write the weights under their Hugging Face names, or of those one GGUF file.

    Raises:
        UserError: no complete checkpoint at `checkpoint`; started with several processes; format=fp8 without compressed-tensors; the stock
            class does not open what was written, which is gone then; what `gguf.write` raises.
    """
    _require_tools(config)
    if _is_folder(config):
        _export_folder(config)
    else:
        _export_run(config)
    logger.info("exported %s to %s", config.checkpoint, config.output)


def _export_run(config: ExportConfig) -> None:
    """From a checkpoint of `distill`: the weights are loaded into a whole model."""
    # A Hugging Face checkpoint needs no Megatron-Core.
    from megatron_moe2dense.trainer import groups as process_groups
    from megatron_moe2dense.trainer import model as models
    from megatron_moe2dense.trainer import runtime, weights
    from megatron_moe2dense.trainer.checkpoints.checkpointer import load_weights
    from megatron_moe2dense.trainer.pipeline import PipelineLayout

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
            specs = [TensorSpec.of(name, tensor) for name, tensor in weights.unload(chunks[0], spec)]
            disk = Disk(spec.stock, {each.name: each.shape for each in specs})
            fp8 = Fp8Weights(spec.stock, disk) if config.format == "fp8" else None
            with _folder(working, config) as folder:
                _write(specs, weights.unload(chunks[0], spec), folder, fp8)
                _finish(folder, _with_dtype(content, dtype), fp8, source.parents[1] / "student")


def _export_folder(config: ExportConfig) -> None:
    """From a Hugging Face checkpoint: tensor by tensor, decoded where it is quantised."""
    account = Account.open(config.checkpoint)
    directory, left_out = account.index.directory, set(account.left_out)
    names = [name for name in account.values.shapes if left_out.isdisjoint(account.values.stored(name))]
    empty = (torch.empty(account.values.shapes[name], dtype=_kept(config, account, name), device="meta") for name in names)
    specs = [TensorSpec.of(name, tensor) for name, tensor in zip(names, empty, strict=True)]
    facts = {"source": {"path": str(directory), **hub.revision_of(directory), "fingerprint": account.index.fingerprint()}}
    fp8 = Fp8Weights(account.stock, account.disk) if config.format == "fp8" else None
    with (
        output_directory(Path(config.output), "export", config.model_dump(mode="json"), **facts) as working,
        CheckpointReader(account.index) as reader,
    ):
        read = account.values.reader(reader)

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for name in names:
                yield name, read(name, None).to(_kept(config, account, name))

        dtype = _dtype(config, account.config)
        with _folder(working, config) as folder:
            _write(specs, tensors(), folder, fp8)
            _finish(folder, account.config if config.dtype == "source" else _with_dtype(account.config, dtype), fp8, directory)


def _require_tools(config: ExportConfig) -> None:
    """Before anything is read: what the format takes."""
    if config.format == "fp8":
        require_library()
    elif config.format == "gguf":
        gguf.Tools.find(config.gguf, config.quantize)


@contextlib.contextmanager
def _folder(working: Path, config: ExportConfig) -> Iterator[Path]:
    """The Hugging Face directory to fill: the output itself, or one that a GGUF file is made of, which then takes its place."""
    if config.format != "gguf":
        yield working
        return
    folder = working / "hf"
    if folder.exists():  # of a run that was stopped
        shutil.rmtree(folder)
    folder.mkdir()
    yield folder
    kind = config.quantize or gguf.dtype_of(folder)
    gguf.write(folder, working / gguf.file_name(kind), kind, config.gguf)
    shutil.rmtree(folder)


def _kept(config: ExportConfig, account: Account, name: str) -> torch.dtype:
    """The type in which a tensor of a folder is written: what a class holds in float32 stays so, integers stay what they are."""
    found = account.values.dtype(name)
    if config.dtype == "source" or not found.is_floating_point:
        return found
    return account.stock.keeps(account.disk.where(name)[0], getattr(torch, config.dtype))


def _write(specs: list[TensorSpec], tensors: Iterable[tuple[str, torch.Tensor]], directory: Path, fp8: Fp8Weights | None) -> None:
    """One tensor after the other, each straight to its place."""
    written = [each for spec in specs for each in ([spec] if fp8 is None else fp8.specs(spec))]
    with ShardWriter(directory, shards_of(written), _QUEUE_BYTES) as writer:
        for name, tensor in tensors:
            if not torch.isfinite(tensor).all():
                raise UserError(
                    f"{name} of the checkpoint has NaN or infinite values",
                    "finite weights",
                    "export an earlier step: checkpoint=.../step_*",
                )
            for part, values in ({name: tensor} if fp8 is None else fp8.encoded(name, tensor)).items():
                writer.write(part, values.cpu())
        writer.finish()


def _finish(working: Path, content: dict[str, Any], fp8: Fp8Weights | None, assets: Path) -> None:
    finish(working, content if fp8 is None else {**content, "quantization_config": fp8.config()}, assets, processors=True)


def dry_run(config: ExportConfig) -> dict[str, Any]:
    """What would be read and written."""
    _require_tools(config)
    if _is_folder(config):
        account = Account.open(config.checkpoint)
        source, content = account.index.directory, account.config
    else:
        source, content = _locate(config)
    return {"reads": str(source), "writes": config.output, "dtype": str(_dtype(config, content)), "format": config.format}


def _is_folder(config: ExportConfig) -> bool:
    """Whether the checkpoint is one of Hugging Face, and no run or step of `distill`."""
    path = Path(config.checkpoint)
    return hub.Named.parse(path) is not None or ((path / "config.json").exists() and not (path / "checkpoints").is_dir())


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
