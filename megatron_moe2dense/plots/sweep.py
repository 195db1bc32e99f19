"""Figures of a sweep's records: score x group heat maps for each K and scaling, curves over K, size against perplexity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_moe2dense.common.label import label
from megatron_moe2dense.plots.style import FAINT, HEAT, INK, KEPT, PALETTE, log_axis, new_figure, readable_on, short

Row = Mapping[str, Any]
AXES = ("keep", "score", "group", "scale")


def is_sweep(row: Row) -> bool:
    """Whether a record is one configuration of a sweep."""
    config = row.get("config")
    return "point" in row and isinstance(config, Mapping) and set(AXES) <= set(config)


def axis_value(row: Row, axis: str) -> str:
    """A row's place on an axis: a number, or a method with the options that are set."""
    block = row["config"].get(axis)
    return label(block) if block is None or isinstance(block, Mapping) else str(block)


def _panel(row: Row) -> str:
    """Scaling, and the refit where there is one."""
    refit = axis_value(row, "refit")
    return axis_value(row, "scale") + (f", {refit}" if refit != "none" else "")


def _values(rows: Sequence[Row], axis: str) -> list[str]:
    # In the order of the grid: several processes write their rows as they come.
    found = list(dict.fromkeys(axis_value(row, axis) for row in sorted(rows, key=lambda row: row["point"])))
    return sorted(found, key=int) if axis == "keep" else found


def heat_maps(rows: Sequence[Row]) -> Figure:
    """KL to the teacher of score x group, a panel for every scaling and refit (rows) and K (columns), one colour scale; the mean where
    several numbers of groups share a cell, a cross where a configuration is not recorded."""
    keeps, scores, groups = (_values(rows, axis) for axis in ("keep", "score", "group"))
    scales = list(dict.fromkeys(_panel(row) for row in sorted(rows, key=lambda row: row["point"])))
    figure = new_figure(1.8 + 2.3 * len(keeps), 1.4 + 2.6 * len(scales))
    panels = figure.subplots(len(scales), len(keeps), squeeze=False, sharex=True, sharey=True)
    all_kl = [row["metrics"]["kl"] for row in rows]
    image = None
    for i, scale in enumerate(scales):
        for j, keep in enumerate(keeps):
            inside = [row for row in rows if (_panel(row), axis_value(row, "keep")) == (scale, keep)]
            table_SG = _means(inside, scores, groups)
            axes = panels[i][j]
            image = axes.imshow(table_SG, cmap=HEAT + "_r", vmin=min(all_kl), vmax=max(all_kl), aspect="auto")
            for s, g in zip(*np.nonzero(np.isnan(table_SG)), strict=True):
                axes.annotate("x", (g, s), ha="center", va="center", color=FAINT)
            if not np.isnan(table_SG).all():
                s, g = np.unravel_index(np.nanargmin(table_SG), table_SG.shape)
                colour = readable_on(image.cmap(image.norm(table_SG[s, g])))
                axes.annotate(short(float(table_SG[s, g])), (int(g), int(s)), ha="center", va="center", color=colour, fontsize=8)
            axes.set_title(f"K = {keep}, {scale}", fontsize=10)
            axes.set_xticks(range(len(groups)), groups, rotation=60, ha="right", fontsize=9)
            axes.set_yticks(range(len(scores)), scores, fontsize=9)
    assert image is not None, "records are there"
    figure.colorbar(image, ax=panels, label="KL(teacher || model) [nats], best of a panel written out", shrink=0.8)
    return figure


def _means(rows: Sequence[Row], scores: Sequence[str], groups: Sequence[str]) -> np.ndarray:
    """[scores, groups], NaN where nothing is recorded."""
    cells: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        cells.setdefault((axis_value(row, "score"), axis_value(row, "group")), []).append(row["metrics"]["kl"])
    return np.array([[np.mean(cells[s, g]) if (s, g) in cells else np.nan for g in groups] for s in scores])


def keep_curves(rows: Sequence[Row]) -> Figure:
    """KL over K, a line a method with the spread (lowest to highest) of everything else: a panel each for scoring, grouping, scaling, and
    for the refit where there are several."""
    names = {"score": "scoring", "group": "grouping", "scale": "scaling"}
    if len(_values(rows, "refit")) > 1:
        names["refit"] = "refit"
    figure = new_figure(0.5 + 4 * len(names), 4.2)
    panels = figure.subplots(1, len(names), sharey=True)
    keeps = _values(rows, "keep")
    for axes, (axis, title) in zip(panels, names.items(), strict=True):
        for number, value in enumerate(_values(rows, axis)):
            _curve(axes, keeps, [row for row in rows if axis_value(row, axis) == value], (value, PALETTE[number % len(PALETTE)]))
        axes.set_title(title)
        axes.set_xticks(range(len(keeps)), keeps)
        axes.set_xlabel("experts kept, K")
        axes.grid(True, axis="y")
        axes.legend(fontsize=8)
    panels[0].set_ylabel("KL(teacher || model) [nats]\nmean, lowest to highest shaded")
    return figure


def _curve(axes: Axes, keeps: Sequence[str], rows: Sequence[Row], look: tuple[str, str]) -> None:
    found = {keep: [row["metrics"]["kl"] for row in rows if axis_value(row, "keep") == keep] for keep in keeps}
    places = [place for place, keep in enumerate(keeps) if found[keep]]
    values = [found[keeps[place]] for place in places]
    axes.plot(places, [float(np.mean(v)) for v in values], marker="o", markersize=4, color=look[1], label=look[0])
    axes.fill_between(places, [min(v) for v in values], [max(v) for v in values], color=look[1], alpha=0.1, linewidth=0)


def size_front(rows: Sequence[Row]) -> Figure:
    """Parameters against perplexity of all distinct models; those that no other one beats in both are joined."""
    figure = new_figure(7, 4.6)
    axes = figure.subplots()
    points = sorted((row["parameters"], row["metrics"]["perplexity"], str(row["model"])) for row in rows if "same_plan_as" not in row)
    front = [p for i, p in enumerate(points) if all(p[1] < other[1] for other in points[:i])]
    axes.scatter([p[0] for p in points], [p[1] for p in points], color=PALETTE[0], s=14, alpha=0.5, label="configurations")
    axes.step([p[0] for p in front], [p[1] for p in front], where="post", color=KEPT, label="Pareto front")
    axes.scatter([p[0] for p in front], [p[1] for p in front], color=KEPT, s=24, zorder=3)
    for size, perplexity, name in front:
        axes.annotate(
            f"{name}: {short(perplexity)}", (size, perplexity), xytext=(5, -10), textcoords="offset points", fontsize=8, color=INK
        )
    axes.axhline(rows[0]["teacher"]["perplexity"], color=INK, linestyle="--", linewidth=1.2, label="teacher")
    log_axis(axes)
    axes.xaxis.set_major_formatter(lambda value, _place: short(value))
    axes.margins(x=0.15)
    axes.set_xlabel("parameters")
    axes.set_ylabel("perplexity, held out")
    axes.grid(True)
    axes.legend(loc="upper right")
    return figure


FIGURES: dict[str, Callable[[Sequence[Row]], Figure]] = {
    "sweep_heat_maps": heat_maps,
    "sweep_keep_curves": keep_curves,
    "sweep_size_front": size_front,
}
