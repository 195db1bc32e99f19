"""`moe2dense auto`: the plan that is best for a budget, by successive halving over plans of experts and of neurons (ours; automatic choice
is named future work in the paper).

Every candidate is judged on a little held-out text, by KL to the MoE, its down projections solved on as little calibration text; the better
ones on more, the last few on all of it with every mode of refit. The best may be judged once more with its FFNs trained block by block.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from megatron_moe2dense.checkpoint.reader import CheckpointReader
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.label import label
from megatron_moe2dense.common.log import logger
from megatron_moe2dense.common.outputs import output_directory, read_json, write_json
from megatron_moe2dense.common.table import render
from megatron_moe2dense.compute.device import open_device
from megatron_moe2dense.compute.ranks import Ranks
from megatron_moe2dense.families.widths import RUNS_EVERYWHERE
from megatron_moe2dense.surgery import select
from megatron_moe2dense.surgery.config import ReconstructConfig, RefitConfig, SelectConfig
from megatron_moe2dense.surgery.convert import flat_weights, require_same_source
from megatron_moe2dense.surgery.layout import dense_size, effective_pad_to, padding
from megatron_moe2dense.surgery.neurons import selectors
from megatron_moe2dense.surgery.plan import ConversionPlan
from megatron_moe2dense.surgery.refit.fit import adds_plainly
from megatron_moe2dense.surgery.refit.planned import Place, block
from megatron_moe2dense.surgery.rewrite import PLAN_FILE
from megatron_moe2dense.surgery.source import MoeSource
from megatron_moe2dense.surgery.stats import CalibratedStats
from megatron_moe2dense.surgery.stream import Compute
from megatron_moe2dense.sweep.bench import Bench
from megatron_moe2dense.sweep.config import AutoConfig, BudgetConfig
from megatron_moe2dense.sweep.grid import make_plans, points, refit_block
from megatron_moe2dense.tokens.config import TokensConfig
from megatron_moe2dense.tokens.held_out import warn_unless_held_out
from megatron_moe2dense.tokens.indexed import windows

Mode = Literal["parallel", "sequential"]
REPORT = "auto.json"
_SHOWN = 12


@dataclass(frozen=True)
class Candidate:
    """plan: without a refit. refit: the one it is judged with, None: none."""

    name: str
    plan: ConversionPlan
    refit: RefitConfig | None

    @property
    def called(self) -> str:
        """For tables."""
        if self.refit is None:
            return self.name
        return f"{self.name} {label(refit_block(self.refit))}"


def run(config: AutoConfig) -> None:
    """Write plan.json of the best plan and auto.json; print how it was chosen.

    Raises:
        UserError: no width fits the budget; source, statistics and texts do not fit each other; the output exists.
    """
    source, statistics = MoeSource.open(config.source, pad_to=config.pad_to), CalibratedStats.open(config.statistics)
    require_same_source(f"{config.statistics}: statistics", statistics.source, source)
    warn_unless_held_out(config.data.path, {"refit_data.path": config.refit_data.path})
    windows_NS, compute, modes = _judged_on(config, source)
    groups = groups_of(config.budget, source)
    config, asked = config.model_copy(update={"pad_to": effective_pad_to(source, range(1, source.dims.experts + 1))}), config.pad_to
    facts: dict[str, Any] = {"source": source.facts(), "groups": groups}
    with (
        CheckpointReader(source.index) as reader,
        output_directory(Path(config.output), "auto", config.model_dump(mode="json"), **facts) as working,
    ):
        found = _experts(config, source, reader, statistics, groups) + _neurons(config, groups, working)
        bench = Bench.open(reader, source, compute, windows_NS, Place(working / "refits", config.memory_budget, Ranks()))
        search = _Search(config, bench, working, modes)
        best, rounds = search.rounds(found)
        search.planned(best, 1).write(working / PLAN_FILE)
        report = {"format": 1, **facts, "parameters": dense_size(source, groups)[0], "candidates": len(found), "rounds": rounds}
        report["padding"] = dataclasses.asdict(padding(source, groups, best.plan.neurons))
        report["model_windows"] = {"spent": sum(each["model_windows"] for each in rounds), "all": len(found) * len(windows_NS)}
        write_json(working / REPORT, report)
        search.clean()
    print(rounds_table(report))
    padded = "" if asked == RUNS_EVERYWHERE else f" pad_to={asked}"
    print(f"\n{config.output}/{PLAN_FILE}: moe2dense convert source={config.source} plan={config.output}/{PLAN_FILE}{padded} output=...")


def _judged_on(config: AutoConfig, source: MoeSource) -> tuple[np.ndarray, Compute, tuple[Mode, ...]]:
    """The held-out text, how it runs, and in which modes refits go with the model, the best last; UserError for a model that no dense
    layer can be judged in."""
    windows_NS = windows(config.data, source.dims)
    device = open_device(config.device, Ranks())
    compute = Compute(device, getattr(torch, config.dtype), max(1, config.batch_tokens // config.data.sequence_length))
    with CheckpointReader(source.index) as reader:
        plainly = adds_plainly(source, reader, compute, windows_NS)
    return windows_NS, compute, ("parallel", "sequential") if plainly else ("parallel",)


def groups_of(budget: BudgetConfig, source: MoeSource) -> int:
    """The most slices of a dense FFN that the budget has room for; the router's top-k without one.

    Raises:
        UserError: the budget is smaller than a model of one expert's width.
    """
    if budget.parameters is None and budget.bytes is None:
        return source.dims.active
    most, which = (budget.parameters, 0) if budget.parameters is not None else (budget.bytes, 1)
    assert most is not None, "one of the two is given"
    fitting = [groups for groups in range(1, source.dims.experts + 1) if dense_size(source, groups)[which] <= most]
    if not fitting:
        least, what = dense_size(source, 1)[which], ("parameters", "bytes")[which]
        raise UserError(f"budget.{what}={most}", f"at least {least}: with FFNs as wide as one expert", "raise the budget")
    return fitting[-1]


def _experts(config: AutoConfig, source: MoeSource, reader: CheckpointReader, statistics: CalibratedStats, groups: int) -> list[Candidate]:
    """Of the grid; equal plans once, also those that differ only in what a refit solves."""
    grid = config.grid.model_copy(update={"groups": [groups], "refit": [None]})
    found = points(grid, source.dims.experts, groups)
    plans = make_plans(found, statistics, lambda layer: flat_weights(source, reader, layer))
    candidates = {}
    for refit in _first_refits(config):
        for point, plan in zip(found, plans, strict=True):
            marked = plan if refit is None else replace(plan, refit={"judged": True})  # so that the hash leaves scales out
            candidates.setdefault((repr(refit), marked.hash()), Candidate(point.name, plan, refit))
    return list(candidates.values())


def _neurons(config: AutoConfig, groups: int, working: Path) -> list[Candidate]:
    candidates: list[Candidate] = []
    for number, selector in enumerate(config.select):
        name = label(selectors.dump(selector))
        output = working / f"select-{number}"
        chosen = SelectConfig(
            source=config.source,
            statistics=config.statistics,
            output=str(output),
            groups=groups,
            pad_to=config.pad_to,
            select=selector,
            data=config.refit_data if selector.reads_text else None,
            device=config.device,
            memory_budget=config.memory_budget,
        )
        if not output.exists():
            select.run(chosen)
        plan = ConversionPlan.read(output / PLAN_FILE)
        candidates += [Candidate(f"neurons {name} G={groups}", plan, refit) for refit in _first_refits(config)]
    return candidates


def _first_refits(config: AutoConfig) -> list[RefitConfig | None]:
    """In parallel mode: one pass serves all candidates; those that differ in nothing else once."""
    found = [None if refit is None else refit.model_copy(update={"mode": "parallel"}) for refit in config.grid.refit]
    return list({repr(refit): refit for refit in found}.values())


@dataclass(frozen=True)
class _Search:
    """What a killed search keeps lies in `working`: solved layers, and every round that has ended."""

    config: AutoConfig
    bench: Bench
    working: Path
    modes: tuple[Mode, ...]
    blocks: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)

    def rounds(self, found: Sequence[Candidate]) -> tuple[Candidate, list[dict[str, Any]]]:
        """The best candidate, and what each round judged, best first."""
        rounds: list[dict[str, Any]] = []
        left = list(found)
        for number in range(self.config.halvings + 1):
            step = self.config.eta ** (self.config.halvings - number)
            if step == 1:
                left = _with_modes(left, self.modes)
            logger.info("round %d of %d: %d models to judge on 1/%d of the text", number + 1, self.config.halvings + 1, len(left), step)
            rounds.append(self._round(number, left, step))
            order = _ordered(rounds[-1], left)
            logger.info("round %d: %d models, the best %s", number + 1, len(order), order[0].called)
            left = order[: max(1, len(order) // self.config.eta)]
        if self.config.reconstruct is not None:
            left = [left[0], _reconstructed(left[0], self.config.reconstruct, self.modes[-1])]
            rounds[-1] = _together(rounds[-1], self._round(len(rounds), left[1:], 1))
            left = _ordered(rounds[-1], left)
        return left[0], rounds

    def _round(self, number: int, left: Sequence[Candidate], step: int) -> dict[str, Any]:
        path = self.working / f"round-{number}.json"
        if not path.exists():
            write_json(path, self._judged(left, step))
        return read_json(path, "a round of the search")

    def planned(self, candidate: Candidate, step: int) -> ConversionPlan:
        """With its refit on every `step`th window's worth of the calibration text."""
        if candidate.refit is None:
            return candidate.plan
        return replace(candidate.plan, refit=self._block(candidate.refit, step))

    def _block(self, refit: RefitConfig, step: int) -> dict[str, Any]:
        """The same for all candidates of a round with this refit."""
        name = repr(refit)
        if (name, step) not in self.blocks:
            data = self.config.refit_data
            if step > 1:
                whole = len(windows(data, self.bench.source.dims))
                data = TokensConfig(**{**data.model_dump(), "sequences": max(2, whole // step)})
            self.blocks[name, step] = block(refit, data, self.bench.source, Ranks())
        return self.blocks[name, step]

    def clean(self) -> None:
        """Leave plan.json and the report alone."""
        for path in self.working.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name.startswith("round-"):
                path.unlink()

    def _judged(self, candidates: Sequence[Candidate], step: int) -> dict[str, Any]:
        bench = self.bench.every(step)
        state_bytes = bench.teacher_NSD.numel() * bench.teacher_NSD.element_size()
        at_once = max(1, self.config.memory_budget // state_bytes - 2)
        plans = [self.planned(candidate, step) for candidate in candidates]
        rows: list[dict[str, Any]] = []
        for start in range(0, len(plans), at_once):
            part = plans[start : start + at_once]
            teacher, found = bench.evaluate(part)
            for candidate, plan, measured in zip(candidates[start:], part, found, strict=False):
                metrics = {"kl": measured.kl, "nll": measured.nll, "perplexity": measured.perplexity}
                rows.append({"model": candidate.called, "plan_hash": plan.hash(), **metrics, "teacher_nll": teacher.nll})
            bench.forget(part)
        models = sorted(rows, key=lambda row: row["kl"])
        return {"windows": len(bench.windows_NS), "model_windows": len(plans) * len(bench.windows_NS), "models": models}


def _ordered(judged: dict[str, Any], candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those candidates, as a round ordered them."""
    by_name = {candidate.called: candidate for candidate in candidates}
    return [by_name[row["model"]] for row in judged["models"] if row["model"] in by_name]


def _together(*rounds: dict[str, Any]) -> dict[str, Any]:
    """One round of rounds on the same windows."""
    models = sorted((row for each in rounds for row in each["models"]), key=lambda row: row["kl"])
    return {**rounds[0], "model_windows": sum(each["model_windows"] for each in rounds), "models": models}


def _reconstructed(candidate: Candidate, settings: ReconstructConfig, mode: Mode) -> Candidate:
    """From its refit, or one with the defaults where it has none."""
    refit = candidate.refit or RefitConfig()
    return replace(candidate, refit=refit.model_copy(update={"mode": mode, "reconstruct": settings}))


def _with_modes(candidates: Sequence[Candidate], modes: tuple[Mode, ...]) -> list[Candidate]:
    """Every one with its refit in all of these modes."""
    both = []
    for candidate in candidates:
        refits = [candidate.refit.model_copy(update={"mode": mode}) for mode in modes if candidate.refit is not None]
        both += [replace(candidate, refit=refit) for refit in refits] or [candidate]
    return list({candidate.called: candidate for candidate in both}.values())


def rounds_table(report: dict[str, Any]) -> str:
    """The best models of the last round, with what the rounds before said of them, and what the search cost."""
    rounds, said = report["rounds"], report["model_windows"]
    last = rounds[-1]["models"]
    earlier = [{row["model"]: row["kl"] for row in each["models"]} for each in rounds[:-1]]
    header = ["model", *(f"KL on {each['windows']} windows" for each in rounds), "perplexity"]
    rows = [[row["model"], *(found.get(row["model"]) for found in earlier), row["kl"], row["perplexity"]] for row in last[:_SHOWN]]
    cost = ", ".join(f"{len(each['models'])} models on {each['windows']} windows" for each in rounds)
    share = said["spent"] / said["all"]
    return (
        f"{report['candidates']} candidates of {report['parameters']:,} parameters: {cost}; {share:.0%} of judging each on all\n\n"
        + render(header, rows)
    )


def dry_run(config: AutoConfig) -> dict[str, Any]:
    """Width, size and the rounds; plans of experts are really made."""
    source, statistics = MoeSource.open(config.source, pad_to=config.pad_to), CalibratedStats.open(config.statistics)
    require_same_source(f"{config.statistics}: statistics", statistics.source, source)
    windows_NS, _, allowed = _judged_on(config, source)
    groups = groups_of(config.budget, source)
    with CheckpointReader(source.index) as reader:
        candidates = len(_experts(config, source, reader, statistics, groups)) + len(config.select) * len(config.grid.refit)
    held_out, rounds, left = len(windows_NS), [], candidates
    for number in range(config.halvings + 1):
        rounds.append({"models": left, "windows": -(-held_out // config.eta ** (config.halvings - number))})
        left = max(1, left // config.eta)
    modes = len(allowed) if any(config.grid.refit) else 1  # at most: of those left, some may have no refit
    rounds[-1]["models"] = rounds[-1]["models"] * modes + (config.reconstruct is not None)
    return {
        "source": source.facts(),
        "groups": groups,
        "parameters": dense_size(source, groups)[0],
        "padding": dataclasses.asdict(padding(source, groups)),
        "candidates": candidates,
        "rounds": rounds,
        "reads": {str(source.index.directory): source.index.nbytes},
        "writes": [f"{config.output}/{PLAN_FILE}", f"{config.output}/{REPORT}"],
    }
