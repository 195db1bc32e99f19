"""Figures of the gram and of sorted scores: what is drawn is what the statistics say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from megatron_moe2dense.plots import plot
from megatron_moe2dense.plots.config import PlotConfig
from megatron_moe2dense.plots.spectra import cosine_maps, cosines, gram_spectra, score_spectra, similarity_order
from megatron_moe2dense.plots.style import style
from tests.plots.inputs import ranking, write_statistics
from tests.plots.test_figures import assert_nothing_overlaps, texts


@pytest.fixture(autouse=True)
def the_style():
    with style():
        yield


def grams(layers: int, experts: int) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(0)
    found = {}
    for layer in range(1, layers + 1):
        f_ET = rng.normal(size=(experts, 300)) + 0.5 * rng.normal(size=300)
        found[layer] = f_ET @ f_ET.T
    return found


def test_eigenvalues_are_drawn_in_percent_and_effective_ranks_by_layer():
    data = grams(3, 8)
    figure = gram_spectra(data)
    left, right = figure.axes[0], figure.axes[1]
    for line, gram in zip(left.lines, data.values(), strict=True):
        values = np.linalg.eigvalsh(gram)[::-1]
        np.testing.assert_allclose(line.get_ydata(), 100 * values / values.sum(), rtol=1e-9)
    shares = [np.linalg.eigvalsh(gram) / np.trace(gram) for gram in data.values()]
    np.testing.assert_allclose(right.lines[0].get_ydata(), [np.exp(-(s * np.log(s)).sum()) for s in shares], rtol=1e-9)
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["1", "2", "3"]
    for text in ("share of their sum [%]", "effective rank of all 8 experts", "layer [number]"):
        assert text in texts(figure)


def test_directions_that_are_not_there_are_not_drawn():
    rank_one = np.ones((4, 4))
    assert np.isfinite(gram_spectra({0: rank_one}).axes[0].lines[0].get_ydata()).tolist() == [True, False, False, False]


def test_scores_are_sorted_and_relative_to_the_best_of_the_layer():
    content = ranking()
    axes = score_spectra(content).axes[0]
    for line, layer in zip(axes.lines[::2], content["layers"], strict=True):
        expected = np.sort(layer["scores"])[::-1] / max(layer["scores"])
        np.testing.assert_allclose(line.get_ydata(), expected)


def test_the_dots_are_the_experts_that_are_kept_wherever_their_scores_stand():
    content = ranking()
    axes = score_spectra(content).axes[0]
    for dots, layer in zip(axes.lines[1::2], content["layers"], strict=True):
        scores = layer["scores"]
        ranks = sorted(1 + sum(other > scores[expert] for other in scores) for expert in layer["experts"])
        assert ranks == [1, len(scores)], "the fixture keeps the best and the worst, as a set method may"
        assert dots.get_xdata().tolist() == ranks
        np.testing.assert_allclose(dots.get_ydata(), [1.0, min(scores) / max(scores)])
    assert "dots: the 2 kept" in axes.get_title(loc="left")


def test_cosine_maps_show_the_cosines_of_every_layer_without_the_diagonal():
    data = grams(3, 8)
    figure = cosine_maps(data)
    for axes, (layer, gram) in zip(figure.axes, data.items(), strict=False):
        norm = np.sqrt(np.diag(gram))
        expected = gram / norm[:, None] / norm
        order = [int(tick.get_text()) for tick in axes.get_xticklabels()]
        assert sorted(order) == list(range(8))
        assert order == [int(tick.get_text()) for tick in axes.get_yticklabels()]
        shown = np.ma.filled(axes.get_images()[0].get_array(), np.nan)
        assert np.isnan(np.diag(shown)).all()
        off = ~np.eye(8, dtype=bool)
        np.testing.assert_allclose(shown[off], expected[np.ix_(order, order)][off])
        assert axes.get_title(loc="left") == f"layer {layer}: mean cosine {expected[off].mean():.2f}"
        assert axes.get_images()[0].get_clim()[0] == -axes.get_images()[0].get_clim()[1]


def test_an_expert_without_output_and_a_single_expert_are_drawn():
    assert cosines(np.diag([4.0, 0.0])).tolist() == [[1, 0], [0, 0]]
    assert len(cosine_maps({0: np.array([[2.0]])}).axes) == 2
    assert len(gram_spectra({0: np.zeros((2, 2)), 1: np.eye(2)}).axes[0].lines) == 2


def test_similar_experts_stand_side_by_side():
    directions = np.array([[1, 0], [0, 1], [1, 0.1], [0.1, 1], [1, 0.05]])
    order = similarity_order(cosines(directions @ directions.T)).tolist()
    assert {frozenset(order[:3]), frozenset(order[:2])} & {frozenset({0, 2, 4}), frozenset({1, 3})}


@pytest.mark.parametrize(("layers", "experts"), [(4, 32), (48, 128)])
def test_labels_do_not_collide_at_either_size(layers: int, experts: int):
    data = grams(layers, experts)
    for figure in (gram_spectra(data), cosine_maps(data), score_spectra(ranking(layers, experts))):
        assert_nothing_overlaps(figure)


def with_grams(directory: Path) -> Path:
    write_statistics(directory, np.ones((2, 4)))
    tensors = {f"layers.{i}.{name}": value for i in range(2) for name, value in statistics_of_a_layer().items()}
    save_file(tensors, directory / "stats.safetensors")
    return directory


def statistics_of_a_layer() -> dict[str, np.ndarray]:
    return {"selected_count": np.ones(4), "tokens": np.array([4.0]), "gram": np.eye(4) + 0.2}


def test_a_statistics_directory_gives_use_spectra_and_cosines(tmp_path: Path):
    facts = plot.dry_run(PlotConfig(records=[str(with_grams(tmp_path / "stats"))], output="f"))
    assert [Path(path).stem for path in facts["writes"][::2]] == ["selection_share", "gram_spectra", "gram_cosines"]


def test_several_statistics_have_grams_of_their_own(tmp_path: Path):
    paths = [str(with_grams(tmp_path / kind)) for kind in ("prose", "code")]
    names = [Path(path).stem for path in plot.dry_run(PlotConfig(records=paths, output="f"))["writes"][::2]]
    assert names[2:] == ["gram_spectra_prose", "gram_cosines_prose", "gram_spectra_code", "gram_cosines_code"]
