"""The picture of the README: MoE block -> kept experts -> dense FFN. `python -m studies.picture OUT`
writes OUT.svg and OUT.png (1200 x 420)."""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

from megatron_moe2dense.plots.style import INK, new_figure, save, style

_KEPT = {2: "#0072B2", 5: "#E8871E"}  # expert number -> its colour, in the order they are kept
_SOFT = {"#0072B2": "#D8EAF6", "#E8871E": "#FCE9D3"}
_GREY, _LINE, _PANEL, _MUTED = "#E7EAEE", "#B4BBC5", "#F7F8FA", "#6B7280"
_WIDTH, _HEIGHT = 1200, 420
_ALPHA = "\N{GREEK SMALL LETTER ALPHA}"


def draw_picture() -> Figure:
    """The three panels, on axes whose units are the pixels of the PNG."""
    figure = new_figure(_WIDTH / 150, _HEIGHT / 150)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, _WIDTH)
    axes.set_ylim(_HEIGHT, 0)
    axes.axis("off")
    _moe_block(axes)
    _kept_experts(axes)
    _dense_ffn(axes)
    _stage(axes, 452, "select", "score experts\non calibration\ntext")
    _stage(axes, 778, "join", f"stack gate\nand up, scale\ndown by {_ALPHA}")
    return figure


def _box(axes: Axes, place: tuple[float, float, float, float], colours: tuple[str, str], line: float = 0.8, radius: float = 6) -> None:
    """A rounded box at (x, y, width, height); colours: (face, edge)."""
    x, y, width, height = place
    shape = f"round,pad=0,rounding_size={radius}"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=colours[0], edgecolor=colours[1], linewidth=line))


def _text(axes: Axes, x: float, y: float, text: str, size: float = 6.6, **options: object) -> None:
    axes.text(x, y, text, fontsize=size, **{"ha": "center", "va": "center", "color": INK, **options})  # type: ignore[arg-type]


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = _MUTED, line: float = 0.9) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=6, color=colour, linewidth=line, shrinkA=0, shrinkB=0))


def _panel(axes: Axes, x: float, width: float, title: str, note: str) -> None:
    _box(axes, (x, 20, width, 380), (_PANEL, "#E3E6EB"), radius=12)
    _text(axes, x + width / 2, 44, title, 8.6, weight="bold")
    _text(axes, x + width / 2, 381, note, 6.2, color=_MUTED)


def _stage(axes: Axes, x: float, verb: str, what: str) -> None:
    axes.add_patch(
        Polygon([(x - 30, 196), (x + 12, 196), (x + 12, 184), (x + 34, 208), (x + 12, 232), (x + 12, 220), (x - 30, 220)], color=INK)
    )
    _text(axes, x - 4, 208.5, verb, 6.4, color="white", weight="bold")
    _text(axes, x + 2, 252, what, 5.6, color=_MUTED, va="top", linespacing=1.3)


def _moe_block(axes: Axes) -> None:
    _panel(axes, 20, 376, "MoE block", "8 experts, the router runs 2 for each token")
    middle = 208.0
    _box(axes, (148, 68, 120, 30), ("white", _LINE))
    _text(axes, middle, 83, "router", weight="bold")
    _text(axes, 62, 83, "token x", 6.4, color=_MUTED)
    _arrow(axes, (92, 83), (147, 83))
    for number in range(8):
        x = 46 + 41.5 * number
        colour = _KEPT.get(number)
        _arrow(axes, (middle, 98), (x + 16.5, 139), colour or "#D3D8DF", 1.6 if colour else 0.6)
        _expert(axes, x, 142, colour, number)
        _arrow(axes, (x + 16.5, 270), (middle + (x + 16.5 - middle) * 0.08, 314), colour or "#D3D8DF", 1.6 if colour else 0.6)
    _box(axes, (132, 316, 152, 34), ("white", _LINE))
    _text(axes, middle, 333, "Σ weight · expert(x)")


def _expert(axes: Axes, x: float, y: float, colour: str | None, number: int) -> None:
    _box(axes, (x, y, 33, 126), (_SOFT[colour], colour) if colour else (_GREY, _LINE), 1.4 if colour else 0.6)
    for row in range(3):  # gate, up, down
        axes.add_patch(Rectangle((x + 6, y + 10 + 28 * row), 21, 20, facecolor=colour or "#CDD3DB", edgecolor="none"))
    _text(axes, x + 16.5, y + 110, f"E{number}", 6.6, weight="bold" if colour else "normal", color=colour or _MUTED)


def _kept_experts(axes: Axes) -> None:
    _panel(axes, 510, 206, "Kept experts", "2 of 8 kept in this layer")
    for i, (number, colour) in enumerate(_KEPT.items()):
        x = 532 + 88 * i
        _box(axes, (x, 76, 74, 270), (_SOFT[colour], colour), 1.4)
        for row, name in enumerate(("gate", "up", "down")):
            axes.add_patch(Rectangle((x + 11, 92 + 72 * row), 52, 56, facecolor=colour, edgecolor="none"))
            _text(axes, x + 37, 120 + 72 * row, name, 6.6, color="white", weight="bold")
        _text(axes, x + 37, 326, f"E{number}", 7.6, weight="bold", color=colour)


def _dense_ffn(axes: Axes) -> None:
    _panel(axes, 838, 342, "Dense FFN", "one wide FFN, no router")
    middle = 1009.0
    _text(axes, middle, 68, "token x", 6.2, color=_MUTED)
    for left, name in ((866, "gate"), (1020, "up")):
        _arrow(axes, (middle, 77), (left + 66, 98))
        _slices(axes, (left, 100, 132, 62), ["", ""])
        _text(axes, left + 66, 174, name, 6.6, weight="bold")
        _arrow(axes, (left + 66, 183), (middle + (-14 if left < middle - 66 else 14), 206))
    _box(axes, (middle - 70, 200, 140, 28), ("white", _LINE))
    _text(axes, middle, 214.5, "act(gate x) · (up x)", 6.2)
    _arrow(axes, (middle - 10, 228), (middle - 10, 250))
    _slices(axes, (middle - 120, 252, 220, 54), [_ALPHA, _ALPHA])
    _text(axes, middle + 112, 279, "down", 6.6, weight="bold", ha="left")
    _arrow(axes, (middle - 10, 306), (middle - 10, 332))
    _text(axes, middle - 10, 343, "y ≈ MoE(x)", 6.8)


def _slices(axes: Axes, place: tuple[float, float, float, float], labels: list[str]) -> None:
    """One dense matrix made of a slice of each kept expert, side by side."""
    x, y, width, height = place
    part = width / len(_KEPT)
    for i, (number, colour) in enumerate(_KEPT.items()):
        axes.add_patch(Rectangle((x + part * i, y), part, height, facecolor=colour, edgecolor="white", linewidth=0.8))
        text = f"{labels[i]} · E{number}" if labels[i] else f"E{number}"
        _text(axes, x + part * (i + 0.5), y + height / 2, text, 6.6, color="white", weight="bold")
    axes.add_patch(Rectangle((x, y), width, height, facecolor="none", edgecolor=INK, linewidth=0.9))


def main(arguments: list[str]) -> int:
    """Write the picture; the one argument is the path without suffix."""
    if len(arguments) != 1:
        print("usage: python -m studies.picture OUT", file=sys.stderr)
        return 2
    out = Path(arguments[0])
    out.parent.mkdir(parents=True, exist_ok=True)
    with style():
        for path in save(draw_picture(), out.parent, out.name):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
