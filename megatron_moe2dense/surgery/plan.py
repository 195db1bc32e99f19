"""Statistics and methods to a ConversionPlan, and plan.json. No torch: a plan is made and read without weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import read_json, write_json
from megatron_moe2dense.surgery.grouping import groupers
from megatron_moe2dense.surgery.scaling import scalers
from megatron_moe2dense.surgery.scoring import scorers
from megatron_moe2dense.surgery.stats import CalibratedStats, LayerStats
from megatron_moe2dense.surgery.types import Align, FlatWeights, Grouper, Grouping, LayerPlan, NeuronPlan, Scaler, Scorer, Selection

FORMAT = 1
ROUTED_FACTOR = "routed_factor"  # of a source, in statistics and plans


@dataclass(frozen=True)
class Methods:
    """Everything that decides a plan. grouper: None exactly when keep == groups ("pure pruning")."""

    keep: int
    groups: int
    scorer: Scorer
    grouper: Grouper | None
    scaler: Scaler

    def __post_init__(self):
        if self.keep < self.groups:
            raise UserError(
                f"keep={self.keep}, groups={self.groups}", "keep >= groups: no group may be empty", "raise keep or lower groups"
            )
        if self.keep == self.groups and self.grouper is not None:
            raise UserError(
                f"a group block with keep == groups == {self.keep}",
                "no group block: each kept expert is a group of its own, so a grouping method would have no effect",
                "drop the group block, or keep more experts than groups",
            )
        if self.keep > self.groups and self.grouper is None:
            expected = f"a group block, e.g. group.method={next(iter(groupers))}"
            raise UserError(f"keep={self.keep} experts for groups={self.groups}, no group block", expected, "add one, or set keep = groups")

    def needs(self) -> set[str]:
        """The statistics that all methods together read."""
        return {*self.scorer.needs(), *self.scaler.needs(), *(self.grouper.needs() if self.grouper else ())}


@dataclass(frozen=True)
class ConversionPlan:
    """What a whole model becomes; plan.json. source: path and fingerprint of the MoE. score, group, scale: the method blocks, or in their
    place select, where neurons are chosen (keep is groups then); refit: see `refit.planned`."""

    source: dict[str, Any]
    family: str
    keep: int
    groups: int
    score: dict[str, Any] | None
    group: dict[str, Any] | None
    scale: dict[str, Any] | None
    layers: tuple[LayerPlan | NeuronPlan, ...]
    select: dict[str, Any] | None = None
    refit: dict[str, Any] | None = None

    @property
    def neurons(self) -> int | None:
        """Of each layer's experts, where they are chosen one by one."""
        return next((len(layer.neurons) for layer in self.layers if isinstance(layer, NeuronPlan)), None)

    def hash(self) -> str:
        """Names the resulting model: two plans of one source with equal layers give the same bytes, by whatever methods; what a refit
        solves does not depend on scales."""
        solved = {"scale", "scales"} if self.refit is not None else set()
        layers = [{name: value for name, value in _written(layer).items() if name not in solved} for layer in self.layers]
        content: list[Any] = [self.source["fingerprint"], layers]
        if self.refit is not None:
            content.append({name: value for name, value in self.refit.items() if name != "data"})  # the text's hash counts, not its place
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def write(self, path: Path) -> None:
        """Write plan.json."""
        content = dataclasses.asdict(self)
        unused = [name for name in ("select", "refit") if content[name] is None]
        content["layers"] = [_written(layer) for layer in self.layers]
        write_json(path, {"format": FORMAT, **{name: value for name, value in content.items() if name not in unused}})

    @classmethod
    def read(cls, path: Path) -> ConversionPlan:
        """Read a plan.json; UserError when it is none, or its layers do not hold together."""
        expected = "a plan.json that `moe2dense convert` or `select` wrote"
        data = read_json(path, expected)
        try:
            found = data.pop("format")
            _hold(found == FORMAT, f"format {found!r}, this version reads {FORMAT}")
            layers = tuple(_read_layer(row) for row in data.pop("layers"))
            plan = cls(**data, layers=layers)
            for layer in layers:
                _check_layer(layer, plan.keep, plan.groups)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: {type(error).__name__} {error}".rstrip(), expected, "make the plan again") from None
        return plan


def _written(layer: LayerPlan | NeuronPlan) -> dict[str, Any]:
    """Without the scale of inputs where the family has none."""
    return {name: value for name, value in dataclasses.asdict(layer).items() if name != "input_scale" or value != 1.0}


def _read_layer(row: dict[str, Any]) -> LayerPlan | NeuronPlan:
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    return NeuronPlan(**fields) if "neurons" in fields else LayerPlan(**fields)


