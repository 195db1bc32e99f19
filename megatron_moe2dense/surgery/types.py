"""What flows through the surgery, and the three seams (Scorer, Grouper, Scaler) that methods fill. No torch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatron_moe2dense.common.config import key
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.registry import Method
from megatron_moe2dense.surgery.stats import LayerStats

# expert number -> its weights [gate; up; down] flattened to one float32 vector, read when called
FlatWeights = Callable[[int], np.ndarray]
Align = Literal["none", "hungarian"]


@dataclass(frozen=True)
class Selection:
    """experts_K: the kept experts, best first. scores_E: the score of every expert, >= 0, higher is better."""

    experts_K: np.ndarray
    scores_E: np.ndarray


@dataclass(frozen=True)
class Grouping:
    """group_of_K: the group 0..groups-1 of each kept expert, in the order of Selection.experts_K; no group is empty."""

    group_of_K: np.ndarray
    groups: int


@dataclass(frozen=True)
class LayerPlan:
    """What one MoE layer becomes: kept experts best first [K], their groups [K], weights inside the group [K], the factor of
    each group's down projection [G] and that of the shared experts (no effect where the family has none); how neurons are
    aligned before a group is merged (no effect on a group of one); what multiplies the input of the slices, where gates do so in
    the MoE."""

    layer: int
    experts: tuple[int, ...]
    group_of: tuple[int, ...]
    merge_weights: tuple[float, ...]
    scales: tuple[float, ...]
    shared_scale: float = 1.0
    align: Align = "none"
    input_scale: float = 1.0

    @property
    def unscaled(self) -> tuple[Any, ...]:
        """What its slices depend on before they are scaled."""
        return self.experts, self.group_of, self.merge_weights, self.align, self.input_scale


@dataclass(frozen=True)
class NeuronPlan:
    """What one MoE layer becomes when its neurons are chosen one by one (ours): the chosen ones best first, by their expert [F] and
    their place in it [F]; the factors of their down columns, of the shared experts' down projection and of their input."""

    layer: int
    experts: tuple[int, ...]
    neurons: tuple[int, ...]
    scale: float
    shared_scale: float = 1.0
    input_scale: float = 1.0

    @property
    def scales(self) -> tuple[float, ...]:
        """The factor of each slice: one for each expert that neurons come from."""
        return (self.scale,) * len(set(self.experts))

    @property
    def unscaled(self) -> tuple[Any, ...]:
        """What its slices depend on before they are scaled."""
        return self.experts, self.neurons, self.input_scale


class Scorer(Method):
    """Ranks experts from the statistics of one layer (docs/method.md#scores-and-selection). Ties go to the lower expert number."""

    @abstractmethod
    def needs(self) -> tuple[str, ...]:
        """The statistics it reads, beyond `tokens`."""

    @abstractmethod
    def select(self, stats: LayerStats, keep: int) -> Selection:
        """The `keep` best of E experts."""


class PointwiseScorer(Scorer):
    """A scorer that judges each expert on its own: `scores` is all it defines."""

    @abstractmethod
    def scores(self, stats: LayerStats) -> np.ndarray:
        """scores_E, float64, >= 0."""

    def select(self, stats: LayerStats, keep: int) -> Selection:
        """The `keep` highest scores."""
        scores_E = self.scores(stats)
        check_keep(keep, len(scores_E))
        return Selection(np.argsort(-scores_E, kind="stable")[:keep], scores_E)


class Grouper(Method):
    """Joins K kept experts into G groups (docs/method.md#groups-merging-scaling). Deterministic; not called when K == G."""

    align: Align = key("none", "hungarian: match the neurons of a group's experts to those of its best one before they are merged")

    @abstractmethod
    def needs(self) -> tuple[str, ...]:
        """The statistics it reads, beyond `tokens`."""

    @abstractmethod
    def group(self, selection: Selection, weights: FlatWeights, stats: LayerStats, groups: int) -> Grouping:
        """`groups` non-empty groups of the kept experts."""


class Scaler(Method):
    """The factor alpha_g folded into each group's down projection (docs/method.md#groups-merging-scaling)."""

    @abstractmethod
    def needs(self) -> tuple[str, ...]:
        """The statistics it reads, beyond `tokens`."""

    @abstractmethod
    def scales(self, selection: Selection, grouping: Grouping, stats: LayerStats) -> np.ndarray:
        """scales_G, float64."""


def check_keep(keep: int, experts: int) -> None:
    """UserError when `keep` experts can not be chosen out of `experts`."""
    if not 1 <= keep <= experts:
        raise UserError(f"keep={keep}", f"1 to {experts}, the experts of a layer", "choose another keep")
