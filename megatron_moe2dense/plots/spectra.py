"""How different the experts of a layer are: eigenvalues and cosines of the gram (stats.safetensors), sorted scores (ranking.json)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import StrMethodFormatter
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from megatron_moe2dense.common.spectrum import effective_rank, eigenvalue_shares
from megatron_moe2dense.plots.style import HEAT, PALETTE, new_figure, number_ticks

_FLOOR = 1e-6  # share of the sum below which an eigenvalue is not drawn
_GREY = "#E9EBEF"


def gram_spectra(grams: Mapping[int, np.ndarray]) -> Figure:
    """Left, a line a layer: the eigenvalues of the gram, largest first, in percent of their sum. Right: each layer's effective rank.

    Args:
        grams: by layer number, [E, E]: inner products of the experts' outputs, summed over tokens.
    """
    numbers = sorted(grams)
    experts = len(grams[numbers[0]])
    figure = new_figure(11, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
    colours = _layer_colours(numbers)
    for number in numbers:
        shares = eigenvalue_shares(grams[number])
        shown = np.where(shares > _FLOOR, 100 * shares, np.nan)
        left.plot(np.arange(1, experts + 1), shown, color=colours.to_rgba(np.array(number)), linewidth=1.2)
    left.set_yscale("log")
    left.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    left.set_xlabel("eigenvalue, largest first [rank]")
    left.set_ylabel("share of their sum [%]")
    left.set_title("Eigenvalues of the experts' gram")
    left.grid(True)
    _layer_key(figure, left, colours, numbers)
    ranks = [effective_rank(grams[number]) for number in numbers]
    right.plot(range(len(numbers)), ranks, color=PALETTE[0], marker="o", markersize=4)
    _number_layers(right, numbers)
    right.set_ylim(0, 1.08 * max(ranks))
    right.set_ylabel(f"effective rank of all {experts} experts")
    right.set_title("Directions the experts span")
    right.grid(True)
    return figure


def score_spectra(ranking: Mapping[str, Any]) -> Figure:
    """A line a layer: the scores of all experts, largest first, relative to the layer's largest; a dot on each that is kept (a method that
    looks at sets need not keep the first)."""
    layers, method, keep = ranking["layers"], ranking["score"]["method"], ranking["keep"]
    figure = new_figure(7.5, 4.2)
    axes = figure.subplots()
    colours = _layer_colours([layer["layer"] for layer in layers])
    experts = len(layers[0]["scores"])
    for layer in layers:
        order = np.argsort(-np.asarray(layer["scores"], float), kind="stable")
        scores = np.asarray(layer["scores"], float)[order]
        relative = scores / scores[0] if scores[0] > 0 else scores
        axes.plot(np.arange(1, experts + 1), relative, color=colours.to_rgba(layer["layer"]), linewidth=1.2)
        kept = np.flatnonzero(np.isin(order, layer["experts"]))
        axes.plot(kept + 1, relative[kept], "o", color=colours.to_rgba(layer["layer"]), markersize=5, label="_kept")
    axes.set_ylim(0, 1.06)
    axes.set_xlabel("expert, sorted by score [rank]")
    axes.set_ylabel(f"score ({method}) [share of the layer's best]")
    axes.set_title(f"Scores of the experts; dots: the {keep} kept")
    axes.grid(True)
    _layer_key(figure, axes, colours, [layer["layer"] for layer in layers])
    return figure


def cosines(gram_EE: np.ndarray) -> np.ndarray:
    """[E, E]: cosine of every two experts' outputs; 0 towards an expert without output."""
    norm_E = np.sqrt(np.diag(gram_EE))
    product_EE = np.outer(norm_E, norm_E)
    return np.divide(gram_EE, product_EE, out=np.zeros_like(gram_EE), where=product_EE > 0)


def similarity_order(cosine_EE: np.ndarray) -> np.ndarray:
    """[E]: expert numbers so that similar experts stand together (leaves of an average-linkage tree on 1 - cosine)."""
    if len(cosine_EE) < 2:
        return np.arange(len(cosine_EE))
    distance_EE = np.maximum(1.0 - (cosine_EE + cosine_EE.T) / 2, 0.0)
    return leaves_list(linkage(squareform(distance_EE, checks=False), method="average", optimal_ordering=True))


