"""`moe2dense convert`: a MoE checkpoint and a plan to a dense checkpoint of the family's dense class, one layer at a time.
Everything outside the MoE blocks is copied bit for bit."""

from __future__ import annotations

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
from megatron_moe2dense.families import FAMILIES, FfnTensors
from megatron_moe2dense.surgery.config import ConvertConfig
from megatron_moe2dense.surgery.densify import ReadExpert, densify, pad_width
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
        return torch.cat([reader.finite(name).float().flatten() for name in source.expert_names(layer, expert)]).numpy()

    return read


def dense_width(source: MoeSource, groups: int) -> int:
    """F of the result: G * I, or the width of the family's own dense layers where that is larger (the rest is zero)."""
    dims = source.dims
    has_dense_layers = len(source.layers) < dims.layers
    return max(groups * dims.expert_width, dims.dense_width if has_dense_layers else 0)


def dense_size(source: MoeSource, groups: int) -> tuple[int, int]:
    """Parameters and bytes of the dense result with `groups` slices."""
    replaced = {name for layer in range(source.dims.layers) for name in _replaced(source, layer)}
    kept = [info for name, info in source.index.tensors.items() if name not in replaced]
    ffn = source.dims.layers * 3 * source.dims.hidden_size * dense_width(source, groups)
    gate = source.index.tensors[source.expert_names(source.layers[0], 0)[0]]
    element = gate.nbytes // int(np.prod(gate.shape))
    return sum(int(np.prod(info.shape)) for info in kept) + ffn, sum(info.nbytes for info in kept) + ffn * element


def _ffn_names(templates: FfnTensors, layer: int) -> list[str]:
    return [template.format(layer=layer) for template in (templates.gate, templates.up, templates.down)]


def _replaced(source: MoeSource, layer: int) -> list[str]:
    """The tensors of a layer that its dense FFN takes the place of."""
    return source.block_names(layer) if layer in source.layers else _ffn_names(source.spec.ffn, layer)


def write_dense(source: MoeSource, reader: CheckpointReader, plan: ConversionPlan, directory: Path) -> None:
    """Write the dense checkpoint of `plan` and the tokenizer files into `directory`."""
    assert source.spec.dense_target is not None, "a MoE family names its dense target"
    assert source.spec.dense_config is not None, "a MoE family gives its dense config"
    target, width = FAMILIES[source.spec.dense_target], dense_width(source, plan.groups)
    plans = {layer.layer: layer for layer in plan.layers}
    replaced = {name for layer in range(source.dims.layers) for name in _replaced(source, layer)}
    writer = CheckpointWriter(directory)
    for name in source.index.tensors:
        if name not in replaced:
            writer.add(name, reader.tensor(name))
    for layer in progress(range(source.dims.layers), "convert", unit="layer"):
        ffn = pad_width(_layer_ffn(source, reader, layer, plans.get(layer)), width)
        for name, tensor in zip(_ffn_names(target.ffn, layer), (ffn.gate_FD, ffn.up_FD, ffn.down_DF), strict=True):
            writer.add(name, tensor)
    writer.finish(source.spec.dense_config(source.index.config, width))
    copy_assets(source.index.directory, directory)


def _layer_ffn(source: MoeSource, reader: CheckpointReader, layer: int, plan: LayerPlan | None) -> DenseFfn:
    if plan is None:
        return DenseFfn(*(reader.tensor(name) for name in _ffn_names(source.spec.ffn, layer)))
    for name in source.block_names(layer):  # experts that are not kept too: their MoE is the teacher of the next stage
        reader.finite(name)
    return densify(plan, _reader_of(source, reader, layer))


def _reader_of(source: MoeSource, reader: CheckpointReader, layer: int) -> ReadExpert:
    return lambda expert: tuple(reader.tensor(name) for name in source.expert_names(layer, expert))


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
