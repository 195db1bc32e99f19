"""The figures of a sweep show its records: means in cells, best points, the front."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from megatron_moe2dense.cli import main
from megatron_moe2dense.common import records
from megatron_moe2dense.plots.sweep import heat_maps, keep_curves, size_front


def sweep_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for keep in (4, 16):
        for score in ("sf", "cp"):
            for group in ("anchor", "round_robin"):
                for scale in ("uniform", "proportional"):
                    kl = keep / 10 + (score == "cp") + 0.1 * (group == "anchor") + 0.01 * (scale == "uniform")
                    config = {
                        "keep": keep,
                        "groups": 4,
                        **{k: {"method": v} for k, v in zip(("score", "group", "scale"), (score, group, scale), strict=True)},
                    }
                    metrics = {"kl": kl, "nll": kl + 3, "perplexity": float(np.exp(kl + 3)), "top1_agreement": 0.5}
                    names = {"model": f"{score}-{keep}-{len(rows)}", "point": len(rows), "plan_hash": str(len(rows))}
                    sized = {"parameters": 1000 * keep, "teacher": {"nll": 3.0, "perplexity": 20.0}}
                    rows.append({**names, "config": config, "metrics": metrics, **sized})
    return rows


def test_a_heat_map_cell_is_the_kl_of_its_configuration():
    rows = sweep_rows()
    panels = [axes for axes in heat_maps(rows).axes if axes.images]
    assert [axes.get_title() for axes in panels] == [
        "K = 4, uniform",
        "K = 16, uniform",
        "K = 4, proportional",
        "K = 16, proportional",
    ]
    np.testing.assert_allclose(panels[1].images[0].get_array(), [[1.71, 1.61], [2.71, 2.61]])  # sf, cp x anchor, round_robin
    missing = heat_maps([row for row in rows if row["point"] != 1])
    assert np.isnan(np.ma.filled(missing.axes[2].images[0].get_array(), np.nan)[0, 0])


def test_the_best_cell_can_be_read_on_its_colour():
    for panel in (axes for axes in heat_maps(sweep_rows()).axes if axes.images):
        [written] = panel.texts
        image = panel.images[0]
        column, row = (int(place) for place in written.xy)
        background = _luminance(image.cmap(image.norm(image.get_array()[row, column])))
        lighter, darker = sorted((background, _luminance(to_rgb(written.get_color()))), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, "WCAG 2.1 AA"


def _luminance(colour: tuple[float, ...]) -> float:
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colour[:3]]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_a_curve_is_the_mean_over_the_other_axes():
    scoring = keep_curves(sweep_rows()).axes[0]
    lines = {line.get_label(): line.get_ydata() for line in scoring.lines}
    np.testing.assert_allclose(lines["sf"], [0.4 + 0.055, 1.6 + 0.055])
    np.testing.assert_allclose(lines["cp"], [1.4 + 0.055, 2.6 + 0.055])


def test_the_front_joins_what_nothing_beats():
    rows = sweep_rows()
    for row in rows[8:]:
        row["metrics"]["perplexity"] /= 20  # larger and better
    front = next(line for line in size_front(rows).axes[0].lines if line.get_label() == "Pareto front")
    assert list(front.get_xdata()) == [4000, 16000]
    best = [min(row["metrics"]["perplexity"] for row in part) for part in (rows[:8], rows[8:])]
    assert list(front.get_ydata()) == pytest.approx(best)


def test_plot_recognises_a_sweep(tmp_path: Path):
    records.rewrite(tmp_path / "sweep/records.jsonl", sweep_rows())
    main(["plot", f"records=[{tmp_path}/sweep]", f"output={tmp_path}/figures"])
    names = {path.name for path in (tmp_path / "figures").glob("*.png")}
    assert names == {"sweep_heat_maps.png", "sweep_keep_curves.png", "sweep_size_front.png"}
