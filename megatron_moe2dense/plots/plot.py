"""`moe2dense plot`: recognises every input by its content and draws the figures that fit it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import output_directory
from megatron_moe2dense.plots.bars import quality_bars
from megatron_moe2dense.plots.config import PlotConfig
from megatron_moe2dense.plots.curves import training_curves
from megatron_moe2dense.plots.experts import expert_scores, plan_map, share_map
from megatron_moe2dense.plots.inputs import Input, read_inputs
from megatron_moe2dense.plots.spectra import cosine_maps, gram_spectra, score_spectra
from megatron_moe2dense.plots.style import save, style
from megatron_moe2dense.plots.sweep import FIGURES
from megatron_moe2dense.plots.usage import specialisation, use_by_kind

Drawing = Callable[[], Figure | None]


def run(config: PlotConfig) -> None:
    """Draw everything that applies into the output directory and print the paths of the PNGs and SVGs.

    Raises:
        UserError: an input nobody knows, one with nothing to draw, or an output in the way.
    """
    drawings = figures(read_inputs(config.records))
    output = Path(config.output)
    names: list[str] = []
    with output_directory(output, "plot", config.model_dump(mode="json")) as working, style():
        for name, draw in drawings.items():
            figure = draw()
            if figure is None:
                raise UserError(f"{name}: neither perplexity nor KL in any row", "rows to draw as bars", "evaluate with `perplexity`")
            names += [path.name for path in save(figure, working, name)]
    for name in names:
        print(output / name)


def dry_run(config: PlotConfig) -> dict[str, Any]:
    """What would be read and drawn."""
    inputs = read_inputs(config.records)
    return {
        "reads": {str(item.path): item.kind for item in inputs},
        "writes": [f"{config.output}/{name}.{suffix}" for name in figures(inputs) for suffix in ("png", "svg")],
    }


def figures(inputs: list[Input]) -> dict[str, Drawing]:
    """The figures that apply, by file name, as calls that draw them.

    All metrics share one figure and all records one; each sweep, ranking, plan and statistics has its own, and several
    statistics add the comparison of their kinds of text.
    """
    drawings: dict[str, Drawing] = {}
    by_kind: dict[str, list[Input]] = {}
    for item in inputs:
        by_kind.setdefault(item.kind, []).append(item)
    if metrics := by_kind.get("metrics"):
        drawings["training"] = partial(training_curves, {item.label: item.content for item in metrics})
    if rows := [row for item in by_kind.get("records", []) for row in item.content]:
        drawings["quality"] = partial(quality_bars, rows)
    for item, end in _named(by_kind.get("sweep", [])):
        drawings |= {name + end: partial(draw, item.content) for name, draw in FIGURES.items()}
    for item, end in _named(by_kind.get("ranking", [])):
        layers = item.content["layers"]
        drawings["expert_scores" + end] = partial(expert_scores, item.content)
        drawings["score_spectra" + end] = partial(score_spectra, item.content)
        shares = {layer["layer"]: layer["selected_fraction"] for layer in layers}
        if all(share is not None for share in shares.values()):  # null where calibration left selected_count out
            drawings["expert_use" + end] = partial(share_map, shares, {layer["layer"]: layer["experts"] for layer in layers})
    for item, end in _named(by_kind.get("plan", [])):
        drawings["plan" + end] = partial(plan_map, item.content)
    statistics = by_kind.get("statistics", [])
    if len(statistics) > 1:
        kinds = {item.label: item.content.shares for item in statistics}
        drawings["use_by_kind"] = partial(use_by_kind, kinds)
        drawings["specialisation"] = partial(specialisation, kinds)
    for item in statistics if len(statistics) == 1 else ():
        if not any(_same_use(item.content.shares, ranking.content) for ranking in by_kind.get("ranking", [])):  # expert_use shows it
            drawings["selection_share"] = partial(share_map, item.content.shares, {})
    for item, end in _named(statistics):
        if item.content.grams:
            drawings["gram_spectra" + end] = partial(gram_spectra, item.content.grams)
            drawings["gram_cosines" + end] = partial(cosine_maps, item.content.grams)
    return drawings


def _same_use(shares: Mapping[int, np.ndarray], ranking: Mapping[str, Any]) -> bool:
    """Whether a ranking was made of these statistics, as far as use goes."""
    ranked = {layer["layer"]: layer["selected_fraction"] for layer in ranking["layers"]}
    return shares.keys() == ranked.keys() and all(
        ranked[i] is not None and len(ranked[i]) == len(share) and np.allclose(ranked[i], share, atol=1e-3) for i, share in shares.items()
    )


def _named(items: list[Input]) -> list[tuple[Input, str]]:
    """Each input with the end of its figures' names: nothing when it is alone, else its label."""
    return [(item, "" if len(items) == 1 else "_" + re.sub(r"[^\w.-]+", "_", item.label)) for item in items]
