"""Which experts a layer uses and keeps: sorted scores and the map of token shares (ranking.json), the plan (plan.json)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_moe2dense.plots.style import DROPPED, FAINT, HEAT, KEPT, new_figure, number_ticks

Ranking = Mapping[str, Any]


def expert_scores(ranking: Ranking) -> Figure:
    """One panel a layer: the scores of all experts, largest first, kept ones coloured.

    A set method (D-optimal) may keep an expert of lower score; the colour shows it.
    """
    layers, method = ranking["layers"], ranking["score"]["method"]
    columns = min(len(layers), 4 if len(layers) <= 16 else 8)
    rows = math.ceil(len(layers) / columns)
    big = len(layers) <= 16
    figure = new_figure(max(7.0, (3.0 if big else 1.9) * columns), 1.1 + (2.4 if big else 1.45) * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axes, layer in zip(panels.flat, layers, strict=False):
        _score_panel(axes, layer, small=not big)
    for axes in list(panels.flat)[len(layers) :]:
        axes.set_visible(False)
    figure.supxlabel("expert, sorted by score [rank]", fontsize=11)
    figure.supylabel(f"score ({method})", fontsize=11)
    handles = [Patch(color=KEPT, label=f"kept ({ranking['keep']})"), Patch(color=DROPPED, label="left out")]
    figure.legend(handles=handles, loc="outside upper right", ncols=2)
    return figure


def _score_panel(axes: Axes, layer: Mapping[str, Any], small: bool) -> None:
    scores = np.asarray(layer["scores"], float)
    order, kept = np.argsort(-scores, kind="stable"), set(layer["experts"])
    axes.bar(np.arange(len(order)), scores[order], width=1.0 if small else 0.85, color=[KEPT if e in kept else DROPPED for e in order])
    axes.set_title(f"layer {layer['layer']}", fontsize=9 if small else 11, pad=3)
    axes.tick_params(labelsize=7 if small else 9)
    axes.yaxis.get_major_locator().set_params(nbins=4)  # type: ignore[attr-defined]
    axes.ticklabel_format(axis="y", scilimits=(-2, 3))
    axes.yaxis.get_offset_text().set_fontsize(7 if small else 9)
    number_ticks(axes, len(order), "x", at_most=4)


def share_map(shares: Mapping[int, np.ndarray], kept: Mapping[int, Sequence[int]]) -> Figure:
    """Heat map [layer, expert] of the share of tokens that select an expert, in percent; kept experts get a ring.

    Args:
        shares: by layer number, [E], fractions of the layer's tokens. kept: expert numbers by layer; may be empty.
    """
    numbers = sorted(shares)
    percent_LE = 100 * np.stack([np.asarray(shares[i], float) for i in numbers])
    figure, axes = _map_axes(*percent_LE.shape)
    image = axes.imshow(percent_LE, aspect="auto", cmap=HEAT, interpolation="nearest", vmin=0)
    figure.colorbar(image, ax=axes, label="tokens that select the expert [%]", pad=0.01)
    _label_layers(axes, numbers)
    if kept:
        points = [(expert, row) for row, i in enumerate(numbers) for expert in kept.get(i, ())]
        size = 90 if percent_LE.shape[1] <= 40 else 14
        axes.scatter(
            *zip(*points, strict=True), s=size, facecolors="none", edgecolors=KEPT, linewidths=2.2 if size > 20 else 1.4, label="kept"
        )
        figure.legend(loc="outside upper right")
    axes.set_title("Use of experts")
    return figure


def plan_map(plan: Mapping[str, Any]) -> Figure:
    """Map [layer, expert] of a conversion plan: the weight of each kept expert inside its group (1: alone), left out: grey."""
    layers = plan["layers"]
    experts = 1 + max(expert for layer in layers for expert in layer["experts"])
    weights_LE = np.full((len(layers), experts), np.nan)
    for row, layer in enumerate(layers):
        weights_LE[row, layer["experts"]] = layer.get("merge_weights", [1.0] * len(layer["experts"]))
    figure, axes = _map_axes(*weights_LE.shape)
    axes.set_facecolor("#E9EBEF")
    image = axes.imshow(weights_LE, aspect="auto", cmap="viridis_r", interpolation="nearest", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="weight inside its group [fraction]", pad=0.01)
    _label_layers(axes, [layer["layer"] for layer in layers])
    figure.legend(handles=[Patch(color="#E9EBEF", label="left out")], loc="outside upper right")
    axes.set_title(f"Plan: {plan['keep']} experts kept in {plan['groups']} groups ({plan['score']['method']})")
    return figure


def _map_axes(layers: int, experts: int) -> tuple[Figure, Axes]:
    figure = new_figure(min(14.0, 3.5 + 0.24 * max(experts, 16)), 1.9 + (0.42 if layers <= 16 else 0.15) * layers)
    return figure, figure.subplots()


def _label_layers(axes: Axes, numbers: Sequence[int]) -> None:
    step = 1
    while len(numbers) / step > 25:
        step *= 2
    axes.set_yticks(range(0, len(numbers), step), [str(number) for number in numbers[::step]])
    number_ticks(axes, axes.get_images()[0].get_size()[1], "x")
    axes.set_xlabel("expert [number]")
    axes.set_ylabel("layer [number]")
    axes.tick_params(length=0, labelcolor="#222222", color=FAINT)
    for spine in axes.spines.values():
        spine.set_visible(False)
