"""`moe2dense convert`: a MoE checkpoint and a plan to a dense checkpoint of the family's dense class, one layer at a time.
Everything outside the MoE blocks is copied bit for bit."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.common.content import config_hash, identity
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import MANIFEST, begun_as, read_manifest
from megatron_moe2dense.compute.ranks import Ranks, joined
from megatron_moe2dense.families.engines import said_of_engines
from megatron_moe2dense.surgery.config import ConvertConfig
from megatron_moe2dense.surgery.inspect import left_out_line
from megatron_moe2dense.surgery.layout import dense_of, dense_size, effective_pad_to, making_bytes, padding, require_read_alike, room
from megatron_moe2dense.surgery.plan import ROUTED_FACTOR, ConversionPlan, Methods, make_plan
from megatron_moe2dense.surgery.refit.planned import Place, cost, fit_planned, with_refit
from megatron_moe2dense.surgery.rewrite import DenseOutput, write_dense
from megatron_moe2dense.surgery.source import MoeSource
from megatron_moe2dense.surgery.stats import CalibratedStats
from megatron_moe2dense.surgery.types import FlatWeights, NeuronPlan


def run(config: ConvertConfig) -> None:
    """Write the dense checkpoint and plan.json, or several of them in one pass over the source. Under torchrun every process takes a share
    of a refit's text; the first one writes.

    Raises:
        UserError: source, statistics, plan and methods do not fit each other; a NaN weight; an output exists; the stock class would not
            open what is written.
    """
    source = _opened(config)
    with joined() as ranks, CheckpointReader(source.index) as reader:
        jobs = [_resolved(job, resolve_plan(job, source, reader, ranks), source) for job in config.jobs()]
        for groups in {plan.groups for _, plan in jobs}:
            require_read_alike(source, groups)
        pending = [(job, plan) for job, plan in jobs if not _is_done(job, source, plan)]
        with ExitStack() as stack:
            outputs = []
            for job, plan in pending if len(jobs) > 1 and pending else jobs:
                width = dataclasses.asdict(padding(source, plan.groups, plan.neurons))
                facts = {"source": source.facts(), "plan_hash": plan.hash(), "width": width}
                directory = stack.enter_context(
                    ranks.output_directory(Path(str(job.output)), "convert", job.model_dump(mode="json"), **facts)
                )
                place = Place(directory, job.memory_budget, ranks)
                fits = fit_planned(source, reader, [(plan, place)])[0] if plan.refit is not None else None
                outputs.append(DenseOutput(plan, directory, job.shard_size, fits))
            if ranks.rank == 0:
                write_dense(source, reader, outputs, config.memory_budget)
    for job, plan in jobs if ranks.rank == 0 else []:
        parameters, nbytes = dense_size(source, plan.groups)
        print(f"{job.output}: {parameters:,} parameters, {nbytes / 1e6:,.1f} MB, plan {plan.hash()}")
        if said := padding(source, plan.groups, plan.neurons).said:
            print(f"{job.output}: {said}")
    if source.account.left_out and ranks.rank == 0:
        print(left_out_line(source.account.left_out_facts(), source.family))


def _opened(config: ConvertConfig) -> MoeSource:
    source = MoeSource.open(config.source, config.text_only, config.pad_to)
    source.require_whole()
    return source


def _resolved(job: ConvertConfig, plan: ConversionPlan, source: MoeSource) -> tuple[ConvertConfig, ConversionPlan]:
    """With `pad_to` as far as it has an effect."""
    return job.model_copy(update={"pad_to": effective_pad_to(source, [plan.groups])}), plan


def _is_done(job: ConvertConfig, source: MoeSource, plan: ConversionPlan) -> bool:
    """Whether a run over several outputs that was killed while it put them in place had finished this one."""
    path = Path(str(job.output)) / MANIFEST
    if job.overwrite or not path.exists():
        return False
    found = read_manifest(path.parent, "convert")
    wanted = (config_hash(identity(job.model_dump(mode="json"))), source.fingerprint, plan.hash())
    return (config_hash(begun_as(found)), found["source"]["fingerprint"], found["plan_hash"]) == wanted


def resolve_plan(config: ConvertConfig, source: MoeSource, reader: CheckpointReader, ranks: Ranks) -> ConversionPlan:
    """The plan to carry out: read from `config.plan`, or made from statistics and methods. Its source is `source`. ranks: of its refit."""
    statistics = None if config.statistics is None else CalibratedStats.open(config.statistics)
    if statistics is not None:
        require_same_source(f"{config.statistics}: statistics", statistics.source, source)
    if config.plan is not None:
        plan = ConversionPlan.read(Path(config.plan))
        require_same_source(f"{config.plan}: plan", plan.source, source)
        _require_fit(config, plan, source)
        return with_refit(config, plan, source, ranks)
    assert statistics is not None, "ConvertConfig requires statistics without a plan"
    assert config.score is not None, "ConvertConfig fills score without a plan"
    assert config.scale is not None, "ConvertConfig fills scale without a plan"
    groups = config.groups or source.dims.active
    methods = Methods(config.keep or groups, groups, config.score, config.group, config.scale)
    plan = make_plan(statistics, methods, lambda layer: flat_weights(source, reader, layer))
    return with_refit(config, plan, source, ranks)


def require_same_source(what: str, found: dict[str, Any], source: MoeSource) -> None:
    """UserError when `what` (statistics, a plan) was made from another model; found: the source it recorded."""
    if found["fingerprint"] != source.fingerprint:
        raise UserError(
            f"{what} of another model ({found['path']}, fingerprint {found['fingerprint'][:12]})",
            f"made from {source.index.directory} (fingerprint {source.fingerprint[:12]})",
            "run `moe2dense calibrate` on this source, or point to the source they were made from",
        )
    if found.get(ROUTED_FACTOR, 1.0) != source.routed_factor:
        raise UserError(
            f"{what} of an earlier version, whose gates lack what {source.family} multiplies the sum of its experts by",
            f"gates with the factor {source.routed_factor:g}",
            "run `moe2dense calibrate` again, and make plans from what it writes",
        )


def _require_fit(config: ConvertConfig, plan: ConversionPlan, source: MoeSource) -> None:
    for name, wanted, planned in (("keep", config.keep, plan.keep), ("groups", config.groups, plan.groups)):
        if wanted is not None and wanted != planned:
            raise UserError(f"{name}={wanted}", f"{name}={planned}, as {config.plan} says", f"drop {name}: the plan decides it")
    dims = source.dims
    experts = [expert for layer in plan.layers for expert in layer.experts]
    chosen = [layer.neurons for layer in plan.layers if isinstance(layer, NeuronPlan)]
    least, counts = plan.groups * dims.expert_width, {len(neurons) for neurons in chosen}
    fits = [layer.layer for layer in plan.layers] == list(source.layers) and all(0 <= e < dims.experts for e in experts)
    fits &= all(0 <= neuron < dims.expert_width for neurons in chosen for neuron in neurons)
    if not fits or len(counts) > 1 or any(count < least for count in counts):
        raise UserError(
            f"{config.plan}: layers, experts or neurons the source does not have",
            f"a plan for the layers {list(source.layers)} of {dims.experts} experts of {dims.expert_width} neurons",
            "use the plan that was made for this source",
        )
    if chosen and (most := room(source, plan.groups)) < max(counts):
        raise UserError(
            f"{config.plan}: {max(counts)} neurons a layer, pad_to={config.pad_to}",
            f"at most {most} of them in widths that are multiples of {config.pad_to}",
            "give the pad_to with which they were selected",
        )


def flat_weights(source: MoeSource, reader: CheckpointReader, layer: int) -> FlatWeights:
    """Reads one layer's experts for the grouping methods that look at weights."""

    def read(expert: int) -> np.ndarray:
        ffn = source.expert(source.reader(reader), layer, expert)
        parts = [part for part in (ffn.gate_FD, ffn.up_FD, ffn.down_DF) if part is not None]
        return torch.cat([part.float().flatten() for part in parts]).numpy()

    return read


