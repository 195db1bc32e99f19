"""Training curves from metrics.jsonl: loss, learning rate and gradient norm over tokens, several runs overlaid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.plots.style import PALETTE, log_axis, new_figure

Row = Mapping[str, Any]


def training_curves(runs: Mapping[str, Sequence[Row]]) -> Figure:
    """Three panels over tokens seen: the loss (with the evaluation's points), the learning rate, the gradient norm.

    Args:
        runs: rows of metrics.jsonl by label. A run with `kl` shows the KL, a plain language-model run its loss.

    Raises:
        UserError: KL runs and language-model runs together, whose losses do not compare; a run without steps.
    """
    distilled = {label: any(row.get("kl") is not None for row in rows) for label, rows in runs.items()}
    if len(set(distilled.values())) > 1:
        found = ", ".join(f"{label} ({'KL' if kl else 'language-model loss'})" for label, kl in distilled.items())
        raise UserError(f"runs of different losses: {found}", "runs with the same loss in one figure", "plot them into two outputs")
    value, name = ("kl", "KL(teacher||student)") if any(distilled.values()) else ("loss", "language-model loss")
    figure = new_figure(8.5, 8.0)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[2.4, 1, 1])
    for number, (label, rows) in enumerate(runs.items()):
        # earlier runs are drawn wider, so that curves which lie on each other all show
        colour, width = PALETTE[number % len(PALETTE)], 1.2 + 0.9 * min(len(runs) - 1 - number, 4)
        steps = [row for row in rows if row.get("loss") is not None]
        if not steps:
            raise UserError(f"{label} has no training steps", "rows with a loss", "leave the run out, or wait for its first step")
        _line(top, steps, value, (colour, width, label))
        _evaluations(top, rows, f"eval_{value}", colour, f"{label}, held out")
        _line(middle, steps, "lr", (colour, width, label))
        _line(bottom, steps, "grad_norm", (colour, width, label))
    top.set_ylabel(f"{name} [nats/token]")
    middle.set_ylabel("learning rate")
    bottom.set_ylabel("gradient norm")
    bottom.set_xlabel("tokens seen [tokens]")
    bottom.xaxis.set_major_formatter(EngFormatter(sep=""))
    top.set_title("Distillation" if value == "kl" else "Training")
    top.legend(ncols=1 + (len(runs) > 3))
    for axes in (top, middle, bottom):
        axes.grid(True)
        if _spread([y for line in axes.get_lines() for y in line.get_ydata()]) > 30 and axes is not middle:  # type: ignore[union-attr]
            log_axis(axes)
    middle.ticklabel_format(axis="y", scilimits=(0, 0))
    figure.align_ylabels()
    return figure


def _line(axes: Axes, rows: Sequence[Row], name: str, style: tuple[str, float, str]) -> None:
    colour, width, label = style
    shown = [(row["tokens"], row[name]) for row in rows if row.get(name) is not None]
    # Many thin steps: a lighter line keeps the evaluation's points readable.
    axes.plot([x for x, _ in shown], [y for _, y in shown], color=colour, label=label, alpha=0.85, linewidth=width)


def _evaluations(axes: Axes, rows: Sequence[Row], name: str, colour: str, label: str) -> None:
    shown = [(row["tokens"], row[name]) for row in rows if row.get(name) is not None]
    if shown:
        axes.plot(
            [x for x, _ in shown],
            [y for _, y in shown],
            linestyle="--",
            linewidth=1.2,
            marker="o",
            markersize=6,
            color=colour,
            markeredgecolor="white",
            label=label,
            zorder=3,
        )


def _spread(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return max(finite) / min(finite) if finite and min(finite) > 0 else 1.0
