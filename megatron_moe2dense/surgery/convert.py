"""`moe2dense convert`: a MoE checkpoint and a plan to a dense checkpoint of the family's dense class, one layer at a time.
Everything outside the MoE blocks is copied bit for bit."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_moe2dense.checkpoint.assets import copy_assets
from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.checkpoint.writer import CheckpointWriter
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import output_directory
from megatron_moe2dense.common.progress import progress
from megatron_moe2dense.families import FAMILIES, FamilySpec
from megatron_moe2dense.surgery.config import ConvertConfig
from megatron_moe2dense.surgery.densify import densify, pad_width
from megatron_moe2dense.surgery.packing import finite_tensors, read_ffn, write_ffn
from megatron_moe2dense.surgery.plan import ConversionPlan, Methods, make_plan
from megatron_moe2dense.surgery.source import MoeSource
from megatron_moe2dense.surgery.stats import CalibratedStats
from megatron_moe2dense.surgery.types import DenseFfn, FlatWeights, LayerPlan

PLAN_FILE = "plan.json"


def run(config: ConvertConfig) -> None:
    """Write the dense checkpoint and plan.json.

    Raises:
        UserError: source, statistics, plan and methods do not fit each other; a NaN expert; the output exists.
    """
    source = MoeSource.open(config.source)
    with CheckpointReader(source.index) as reader:
        plan = resolve_plan(config, source, reader)
        facts = {"source": source.facts(), "plan_hash": plan.hash()}
        with output_directory(Path(config.output), "convert", config.model_dump(mode="json"), **facts) as working:
            write_dense(source, reader, plan, working)
            plan.write(working / PLAN_FILE)
    parameters, nbytes = dense_size(source, plan.groups)
    print(f"{config.output}: {parameters:,} parameters, {nbytes / 1e6:,.1f} MB, plan {plan.hash()}")


def resolve_plan(config: ConvertConfig, source: MoeSource, reader: CheckpointReader) -> ConversionPlan:
    """The plan to carry out: read from `config.plan`, or made from statistics and methods. Its source is `source`."""
    statistics = None if config.statistics is None else CalibratedStats.open(config.statistics)
    if statistics is not None:
        _require_same_source(f"{config.statistics}: statistics", statistics.source, source)
    if config.plan is not None:
        plan = ConversionPlan.read(Path(config.plan))
        _require_same_source(f"{config.plan}: plan", plan.source, source)
        _require_fit(config, plan, source)
        return plan
    assert statistics is not None, "ConvertConfig requires statistics without a plan"
    assert config.score is not None, "ConvertConfig fills score without a plan"
    assert config.scale is not None, "ConvertConfig fills scale without a plan"
    groups = config.groups or source.dims.active
    methods = Methods(config.keep or groups, groups, config.score, config.group, config.scale)
    return make_plan(statistics, methods, lambda layer: _flat_weights(source, reader, layer))


def _require_same_source(what: str, found: dict[str, Any], source: MoeSource) -> None:
    if found["fingerprint"] != source.fingerprint:
        raise UserError(
            f"{what} of another model ({found['path']}, fingerprint {found['fingerprint'][:12]})",
            f"made from {source.index.directory} (fingerprint {source.fingerprint[:12]})",
            "run `moe2dense calibrate` on this source, or point to the source they were made from",
        )


def _require_fit(config: ConvertConfig, plan: ConversionPlan, source: MoeSource) -> None:
    for name, wanted, planned in (("keep", config.keep, plan.keep), ("groups", config.groups, plan.groups)):
        if wanted is not None and wanted != planned:
            raise UserError(f"{name}={wanted}", f"{name}={planned}, as {config.plan} says", f"drop {name}: the plan decides it")
    experts = [expert for layer in plan.layers for expert in layer.experts]
    if [layer.layer for layer in plan.layers] != list(source.layers) or not all(0 <= e < source.dims.experts for e in experts):
        raise UserError(
            f"{config.plan}: layers or experts the source does not have",
            f"a plan for the layers {list(source.layers)} of {source.dims.experts} experts",
            "use the plan that was made for this source",
        )


def _flat_weights(source: MoeSource, reader: CheckpointReader, layer: int) -> FlatWeights:
    def read(expert: int) -> np.ndarray:
        ffn = read_ffn(finite_tensors(reader), source.tensors.experts, layer, expert)
        return torch.cat([part.float().flatten() for part in (ffn.gate_FD, ffn.up_FD, ffn.down_DF)]).numpy()

    return read


def dense_width(source: MoeSource, groups: int) -> int:
    """F of the result: G * I and the shared experts, or the width of the family's own dense layers where that is larger (the rest is
    zero)."""
    dims = source.dims
    has_dense_layers = len(source.layers) < dims.layers
    return max(groups * dims.expert_width + dims.shared_width, dims.dense_width if has_dense_layers else 0)


def dense_size(source: MoeSource, groups: int) -> tuple[int, int]:
    """Parameters and bytes of the dense result with `groups` slices."""
    gone, tensors = _gone(source), source.index.tensors
    kept = [info for name, info in tensors.items() if name not in gone]
    ffn, layout = _target(source).ffn, source.tensors.experts
    made = [ffn.shapes(layer, source.dims.hidden_size, dense_width(source, groups)) for layer in range(source.dims.layers)]
    values = sum(prod(shape) for layer in [*made, _added(source)] for shape in layer.values())
    gate = tensors[layout.names(source.layers[0])[0]]
    element = 2 if layout.mxfp4 else gate.nbytes // prod(gate.shape)
    return sum(prod(info.shape) for info in kept) + values, sum(info.nbytes for info in kept) + values * element


def _target(source: MoeSource) -> FamilySpec:
    assert source.spec.dense_target is not None, "a MoE family names its dense target"
    return FAMILIES[source.spec.dense_target]


def _gone(source: MoeSource) -> set[str]:
    """The tensors that the dense FFNs take the place of, and those of layers the stock model does not have."""
    dense = [name for layer in range(source.dims.layers) if layer not in source.layers for name in source.spec.ffn.names(layer)]
    return {name for layer in source.layers for name in source.block_names(layer)} | {*dense, *source.beyond_layers()}


def _added(source: MoeSource) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that the dense class has beyond the source's; they are zero."""
    templates = source.spec.added(source.index.config)
    return {name.format(layer=layer): shape for layer in range(source.dims.layers) for name, shape in templates.items()}


