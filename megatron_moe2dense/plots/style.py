"""The one style of all figures: sizes, a colour-blind safe palette, and writing PNG and SVG that are the same every time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

# Okabe and Ito, https://jfly.uni-koeln.de/color/ - without their yellow, too light on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B5B5B")
KEPT, DROPPED, INK, FAINT = PALETTE[1], "#C9CED6", "#222222", "#8A8F98"
HEAT = "viridis"
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": "#E6E8EC",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "megatron_moe2dense",  # the same SVG every time
    "figure.facecolor": "white",
}


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's settings inside the block; those of the process are left alone."""
    with mpl.rc_context({**mpl.rcParamsDefault, **_STYLE}):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches; its axes never overlap."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def readable_on(colour: tuple[float, float, float, float]) -> str:
    """White or black, whichever has more contrast to a background: 4.5 or more (WCAG 2.1, relative luminance)."""
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "white" if luminance < 0.179 else "black"


def save(figure: Figure, directory: Path, name: str) -> list[Path]:
    """Write `<name>.png` (150 dots an inch) and `<name>.svg`; returns their paths."""
    paths = [directory / f"{name}.png", directory / f"{name}.svg"]
    figure.savefig(paths[0], dpi=150)
    figure.savefig(paths[1], metadata={"Date": None, "Creator": None})
    return paths


def number_ticks(axes: Axes, count: int, axis: str, at_most: int = 17) -> None:
    """Whole-number ticks 0 .. count-1 along `axis`, every 1, 2, 4, 8, ... so that at most `at_most` labels stand."""
    step = 1
    while (count + step - 1) // step > at_most:
        step *= 2
    (axes.set_xticks if axis == "x" else axes.set_yticks)(np.arange(0, count, step))


def log_axis(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5 of each decade, which never run into each other."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def short(value: float) -> str:
    """Three significant digits for a label on a figure: 0.0123, 4.56, 789, 12.3k, 4.56M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:#.3g}" if value else "0"