def cosine_maps(grams: Mapping[int, np.ndarray]) -> Figure:
    """A map a layer [expert, expert] of the cosine between experts' outputs, similar experts side by side, the diagonal left out.

    One colour scale for all layers, wide enough for 99% of the values of every layer.
    """
    numbers = sorted(grams)
    experts, big = len(grams[numbers[0]]), len(numbers) <= 4
    columns = min(len(numbers), 2 if big else 4 if len(numbers) <= 16 else 8)
    rows = math.ceil(len(numbers) / columns)
    side = 4.0 if big else 2.6 if len(numbers) <= 16 else 1.75
    figure = new_figure(side * columns + 1.3, (side + 0.15) * rows + 0.5)
    panels = figure.subplots(rows, columns, squeeze=False)
    maps = {number: cosines(grams[number]) for number in numbers}
    limit = _limit(maps)
    image = None
    for number, axes in zip(numbers, panels.flat, strict=False):
        image = _cosine_panel(axes, maps[number], limit, labelled=big and experts <= 40)
        axes.set_title(f"layer {number}: mean{' cosine' * big} {_typical(maps[number]):.2f}", fontsize=11 if big else 8, pad=3)
    for axes in list(panels.flat)[len(numbers) :]:
        axes.set_visible(False)
    assert image is not None, "statistics have layers"
    figure.colorbar(image, ax=panels, label="cosine of two experts' outputs", pad=0.015, aspect=35, extend="both")
    label = "expert, similar ones side by side" + (" [number]" if big and experts <= 40 else "")
    figure.supxlabel(label, fontsize=11)
    figure.supylabel(label, fontsize=11)
    return figure


def _cosine_panel(axes: Axes, cosine_EE: np.ndarray, limit: float, labelled: bool) -> AxesImage:
    order = similarity_order(cosine_EE)
    shown_EE = cosine_EE[np.ix_(order, order)].copy()
    np.fill_diagonal(shown_EE, np.nan)
    axes.set_facecolor(_GREY)
    image = axes.imshow(shown_EE, cmap="PuOr_r", vmin=-limit, vmax=limit, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    if labelled:
        axes.set_xticks(range(len(order)), [str(expert) for expert in order], fontsize=6, rotation=90)
        axes.set_yticks(range(len(order)), [str(expert) for expert in order], fontsize=6)
        axes.tick_params(length=0, pad=1)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def _off_diagonal(cosine_EE: np.ndarray) -> np.ndarray:
    return cosine_EE[~np.eye(len(cosine_EE), dtype=bool)]


def _typical(cosine_EE: np.ndarray) -> float:
    values = _off_diagonal(cosine_EE)
    return float(values.mean()) if len(values) else 0.0


def _limit(maps: Mapping[int, np.ndarray]) -> float:
    """The end of the colour scale: the largest 99% quantile of |cosine| of a layer, rounded up to a tenth or a hundredth."""
    values = [_off_diagonal(cosine_EE) for cosine_EE in maps.values()]
    largest = max((float(np.quantile(np.abs(value), 0.99)) for value in values if len(value)), default=1.0)
    step = 0.1 if largest > 0.2 else 0.01
    return min(1.0, max(step, math.ceil(largest / step) * step))


def _layer_colours(numbers: list[int]) -> ScalarMappable:
    """Few layers: a colour each. Many: a scale from the first to the last."""
    count = len(numbers)
    # The yellow end of the scale is too light for lines on white.
    colours = ListedColormap(mpl.colormaps[HEAT](np.linspace(0, 0.88, 256 if count > 8 else count)))
    if count > 8:
        return ScalarMappable(Normalize(numbers[0], numbers[-1]), colours)
    return ScalarMappable(BoundaryNorm(_edges(numbers), count), colours)


def _edges(numbers: list[int]) -> list[float]:
    return [numbers[0] - 0.5, *(number + 0.5 for number in numbers)]


def _layer_key(figure: Figure, axes: Axes, colours: ScalarMappable, numbers: list[int]) -> None:
    bar = figure.colorbar(colours, ax=axes, label="layer [number]", pad=0.02)
    if len(numbers) <= 8:
        edges = _edges(numbers)
        bar.set_ticks([(a + b) / 2 for a, b in itertools.pairwise(edges)], labels=[str(number) for number in numbers])
    bar.ax.tick_params(which="both", length=0)


def _number_layers(axes: Axes, numbers: list[int]) -> None:
    number_ticks(axes, len(numbers), "x", at_most=13)
    axes.set_xticklabels([str(numbers[int(i)]) for i in axes.get_xticks()])
    axes.set_xlabel("layer [number]")