def write_dense(source: MoeSource, reader: CheckpointReader, plan: ConversionPlan, directory: Path) -> None:
    """Write the dense checkpoint of `plan` and the tokenizer files into `directory`."""
    assert source.spec.dense_config is not None, "a MoE family gives its dense config"
    target, width, gone = _target(source), dense_width(source, plan.groups), _gone(source)
    plans = {layer.layer: layer for layer in plan.layers}
    writer = CheckpointWriter(directory)
    for name in source.index.tensors:
        if name not in gone:
            writer.add(name, reader.tensor(name))
    dtype = torch.float32
    for layer in progress(range(source.dims.layers), "convert", unit="layer"):
        ffn = pad_width(_layer_ffn(source, reader, layer, plans.get(layer)), width)
        dtype = ffn.gate_FD.dtype
        for name, tensor in write_ffn(target.ffn, layer, ffn):
            writer.add(name, tensor)
    for name, shape in _added(source).items():
        writer.add(name, torch.zeros(shape, dtype=dtype))
    writer.finish(source.spec.dense_config(source.index.config, width))
    copy_assets(source.index.directory, directory)


def _layer_ffn(source: MoeSource, reader: CheckpointReader, layer: int, plan: LayerPlan | None) -> DenseFfn:
    read, tensors = finite_tensors(reader), source.tensors
    if plan is None:
        return read_ffn(read, source.spec.ffn, layer)
    for name in source.block_names(layer):  # experts that are not kept too: their MoE is the teacher of the next stage
        reader.finite(name)
    shared = None if tensors.shared is None else read_ffn(read, tensors.shared, layer)
    return densify(plan, lambda expert: read_ffn(read, tensors.experts, layer, expert), shared)


def dry_run(config: ConvertConfig) -> dict[str, Any]:
    """The plan in short, what would be read and written (bytes), and the memory (bytes). The plan is really made."""
    source = MoeSource.open(config.source)
    with CheckpointReader(source.index) as reader:
        plan = resolve_plan(config, source, reader)
    parameters, nbytes = dense_size(source, plan.groups)
    dims = source.dims
    return {
        "source": source.facts(),
        "plan": {"keep": plan.keep, "groups": plan.groups, "width": dense_width(source, plan.groups), "hash": plan.hash()},
        "parameters": parameters,
        "reads": {str(source.index.directory): source.index.nbytes},
        "writes": {config.output: nbytes},
        "flops": len(source.layers) * 2 * plan.keep * 3 * dims.hidden_size * dims.expert_width,
        "memory_bytes": {"one shard": min(nbytes, 4 * 1024**3), "one group in float64": 8 * 3 * dims.hidden_size * dims.expert_width},
    }
