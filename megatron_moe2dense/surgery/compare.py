"""How far scoring methods agree: the overlap of the sets they keep, averaged over layers. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_moe2dense.common.spectrum import effective_rank
from megatron_moe2dense.common.table import render
from megatron_moe2dense.surgery.scoring import METHODS, scorers
from megatron_moe2dense.surgery.stats import CalibratedStats, LayerStats
from megatron_moe2dense.surgery.types import Scorer


def compared_scorers(own: Scorer, compare: bool | list[str], statistics: CalibratedStats) -> tuple[dict[str, Scorer], list[str]]:
    """What to compare, by label, and what is left out because its statistics were not collected.

    Args:
        own: the ranking's own scorer, always among them. compare: True: the seven of docs/method.md#scores-and-selection
            that the statistics allow; a list of ids: exactly those.

    Raises:
        UserError: a listed method needs a statistic that was not collected.
    """
    if compare is False:
        return {}, []
    names = list(METHODS) if compare is True else list(compare)
    wanted = {label(scorer): scorer for scorer in [scorers[name]() for name in names]}
    collected = set.intersection(*(set(stats.sums) for stats in statistics.layers.values()))
    left_out = [name for name, scorer in wanted.items() if compare is True and not set(scorer.needs()) <= collected]
    found = {name: scorer for name, scorer in {**wanted, label(own): own}.items() if name not in left_out}
    statistics.require({name for scorer in found.values() for name in scorer.needs()})
    return found, left_out


def label(scorer: Scorer) -> str:
    """Its id, with the options that are not at their default: `d_optimal(importance=mp)`."""
    fields = type(scorer).model_fields
    options = [f"{name}={value}" for name, value in scorer.model_dump().items() if value != fields[name].get_default()]
    return scorer.method_name() + (f"({', '.join(options)})" if options else "")


def compare_methods(methods: Mapping[str, Scorer], statistics: CalibratedStats, keep: int) -> dict[str, Any]:
    """For every pair of methods the mean over layers of |intersection of the kept sets| / keep; for every method the mean effective
    rank of its sets and the mean share of the router's choices that fall on them (null without the statistic)."""
    layers = list(statistics.layers.values())
    kept = {name: [method.select(stats, keep).experts_K for stats in layers] for name, method in methods.items()}
    overlap = [
        [float(np.mean([len(np.intersect1d(*pair)) for pair in zip(a, b, strict=True)])) / keep for b in kept.values()]
        for a in kept.values()
    ]
    rank_of = {
        name: [set_effective_rank(stats, experts_K) for stats, experts_K in zip(layers, sets, strict=True)] for name, sets in kept.items()
    }
    share_of = {
        name: [routing_kept(stats, experts_K) for stats, experts_K in zip(layers, sets, strict=True)] for name, sets in kept.items()
    }
    return {
        "methods": list(methods),
        "overlap": overlap,
        "effective_rank": [_mean(values) for values in rank_of.values()],
        "routing_kept": [_mean(values) for values in share_of.values()],
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def set_effective_rank(stats: LayerStats, experts_K: np.ndarray) -> float | None:
    """Effective rank of the gram restricted to a set of experts; None without the gram."""
    gram_EE = stats.sums.get("gram")
    return None if gram_EE is None else effective_rank(gram_EE[np.ix_(experts_K, experts_K)])


def routing_kept(stats: LayerStats, experts_K: np.ndarray) -> float | None:
    """Share of the router's choices that fall on a set of experts, 0..1; None without selected_count."""
    count_E = stats.sums.get("selected_count")
    return None if count_E is None else float(count_E[experts_K].sum() / count_E.sum())


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """One row a method: its overlap with each, its effective rank and the share of choices it keeps."""
    rows = []
    for i, name in enumerate(comparison["methods"]):
        rank, share = comparison["effective_rank"][i], comparison["routing_kept"][i]
        facts = ["-" if rank is None else f"{rank:.2f}", "-" if share is None else f"{100 * share:.1f}"]
        rows.append([name, *(f"{value:.2f}" for value in comparison["overlap"][i]), *facts])
    return render(["overlap of kept sets", *comparison["methods"], "effective rank", "routing kept [%]"], rows)