def _check_layer(layer: LayerPlan | NeuronPlan, keep: int, groups: int) -> None:
    if isinstance(layer, NeuronPlan):
        chosen = set(zip(layer.experts, layer.neurons, strict=True))
        _hold(len(chosen) == len(layer.neurons), f"layer {layer.layer} has a neuron twice")
        _hold(len(chosen) >= groups, f"layer {layer.layer}: {len(chosen)} neurons are no {groups} experts' worth")
        return
    _hold(len(set(layer.experts)) == keep, f"layer {layer.layer} does not keep {keep} distinct experts")
    entries = {len(layer.experts), len(layer.group_of), len(layer.merge_weights)}
    _hold(entries == {keep}, f"layer {layer.layer}: experts, group_of and merge_weights need {keep} entries")
    _hold(set(layer.group_of) == set(range(groups)), f"layer {layer.layer}: groups are not 0..{groups - 1}")
    _hold(len(layer.scales) == groups, f"layer {layer.layer}: {groups} scales are needed")
    _hold(layer.align in get_args(Align), f"layer {layer.layer}: align is {layer.align!r}")


def _hold(condition: bool, otherwise: str) -> None:
    """ValueError unless what a file says holds together: asserts are for our own invariants, and `python -O` leaves them out."""
    if not condition:
        raise ValueError(otherwise)


def plan_layer(layer: int, stats: LayerStats, methods: Methods, weights: FlatWeights) -> LayerPlan:
    """Select, group, weigh and scale the experts of one layer."""
    selection = methods.scorer.select(stats, methods.keep)
    return scaled_layer(layer, stats, selection, group_layer(stats, methods, selection, weights), methods)


def group_layer(stats: LayerStats, methods: Methods, selection: Selection, weights: FlatWeights) -> Grouping:
    """The groups of the kept experts, numbered by their best expert; each expert its own without a grouping method."""
    if methods.grouper is None:
        return Grouping(np.arange(methods.keep), methods.groups)
    return _best_first(methods.grouper.group(selection, weights, stats, methods.groups))


def scaled_layer(layer: int, stats: LayerStats, selection: Selection, grouping: Grouping, methods: Methods) -> LayerPlan:
    """The plan of a layer from a selection and groups that are made already (plans of a sweep share them)."""
    scales_G = methods.scaler.scales(selection, grouping, stats)
    return LayerPlan(
        layer=layer,
        experts=tuple(selection.experts_K.tolist()),
        group_of=tuple(grouping.group_of_K.tolist()),
        merge_weights=tuple(merge_weights(selection, grouping).tolist()),
        scales=tuple(scales_G.tolist()),
        shared_scale=shared_scale(stats),
        align="none" if methods.grouper is None else methods.grouper.align,
        input_scale=input_scale(stats),
    )


def shared_scale(stats: LayerStats) -> float:
    """The factor of the shared experts: 1, or, for a sigmoid gate h(t) of their own, the constant a that minimises
    sum_t ||h(t) s(t) - a s(t)||^2 = sum_t (h(t) - a)^2 ||s(t)||^2 (ours)."""
    if "shared_square_sum" not in stats.sums:
        return 1.0
    gated, total = float(stats["shared_gated_square_sum"][0]), float(stats["shared_square_sum"][0])
    return gated / total if total > 0 else 1.0


def input_scale(stats: LayerStats) -> float:
    """What multiplies the input of the slices: 1, or, where a gate does so in the MoE, its mean over the tokens (ours)."""
    return float(stats["input_gate_sum"][0]) / stats.tokens if "input_gate_sum" in stats.sums else 1.0


def _best_first(grouping: Grouping) -> Grouping:
    """Renumber groups by their best expert, so that equal partitions give equal plans."""
    _, first, inverse_K = np.unique(grouping.group_of_K, return_index=True, return_inverse=True)
    assert len(first) == grouping.groups, "a grouping method left a group empty"
    return Grouping(np.argsort(np.argsort(first))[inverse_K], grouping.groups)


def merge_weights(selection: Selection, grouping: Grouping) -> np.ndarray:
    """w_K = s_e / sum of s over the expert's group (paper); a plain mean where all scores of a group are 0."""
    scores_K = selection.scores_E[selection.experts_K]
    total_G = np.bincount(grouping.group_of_K, weights=scores_K, minlength=grouping.groups)
    size_G = np.bincount(grouping.group_of_K, minlength=grouping.groups)
    total_K, size_K = total_G[grouping.group_of_K], size_G[grouping.group_of_K]
    return np.where(total_K > 0, scores_K / np.where(total_K > 0, total_K, 1.0), 1.0 / size_K)


def make_plan(statistics: CalibratedStats, methods: Methods, weights: Callable[[int], FlatWeights]) -> ConversionPlan:
    """The plan of a whole model. weights: layer number -> reader of that layer's experts, for methods that look at them.

    Raises:
        UserError: a statistic the methods need was not collected; keep beyond the number of experts.
    """
    statistics.require(methods.needs())
    return whole_plan(statistics, methods, [plan_layer(i, stats, methods, weights(i)) for i, stats in statistics.layers.items()])


def whole_plan(statistics: CalibratedStats, methods: Methods, layers: Iterable[LayerPlan]) -> ConversionPlan:
    """The plan of a whole model from those of its layers."""
    return ConversionPlan(
        source={name: statistics.source[name] for name in ("path", "fingerprint", ROUTED_FACTOR) if name in statistics.source},
        family=statistics.source["family"],
        keep=methods.keep,
        groups=methods.groups,
        score=scorers.dump(methods.scorer),
        group=groupers.dump(methods.grouper) if methods.grouper else None,
        scale=scalers.dump(methods.scaler),
        layers=tuple(layers),
    )
