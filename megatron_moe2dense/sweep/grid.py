"""The points of the grid and their plans: each selection is made once per layer and K, each grouping once per selection. No weights are
read but those that grouping methods look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.label import label
from megatron_moe2dense.surgery.config import RefitConfig
from megatron_moe2dense.surgery.grouping import groupers
from megatron_moe2dense.surgery.plan import ConversionPlan, Methods, group_layer, scaled_layer, whole_plan
from megatron_moe2dense.surgery.scaling import scalers
from megatron_moe2dense.surgery.scoring import scorers
from megatron_moe2dense.surgery.stats import CalibratedStats, LayerStats
from megatron_moe2dense.surgery.types import FlatWeights, LayerPlan
from megatron_moe2dense.sweep.config import GridConfig


@dataclass(frozen=True)
class Point:
    """One combination. number: its place in the grid. config: its blocks, that of group also where keep == groups and none is used."""

    number: int
    methods: Methods
    refit: RefitConfig | None
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """For tables: `do_acp K=16 G=8 anchor uniform`, and the refit behind it where there is one."""
        config = self.config
        name = f"{label(config['score'])} K={config['keep']} G={config['groups']} {label(config['group'])} {label(config['scale'])}"
        return name if self.refit is None else f"{name} {label(config['refit'])}"


def points(grid: GridConfig, experts: int, active: int) -> list[Point]:
    """All combinations, K outermost. experts, active: of the MoE's layers.

    Raises:
        UserError: keep beyond the number of experts, or no keep that is as large as a number of groups.
    """
    keeps = grid.keep or _doubled(active, experts)
    groups = grid.groups or [active]
    if max(keeps) > experts:
        raise UserError(f"grid.keep has {max(keeps)}", f"at most {experts}, the experts of a layer", "choose smaller ones")
    found: list[Point] = []
    for keep, slices, score, group, scale, refit in product(keeps, groups, grid.score, grid.group, grid.scale, grid.refit):
        if keep >= slices:
            methods = Methods(keep, slices, score, group if keep > slices else None, scale)
            blocks: dict[str, Any] = {"score": scorers.dump(score), "group": groupers.dump(group), "scale": scalers.dump(scale)}
            if refit is not None:
                blocks["refit"] = refit_block(refit)
            found.append(Point(len(found), methods, refit, {"keep": keep, "groups": slices, "refit": None, **blocks}))
    if not found:
        raise UserError(f"grid.keep={keeps}, groups={groups}", "some keep >= groups: no group may be empty", "raise keep or lower groups")
    return found


def refit_block(refit: RefitConfig) -> dict[str, Any]:
    """Its method, and of its settings those that are no defaults: for names."""
    return {"method": refit.method, **refit.model_dump(mode="json", exclude_defaults=True)}


def _doubled(active: int, experts: int) -> list[int]:
    """active, 2 active, 4 active, ... and no more than there are experts: 8, 16, 32, 64, 128 for the paper's Qwen3-30B-A3B."""
    found = [active]
    while 2 * found[-1] <= experts:
        found.append(2 * found[-1])
    return found


def make_plans(points_: list[Point], statistics: CalibratedStats, weights: Callable[[int], FlatWeights]) -> list[ConversionPlan]:
    """The plan of every point, equal to the one `convert` makes. weights: layer number to reader of its experts.

    Raises:
        UserError: a statistic that a method needs was not collected.
    """
    statistics.require({name for point in points_ for name in point.methods.needs()})
    by_layer = [_layer_plans(points_, layer, stats, weights(layer)) for layer, stats in statistics.layers.items()]
    return [whole_plan(statistics, point.methods, layers) for point, layers in zip(points_, zip(*by_layer, strict=True), strict=True)]


def _layer_plans(points_: list[Point], layer: int, stats: LayerStats, weights: FlatWeights) -> list[LayerPlan]:
    """One layer of every point. The experts' weights stay in memory until all groupings are made."""
    known = cache(weights)
    selections: dict[Any, Any] = {}
    groupings: dict[Any, Any] = {}
    plans = []
    for point in points_:
        methods, config = point.methods, point.config
        chosen = (repr(config["score"]), methods.keep)
        if chosen not in selections:
            selections[chosen] = methods.scorer.select(stats, methods.keep)
        joined = (chosen, methods.groups, None if methods.grouper is None else repr(config["group"]))
        if joined not in groupings:
            groupings[joined] = group_layer(stats, methods, selections[chosen], known)
        plans.append(scaled_layer(layer, stats, selections[chosen], groupings[joined], methods))
    return plans


def distinct(plans: list[ConversionPlan]) -> dict[str, list[int]]:
    """Plan hash to the numbers of its points, in the order of the grid: each is evaluated once."""
    found: dict[str, list[int]] = {}
    for number, plan in enumerate(plans):
        found.setdefault(plan.hash(), []).append(number)
    return found


def in_slice(hashes: list[str], part: tuple[int, int]) -> list[str]:
    """Part i of n of the distinct plans, every n-th one: disjoint, complete, the same in every process."""
    return hashes[part[0] - 1 :: part[1]]
