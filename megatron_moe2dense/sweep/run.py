"""`moe2dense sweep`: plans of the whole grid from one set of statistics, distinct ones evaluated in memory, several a streamed pass."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.common.outputs import versions, write_json
from megatron_moe2dense.common.progress import Pace, duration
from megatron_moe2dense.compute.device import open_device
from megatron_moe2dense.compute.ranks import Ranks
from megatron_moe2dense.evals.perplexity import Measured
from megatron_moe2dense.surgery.config import RefitConfig
from megatron_moe2dense.surgery.convert import flat_weights, require_same_source
from megatron_moe2dense.surgery.dense_stream import DenseStream
from megatron_moe2dense.surgery.layout import dense_size, effective_pad_to
from megatron_moe2dense.surgery.plan import ConversionPlan
from megatron_moe2dense.surgery.refit.planned import Place, block
from megatron_moe2dense.surgery.source import MoeSource
from megatron_moe2dense.surgery.stats import STATS_FILE, CalibratedStats
from megatron_moe2dense.surgery.stream import Compute
from megatron_moe2dense.sweep.bench import Bench
from megatron_moe2dense.sweep.config import SweepConfig
from megatron_moe2dense.sweep.grid import Point, distinct, in_slice, make_plans, points
from megatron_moe2dense.sweep.ledger import REFITS, SUMMARY, Ledger, read_rows, require_free
from megatron_moe2dense.sweep.summary import summarise, summary_table
from megatron_moe2dense.tokens.held_out import warn_unless_held_out
from megatron_moe2dense.tokens.indexed import windows


@dataclass(frozen=True)
class Sweep:
    """What every process of a sweep works out alike. plans: of every point. by_hash: points of each distinct plan."""

    config: SweepConfig
    source: MoeSource
    windows_NS: np.ndarray
    compute: Compute
    points: list[Point]
    plans: list[ConversionPlan]
    by_hash: dict[str, list[int]]

    @cached_property
    def parameters(self) -> dict[int, int]:
        """Of the dense model, by its number of groups."""
        return {groups: dense_size(self.source, groups)[0] for groups in {plan.groups for plan in self.plans}}

    @property
    def mine(self) -> list[str]:
        """The plans of this process's slice."""
        return in_slice(list(self.by_hash), self.config.part)

    @property
    def state_bytes(self) -> int:
        """Hidden states of one model."""
        return self.windows_NS.size * self.source.dims.hidden_size * self.compute.dtype.itemsize

    @property
    def at_once(self) -> int:
        """Models of one pass within the memory budget, beside the teacher's hidden states and those before the first layer; at least 1."""
        return max(1, self.config.memory_budget // self.state_bytes - 2)

    def facts(self) -> dict[str, Any]:
        """What is measured on what."""
        statistics = (Path(self.config.statistics) / STATS_FILE).read_bytes()
        return {
            "source": self.source.facts(),
            "windows": hashlib.sha256(self.windows_NS.tobytes()).hexdigest()[:16],
            "statistics": hashlib.sha256(statistics).hexdigest()[:16],
            "points": len(self.points),
            "plans": len(self.by_hash),
        }


def run(config: SweepConfig) -> None:
    """Evaluate what no process has evaluated yet; write records.jsonl and summary.json, print the summary.

    Raises:
        UserError: source, statistics, tokens and grid do not fit each other; the output exists.
    """
    source = MoeSource.open(config.source, pad_to=config.pad_to)
    with CheckpointReader(source.index) as reader:
        sweep = prepare(config, source, reader)
        ledger = Ledger(sweep.config, sweep.facts())
        _copy_equal(sweep, ledger)
        if todo := _open_plans(sweep, ledger.rows()):
            logger.info("%s", _said(sweep, len(todo)))
            place = Place(ledger.directory / REFITS, config.memory_budget, Ranks())
            bench = Bench.open(reader, source, sweep.compute, sweep.windows_NS, place)
            pace = Pace(len(sweep.by_hash) - len(todo))
            while _one_pass(sweep, ledger, bench):
                _say_best(sweep, ledger.rows(), pace)
    _conclude(sweep, ledger)


def prepare(config: SweepConfig, source: MoeSource, reader: CheckpointReader) -> Sweep:
    """The windows and the plans of all points; each layer's experts are read once, where a grouping looks at them."""
    statistics = CalibratedStats.open(config.statistics)
    require_same_source(f"{config.statistics}: statistics", statistics.source, source)
    device = open_device(config.device, Ranks())
    if config.refit_data is not None:
        warn_unless_held_out(config.data.path, {"refit_data.path": config.refit_data.path})
    windows_NS = windows(config.data, source.dims)
    compute = Compute(device, getattr(torch, config.dtype), max(1, config.batch_tokens // config.data.sequence_length))
    DenseStream(source, reader, compute).require_alone(windows_NS)
    found = points(config.grid, source.dims.experts, source.dims.active)
    plans = make_plans(found, statistics, lambda layer: flat_weights(source, reader, layer))
    blocks = {repr(refit): _block(refit, config, source) for refit in config.grid.refit if refit is not None}
    plans = [replace(plan, refit=blocks.get(repr(point.refit))) for plan, point in zip(plans, found, strict=True)]
    config = config.model_copy(update={"pad_to": effective_pad_to(source, {plan.groups for plan in plans})})
    return Sweep(config, source, windows_NS, compute, found, plans, distinct(plans))


def _block(refit: RefitConfig, config: SweepConfig, source: MoeSource) -> dict[str, Any]:
    assert config.refit_data is not None, "SweepConfig requires text for a refit"
    return block(refit, config.refit_data, source, Ranks())


def _said(sweep: Sweep, todo: int) -> str:
    passes = -(-todo // sweep.at_once)
    return (
        f"{len(sweep.points)} configurations, {len(sweep.by_hash)} distinct plans, {len(sweep.mine)} in slice {sweep.config.slice}, "
        f"{todo} to evaluate: up to {sweep.at_once} in a pass (hidden states of {sweep.state_bytes / 1e6:,.1f} MB each, memory_budget), "
        f"{passes} passes"
    )


def _open_plans(sweep: Sweep, rows: dict[int, dict[str, Any]]) -> list[str]:
    return [plan for plan in sweep.mine if any(point not in rows for point in sweep.by_hash[plan])]


def _copy_equal(sweep: Sweep, ledger: Ledger) -> None:
    """Complete plans that were evaluated, but killed before the rows of all their points were written."""
    with ledger.locked():
        rows = ledger.rows()
        for plan in _open_plans(sweep, rows):
            known = [rows[point] for point in sweep.by_hash[plan] if point in rows and "same_plan_as" not in rows[point]]
            if known:
                missing = [point for point in sweep.by_hash[plan] if point not in rows]
                ledger.append([_equal_row(sweep.points[point], known[0]) for point in missing])


def _say_best(sweep: Sweep, rows: Mapping[int, dict[str, Any]], pace: Pace) -> None:
    """After a pass: how many plans all processes have evaluated, and the best so far."""
    done = [row for row in rows.values() if "same_plan_as" not in row]
    best = min(done, key=lambda row: row["metrics"]["kl"])
    found, metrics = f"{len(done)}/{len(sweep.by_hash)} plans, {duration(pace.seconds)}", best["metrics"]
    left = pace.left(len(done), len(sweep.by_hash)) if len(done) < len(sweep.by_hash) else ""
    said = f"best {best['model']}: KL {metrics['kl']:.4f}, perplexity {metrics['perplexity']:.2f}"
    logger.info("sweep: %s; %s", ", ".join([found, *([left] if left else [])]), said)


def _one_pass(sweep: Sweep, ledger: Ledger, bench: Bench) -> bool:
    """Evaluate one batch of plans that nobody else has; False when there is none left."""
    order = list(sweep.by_hash)
    numbers = [order.index(plan) for plan in _open_plans(sweep, ledger.rows())]
    with ledger.claimed(numbers, sweep.at_once) as held:
        # Read again now that they are ours: who had claimed one before recorded it before letting go.
        still_open = set(_open_plans(sweep, ledger.rows()))
        chosen = [order[number] for number in held if order[number] in still_open]
        if not chosen:
            return False
        start = time.perf_counter()
        plans = [sweep.plans[sweep.by_hash[plan][0]] for plan in chosen]
        teacher, found = bench.evaluate(plans)
        seconds = (time.perf_counter() - start) / len(chosen)
        for plan, measured in zip(chosen, found, strict=True):
            ledger.append(_rows(sweep, plan, (teacher, measured), seconds))
        bench.forget(plans)
    return True


def _rows(sweep: Sweep, plan_hash: str, measured: tuple[Measured, Measured], seconds: float) -> list[dict[str, Any]]:
    """The records of all points of one plan; teacher and model. Seconds: of the pass, a model's share."""
    numbers = sweep.by_hash[plan_hash]
    plan, (teacher, own) = sweep.plans[numbers[0]], measured
    first = {
        **_named(sweep.points[numbers[0]]),
        "plan_hash": plan_hash,
        "parameters": sweep.parameters[plan.groups],
        "metrics": {"nll": own.nll, "perplexity": own.perplexity, "kl": own.kl, "top1_agreement": own.top1_agreement},
        "teacher": {"nll": teacher.nll, "perplexity": teacher.perplexity},
        "tokens": own.positions,
        "seconds": round(seconds, 4),
        "versions": versions(),
    }
    return [first, *(_equal_row(sweep.points[number], first) for number in numbers[1:])]


def _named(point: Point) -> dict[str, Any]:
    return {"model": point.name, "point": point.number, "config": point.config}


def _equal_row(point: Point, evaluated: dict[str, Any]) -> dict[str, Any]:
    return {**evaluated, **_named(point), "same_plan_as": evaluated["model"], "seconds": 0.0}


def _conclude(sweep: Sweep, ledger: Ledger) -> None:
    with ledger.locked():
        rows = list(ledger.rows().values())
        summary = summarise(rows, len(sweep.points))
        write_json(ledger.directory / SUMMARY, summary)
        if len(rows) == len(sweep.points):
            ledger.finish()
    print(summary_table(summary))
    print(f"\n{ledger.directory}: {len(rows)} of {len(sweep.points)} configurations, {len(sweep.by_hash)} distinct plans")


def dry_run(config: SweepConfig) -> dict[str, Any]:
    """Points, distinct plans (which are really made), passes, FLOPs and bytes."""
    source = MoeSource.open(config.source, pad_to=config.pad_to)
    with CheckpointReader(source.index) as reader:
        sweep = prepare(config, source, reader)
    require_free(sweep.config, sweep.facts())
    rows = {} if config.overwrite else read_rows(Path(config.output))
    todo = _open_plans(sweep, rows)
    flops = sum(2 * sweep.parameters[sweep.plans[sweep.by_hash[plan][0]].groups] * sweep.windows_NS.size for plan in todo)
    return {
        "source": source.facts(),
        "configurations": len(sweep.points),
        "distinct_plans": len(sweep.by_hash),
        "to_evaluate": len(todo),
        "models_in_a_pass": sweep.at_once,
        "passes": -(-len(todo) // sweep.at_once),
        "reads": {str(source.index.directory): source.index.nbytes, "times": -(-len(todo) // sweep.at_once) + bool(todo)},
        "writes": [f"{config.output}/records.jsonl", f"{config.output}/{SUMMARY}"],
        "tokens_per_model": int(sweep.windows_NS.size),
        "forward_flops": flops,
        "memory_bytes": {"hidden states of one model": sweep.state_bytes, "budget": config.memory_budget},
    }
