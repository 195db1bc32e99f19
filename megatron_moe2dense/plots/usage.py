"""Expert use by kind of text: calibration statistics of the same model on several token sets, side by side (ours)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.plots.style import INK, PALETTE, new_figure, number_ticks

_LIMIT = 3  # the colours reach from 1/8 to 8 times uniform use


def relative_use(shares: Mapping[str, np.ndarray]) -> np.ndarray:
    """[kinds, E]: how often an expert is selected on a kind of text, times uniform use (1: used like the average expert)."""
    shares_NE = np.stack([np.asarray(share, float) for share in shares.values()])
    return shares_NE / shares_NE.mean(axis=1, keepdims=True)


def mutual_information(shares: Mapping[str, np.ndarray]) -> float:
    """I(kind; expert) in bits, every kind weighing the same: 0 when the use does not depend on the kind, at most
    log2(kinds) when a selected expert gives the kind away."""
    p_NE = relative_use(shares)
    p_NE = p_NE / p_NE.sum()
    independent = p_NE.sum(axis=1, keepdims=True) * p_NE.sum(axis=0, keepdims=True)
    used = p_NE > 0
    return max(0.0, float((p_NE[used] * np.log2(p_NE[used] / independent[used])).sum()))


def use_by_kind(kinds: Mapping[str, Mapping[int, np.ndarray]]) -> Figure:
    """A heat map [kind, expert] for every layer, experts ordered by the kind they prefer, with the layer's
    mutual information in bits.

    Args:
        kinds: by label of the token set, then layer number: share of tokens that select each expert, [E].

    Raises:
        UserError: statistics of models with other layers or experts.
    """
    numbers, experts = _common_shape(kinds)
    columns = 1 if len(numbers) <= 6 else 2 if len(numbers) <= 16 else 4
    small, rows = columns == 4, math.ceil(len(numbers) / columns)
    width = min(16.0, columns * (2.6 + 0.21 * experts)) if columns < 4 else 17.0
    figure = new_figure(max(8.0, width), 1.3 + rows * (0.62 + (0.16 if small else 0.27) * len(kinds)))
    panels = figure.subplots(rows, columns, squeeze=False)
    image = None
    for number, axes in zip(numbers, panels.flat, strict=False):
        shares = {kind: layers[number] for kind, layers in kinds.items()}
        image = _kind_panel(axes, number, shares, small)
    for i, axes in enumerate(panels.flat):
        axes.set_visible(i < len(numbers))
        if small and i % columns:
            axes.set_yticklabels([])
    assert image is not None, "statistics have layers"
    bar = figure.colorbar(image, ax=panels, label="use of the expert [times uniform]", pad=0.01, aspect=30, extend="both")
    bar.set_ticks(range(-_LIMIT, _LIMIT + 1), labels=[f"1/{2**-i}" if i < 0 else str(2**i) for i in range(-_LIMIT, _LIMIT + 1)])
    figure.supxlabel("expert, ordered by the kind of text that prefers it" + ("" if small else " [number]"), fontsize=11)
    return figure


def _kind_panel(axes: Axes, number: int, shares: Mapping[str, np.ndarray], small: bool) -> AxesImage:
    use_NE = relative_use(shares)
    preferred = use_NE.argmax(axis=0)
    order = np.lexsort((-use_NE.max(axis=0), preferred))
    with np.errstate(divide="ignore"):
        log_NE = np.clip(np.log2(use_NE[:, order]), -_LIMIT - 1, _LIMIT + 1)  # -inf, never used, shows as the lowest colour
    image = axes.imshow(log_NE, aspect="auto", cmap="PuOr_r", vmin=-_LIMIT, vmax=_LIMIT, interpolation="nearest")
    axes.set_yticks(range(len(shares)), list(shares), fontsize=7 if small else 10)
    if small or len(order) > 64:
        axes.set_xticks([])
    else:
        axes.set_xticks(range(len(order)), [str(expert) for expert in order], fontsize=8)
    axes.set_title(f"layer {number}: {mutual_information(shares):.3f} bits", fontsize=8 if small else 11, pad=3)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def specialisation(kinds: Mapping[str, Mapping[int, np.ndarray]]) -> Figure:
    """A bar a layer: the mutual information between kind of text and selected expert, with its ceiling in the label."""
    numbers, experts = _common_shape(kinds)
    bits = [mutual_information({kind: layers[number] for kind, layers in kinds.items()}) for number in numbers]
    figure = new_figure(max(6.0, min(12.0, 2.0 + 0.35 * len(numbers))), 3.4)
    axes = figure.subplots()
    axes.bar(range(len(numbers)), bits, color=PALETTE[0], width=0.7)
    number_ticks(axes, len(numbers), "x", at_most=25)
    axes.set_xticklabels([str(numbers[int(i)]) for i in axes.get_xticks()])
    if len(numbers) <= 12:
        for i, value in enumerate(bits):
            axes.annotate(f"{value:.3f}", (i, value), xytext=(0, 3), textcoords="offset points", ha="center", color=INK)
    axes.margins(x=0.02, y=0.15)
    axes.grid(True, axis="y")
    axes.set_xlabel("layer [number]")
    axes.set_ylabel("I(kind of text; expert) [bits]")
    ceiling = math.log2(min(len(kinds), experts))
    axes.set_title(f"Specialisation of experts (at most {ceiling:.2f} bits)")
    return figure


def _common_shape(kinds: Mapping[str, Mapping[int, np.ndarray]]) -> tuple[list[int], int]:
    shapes = {kind: {number: len(share) for number, share in layers.items()} for kind, layers in kinds.items()}
    first, reference = next(iter(shapes.items()))
    for kind, shape in shapes.items():
        if shape != reference:
            raise UserError(
                f"statistics {kind} and {first} have other layers or experts",
                "statistics of one model on several kinds of text",
                "calibrate the same model on each",
            )
    return sorted(reference), next(iter(reference.values()))