def dry_run(config: ConvertConfig) -> dict[str, Any]:
    """The plans in short, what would be read and written (bytes), and the memory (bytes). The plans are really made."""
    source = _opened(config)
    with CheckpointReader(source.index) as reader:
        plans = {str(job.output): resolve_plan(job, source, reader, Ranks()) for job in config.jobs()}
    facts = {output: _plan_facts(source, plan) for output, plan in plans.items()}
    dims = source.dims
    single = facts[config.output] if config.output is not None else {"outputs": facts}
    return {
        "source": source.facts(),
        **single,
        "left_out": source.account.left_out_facts(),
        "reads": {str(source.index.directory): source.index.nbytes},
        "writes": {output: dense_size(source, plan.groups)[1] for output, plan in plans.items()},
        "flops": sum(len(source.layers) * 2 * plan.keep * 3 * dims.hidden_size * dims.expert_width for plan in plans.values()),
        "memory_bytes": {
            "budget": config.memory_budget,
            "of it, one layer in the making": max(making_bytes(source, plan) for plan in plans.values()),
        },
    }


def _plan_facts(source: MoeSource, plan: ConversionPlan) -> dict[str, Any]:
    width = dataclasses.asdict(padding(source, plan.groups, plan.neurons))
    short = {"keep": plan.keep, "groups": plan.groups, "width": width["width"], "hash": plan.hash()}
    refit = {"refit": cost(source, plan)} if plan.refit is not None else {}
    engines = said_of_engines(dense_of(source, plan.groups).stock.model.config.to_dict())
    return {"plan": short, "engines": engines, "parameters": dense_size(source, plan.groups)[0], "padding": width, **refit}
