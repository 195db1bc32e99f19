"""Before and after, from records.jsonl: perplexity and KL of every model, the teacher as the line to reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

from megatron_moe2dense.plots.style import FAINT, INK, PALETTE, new_figure, short

Row = Mapping[str, Any]
_LOG_FROM = 20.0  # bars whose largest is this many times the smallest get a logarithmic axis


def quality_bars(rows: Sequence[Row]) -> Figure | None:
    """One panel for the perplexity and one for the KL, a horizontal bar a model; None when the rows have neither.

    The teacher (its row, or the row of the KL's teacher directory) is drawn as a line, not as a bar.
    """
    metrics = [name for name in ("perplexity", "kl") if any(row["metrics"].get(name) is not None for row in rows)]
    if not metrics:
        return None
    teacher = next((row for row in rows if is_teacher(row)), None)
    students = [row for row in rows if row is not teacher] or list(rows)
    figure = new_figure(11 if len(metrics) == 2 else 7, 1.6 + 0.5 * len(students))
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    titles = {"perplexity": ("Perplexity", "perplexity on held-out tokens"), "kl": ("KL to the teacher", "KL(teacher||model) [nats/token]")}
    line = None if teacher is None or teacher in students else teacher["metrics"].get("perplexity")
    for axes, name in zip(panels, metrics, strict=True):
        reference = line if name == "perplexity" else None  # the teacher's own KL is 0: the axis itself
        _bars(axes, students, name, reference)
        axes.set_title(f"{titles[name][0]} (lower is better)", pad=22 if line else 8)
        axes.set_xlabel(titles[name][1] + (" (log scale)" if axes.get_xscale() == "log" else ""))
    return figure


def is_teacher(row: Row) -> bool:
    """Whether the row measures the teacher of its own KL."""
    config = row.get("config") or {}
    teacher, models = (config.get("kl") or {}).get("teacher"), config.get("models")
    named = models.get(row["model"]) if isinstance(models, dict) else None
    if isinstance(models, list):
        named = next((path for path in models if Path(path).resolve().name == row["model"]), None)
    return teacher is not None and named is not None and Path(teacher).resolve() == Path(named).resolve()


def _bars(axes: Axes, rows: Sequence[Row], name: str, reference: float | None) -> None:
    values = [row["metrics"].get(name) for row in rows]
    known = [value for value in values if value is not None]
    positive = [value for value in [*known, *([reference] if reference else [])] if value > 0]
    log = bool(positive) and max(positive) / min(positive) > _LOG_FROM
    if log:
        axes.set_xscale("log")
    # On a log axis a bar has no zero to start from; it starts half a decade below the smallest value.
    left = min(positive) / 3 if log else 0.0
    for number, value in enumerate(values):
        if value is not None:
            axes.barh(number, max(value - left, 0.0), left=left, height=0.62, color=PALETTE[number % len(PALETTE)])
        text = "not measured" if value is None else short(value)
        axes.annotate(text, (max(value or left, left), number), xytext=(4, 0), textcoords="offset points", va="center", color=INK)
    axes.set_yticks(range(len(rows)), [str(row["model"]) for row in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    top = max(positive, default=1.0)
    axes.set_xlim(left, top * (top / left) ** 0.18 if log else top * 1.18)
    axes.grid(True, axis="x")
    axes.tick_params(axis="y", length=0)
    if reference is not None:
        axes.axvline(reference, color=INK, linestyle="--", linewidth=1.2)
        where = blended_transform_factory(axes.transData, axes.transAxes)
        place = {"xycoords": where, "xytext": (-3, 3), "textcoords": "offset points", "ha": "left"}
        axes.annotate(f"teacher {short(reference)}", (reference, 1.0), color=FAINT, **place)
