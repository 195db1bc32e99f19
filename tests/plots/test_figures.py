"""What is drawn equals what was recorded, and every axis says what it shows and in which unit."""

import math

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.plots.bars import is_teacher, quality_bars
from megatron_moe2dense.plots.curves import training_curves
from megatron_moe2dense.plots.experts import expert_scores, plan_map, share_map
from megatron_moe2dense.plots.style import DROPPED, KEPT, short, style
from megatron_moe2dense.plots.usage import mutual_information, relative_use, specialisation, use_by_kind
from tests.plots.inputs import metrics, plan, ranking, record

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def the_style():
    with style():
        yield


def texts(figure: Figure) -> str:
    found = [figure.get_supxlabel(), figure.get_supylabel()]
    for axes in figure.axes:
        found += [axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()]
        found += [text.get_text() for text in axes.texts]
    return "\n".join(found)


def assert_nothing_overlaps(figure: Figure) -> None:
    """Titles and axis labels of a drawn figure lie inside it and do not cover each other."""
    figure.draw_without_rendering()
    page = figure.bbox
    boxes = []
    for axes in figure.axes:
        if axes.get_visible():
            labels = [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
            boxes += [(label.get_text(), label.get_window_extent()) for label in labels if label.get_text()]
    for text, box in boxes:
        cut = box.x0 < page.x0 - 1 or box.x1 > page.x1 + 1 or box.y0 < page.y0 - 1 or box.y1 > page.y1 + 1
        assert not cut, f"{text} is cut off"
    for i, (text, box) in enumerate(boxes):
        for other, other_box in boxes[i + 1 :]:
            assert not box.overlaps(other_box), f"{text} covers {other}"


def test_training_curves_show_the_recorded_numbers():
    rows = metrics()
    figure = training_curves({"run": rows})
    loss, rate, norm = figure.axes
    steps = [row for row in rows if "loss" in row]
    evals = [row for row in rows if "eval_kl" in row]
    assert list(loss.lines[0].get_ydata()) == [row["kl"] for row in steps]
    assert list(loss.lines[0].get_xdata()) == [row["tokens"] for row in steps]
    assert list(loss.lines[1].get_ydata()) == [row["eval_kl"] for row in evals]
    assert list(rate.lines[0].get_ydata()) == [row["lr"] for row in steps]
    assert list(norm.lines[0].get_ydata()) == [row["grad_norm"] for row in steps]
    assert loss.get_ylabel() == "KL(teacher||student) [nats/token]"
    assert norm.get_xlabel() == "tokens seen [tokens]"
    assert_nothing_overlaps(figure)


def test_a_plain_language_model_run_shows_its_loss():
    rows = metrics(distilled=False)
    loss = training_curves({"run": rows}).axes[0]
    assert list(loss.lines[0].get_ydata()) == [row["loss"] for row in rows if "loss" in row]
    assert list(loss.lines[1].get_ydata()) == [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert loss.get_ylabel() == "language-model loss [nats/token]"


def test_several_runs_are_overlaid_in_their_own_colours():
    loss = training_curves({"a": metrics(), "b": metrics(start=5.0)}).axes[0]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["a", "a, held out", "b", "b, held out"]
    assert loss.lines[0].get_color() == loss.lines[1].get_color() != loss.lines[2].get_color()


def test_a_loss_over_decades_gets_a_log_axis():
    assert training_curves({"a": metrics(steps=100)}).axes[0].get_yscale() == "log"
    assert training_curves({"a": metrics(steps=6)}).axes[0].get_yscale() == "linear"


def test_a_step_without_finite_loss_leaves_a_gap():
    rows = metrics(steps=100)
    rows[5]["kl"] = math.nan
    loss = training_curves({"a": rows}).axes[0]
    assert math.isnan(list(loss.lines[0].get_ydata())[4])
    assert loss.get_yscale() == "log"


def test_losses_that_do_not_compare_are_not_overlaid():
    with pytest.raises(UserError, match="different losses"):
        training_curves({"a": metrics(), "b": metrics(distilled=False)})


def test_a_run_without_steps_is_refused():
    with pytest.raises(UserError, match="no training steps"):
        training_curves({"a": [{"step": 0, "tokens": 0, "eval_loss": 1.0, "eval_kl": 1.0}]})


def test_bars_reach_the_recorded_values_and_the_teacher_is_a_line():
    rows = [record("teacher", 10.0, 0.0), record("dense", 90.0, 2.0), record("distilled", 12.0, 0.2)]
    figure = quality_bars(rows)
    perplexity, kl = figure.axes
    assert [bar.get_x() + bar.get_width() for bar in perplexity.patches] == pytest.approx([90.0, 12.0])
    assert [bar.get_x() + bar.get_width() for bar in kl.patches] == pytest.approx([2.0, 0.2])
    assert [label.get_text() for label in perplexity.get_yticklabels()] == ["dense", "distilled"]
    assert set(perplexity.lines[0].get_xdata()) == {10.0}
    assert not kl.lines
    found = texts(figure)
    for text in ("90.0", "12.0", "teacher 10.0", "2.00", "0.200", "KL(teacher||model) [nats/token]", "perplexity on held-out tokens"):
        assert text in found
    assert_nothing_overlaps(figure)


def test_bars_over_decades_get_a_log_axis_and_keep_their_ends():
    axes = quality_bars([record("teacher", 10.0, 0.0), record("dense", 30000.0, 9.0), record("distilled", 12.0, 8.0)]).axes
    assert [panel.get_xscale() for panel in axes] == ["log", "linear"]
    assert "log scale" in axes[0].get_xlabel()
    assert [bar.get_x() + bar.get_width() for bar in axes[0].patches] == pytest.approx([30000.0, 12.0])


def test_a_value_that_was_not_measured_is_said_and_not_drawn():
    figure = quality_bars([record("dense", 90.0, None), record("distilled", 12.0, 0.2)])
    assert len(figure.axes[1].patches) == 1
    assert "not measured" in texts(figure)


def test_without_quality_there_are_no_bars():
    assert quality_bars([record("dense", None, None)]) is None


def test_the_teacher_is_known_by_its_directory_not_its_name():
    assert is_teacher(record("dense", 1.0, 0.0, teacher="models/../models/dense"))
    assert not is_teacher(record("teacher", 1.0, 0.0, teacher="models/dense"))
    listed = {**record("dense", 1.0, 0.0, teacher="x/dense"), "config": {"models": ["x/dense", "x/moe"], "kl": {"teacher": "x/dense"}}}
    assert is_teacher(listed)


def test_scores_are_sorted_and_kept_experts_coloured():
    content = ranking()
    figure = expert_scores(content)
    for axes, layer in zip(figure.axes, content["layers"], strict=True):
        assert [bar.get_height() for bar in axes.patches] == sorted(layer["scores"], reverse=True)
        order = np.argsort(layer["scores"])[::-1]
        kept = {int(order[i]) for i, bar in enumerate(axes.patches) if to_hex(bar.get_facecolor()) == KEPT.lower()}
        assert kept == set(layer["experts"])
        assert {to_hex(bar.get_facecolor()) for bar in axes.patches} == {KEPT.lower(), DROPPED.lower()}
    assert figure.get_supylabel() == "score (do_acp)"
    assert figure.get_supxlabel() == "expert, sorted by score [rank]"


def test_the_use_map_shows_percent_and_rings_the_kept():
    content = ranking()
    shares = {layer["layer"]: layer["selected_fraction"] for layer in content["layers"]}
    figure = share_map(shares, {layer["layer"]: layer["experts"] for layer in content["layers"]})
    axes = figure.axes[0]
    assert np.allclose(axes.images[0].get_array(), 100 * np.array(list(shares.values())))
    rings = {(int(x), int(y)) for x, y in axes.collections[0].get_offsets()}
    assert rings == {(expert, layer["layer"]) for layer in content["layers"] for expert in layer["experts"]}
    for text in ("expert [number]", "layer [number]", "tokens that select the expert [%]"):
        assert text in texts(figure)


def test_the_plan_map_shows_the_weight_inside_a_group():
    figure = plan_map(plan())
    drawn = np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)
    assert drawn.shape == (2, 6)
    assert drawn[0, [5, 1, 3]].tolist() == [1.0, 0.75, 0.25]
    assert np.isnan(drawn[0, [0, 2, 4]]).all()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0", "2"]
    assert "weight inside its group [fraction]" in texts(figure)


def test_relative_use_is_one_when_every_expert_is_used_alike():
    assert relative_use({"a": np.full(8, 0.25), "b": np.full(8, 0.5)}).tolist() == [[1.0] * 8] * 2


def test_mutual_information_is_zero_for_equal_use_and_log2_of_the_kinds_for_disjoint_experts():
    same = np.array([0.1, 0.5, 0.4])
    assert mutual_information({"a": same, "b": 3 * same}) == pytest.approx(0.0, abs=1e-12)
    assert mutual_information({f"kind {i}": np.eye(4)[i] for i in range(4)}) == pytest.approx(2.0)


def test_mutual_information_equals_entropies_of_drawn_pairs():
    shares = {"a": np.array([0.7, 0.2, 0.1]), "b": np.array([0.1, 0.1, 0.8])}

    def entropy(p):
        return -sum(x * math.log2(x) for x in p)

    joint = [0.5 * x for share in shares.values() for x in share]
    experts = [0.5 * (x + y) for x, y in zip(*shares.values(), strict=True)]
    assert mutual_information(shares) == pytest.approx(entropy([0.5, 0.5]) + entropy(experts) - entropy(joint))


def kinds(layers: int, experts: int) -> dict[str, dict[int, np.ndarray]]:
    random = np.random.default_rng(1)
    return {kind: {i: random.dirichlet(np.ones(experts)) * 4 for i in range(layers)} for kind in ("prose", "code", "verse")}


def test_use_by_kind_shows_each_layer_in_powers_of_two_of_uniform():
    data = kinds(2, 6)
    figure = use_by_kind(data)
    for number, axes in enumerate(figure.axes[:2]):
        use_NE = relative_use({kind: layers[number] for kind, layers in data.items()})
        order = [int(label.get_text()) for label in axes.get_xticklabels()]
        assert sorted(order) == list(range(6))
        assert np.allclose(axes.images[0].get_array(), np.clip(np.log2(use_NE[:, order]), -4, 4))
        assert [label.get_text() for label in axes.get_yticklabels()] == list(data)
        preferred = use_NE.argmax(0)[order]
        assert (np.diff(preferred) >= 0).all()
    assert "use of the expert [times uniform]" in texts(figure)
    assert "bits" in figure.axes[0].get_title(loc="left")


def test_specialisation_bars_are_the_mutual_information():
    data = kinds(3, 6)
    figure = specialisation(data)
    expected = [mutual_information({kind: layers[i] for kind, layers in data.items()}) for i in range(3)]
    assert [bar.get_height() for bar in figure.axes[0].patches] == expected
    assert "[bits]" in figure.axes[0].get_ylabel()
    assert f"at most {math.log2(3):.2f} bits" in figure.axes[0].get_title(loc="left")


def test_statistics_of_other_models_are_not_compared():
    with pytest.raises(UserError, match="other layers or experts"):
        use_by_kind({"a": {0: np.ones(4)}, "b": {0: np.ones(8)}})
    with pytest.raises(UserError, match="other layers or experts"):
        specialisation({"a": {0: np.ones(4)}, "b": {1: np.ones(4)}})


@pytest.mark.parametrize(("layers", "experts"), [(4, 32), (48, 128)])
def test_labels_do_not_collide_at_either_size(layers, experts):
    shares = {layer: np.ones(experts) for layer in range(layers)}
    panels = expert_scores(ranking(layers, 16))  # few bars draw faster; titles and labels are the same
    for figure in (panels, share_map(shares, {0: [1]}), use_by_kind(kinds(layers, experts)), specialisation(kinds(layers, 8))):
        assert_nothing_overlaps(figure)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.01234, "0.0123"), (4.5678, "4.57"), (123.4, "123"), (32123.0, "32.1k"), (4.2e6, "4.2M"), (3e9, "3G")]
)
def test_labels_have_three_digits(value, text):
    assert short(value) == text


def test_kept_and_left_out_differ_in_lightness_for_colour_blind_eyes():
    def lightness(colour):
        return float(np.dot(to_rgba(colour)[:3], [0.2126, 0.7152, 0.0722]))

    assert lightness(DROPPED) - lightness(KEPT) > 0.3
