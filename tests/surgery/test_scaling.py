"""What every registered scaling must hold, and the formulas of docs/method.md#groups-merging-scaling."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.surgery.scaling import scalers
from megatron_moe2dense.surgery.scoring import scorers
from megatron_moe2dense.surgery.stats import LayerStats
from megatron_moe2dense.surgery.types import Grouping, Scaler, Selection
from tests.surgery.test_scoring import E, random_stats

SELECTION = Selection(np.array([4, 1, 7, 2, 0]), np.array([0.1, 0.4, 0.2, 0.0, 0.5, 0.0, 0.0, 0.3]))
GROUPING = Grouping(np.array([0, 1, 1, 0, 1]), 2)


def stats_of_gates(gate_sum: list[float], tokens: float) -> LayerStats:
    return LayerStats({"tokens": np.array([tokens]), "gate_sum": np.array(gate_sum)})


@pytest.fixture(params=list(scalers))
def scaler(request: pytest.FixtureRequest) -> Scaler:
    return scalers[request.param]()


def test_scales_add_up_to_the_mean_routing_weight(scaler: Scaler):
    stats = stats_of_gates([3.0, 1.0, 2.0], 10.0)
    assert scaler.scales(SELECTION, GROUPING, stats).sum() == pytest.approx(0.6, rel=1e-12)
    assert scaler.scales(SELECTION, Grouping(np.zeros(5, int), 1), stats).tolist() == pytest.approx([0.6], rel=1e-12)


def test_a_renormalising_router_has_scales_that_add_up_to_one(scaler: Scaler):
    selection = scorers["sf"]().select(random_stats(0), 4)
    assert scaler.scales(selection, Grouping(np.arange(4), 4), random_stats(0)).sum() == pytest.approx(1.0, rel=1e-12)


def test_every_group_has_a_finite_scale_that_is_not_negative(scaler: Scaler):
    for scores in (SELECTION.scores_E, np.zeros(8), np.full(8, 1e-300), np.full(8, 1e300)):
        scales = scaler.scales(replace(SELECTION, scores_E=scores), GROUPING, stats_of_gates([6.0], 10.0))
        assert scales.shape == (2,)
        assert scales.dtype == np.float64
        assert np.isfinite(scales).all()
        assert (scales >= 0).all()


def test_renumbering_the_experts_does_not_change_the_scales(scaler: Scaler):
    renumber = np.random.default_rng(5).permutation(E)
    plain, other = random_stats(0), random_stats(0, renumber=renumber)
    found = [scaler.scales(scorers["mp"]().select(stats, 5), GROUPING, stats) for stats in (plain, other)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-12)


def test_renumbering_the_groups_renumbers_the_scales(scaler: Scaler):
    stats, swapped = stats_of_gates([6.0], 10.0), Grouping(1 - GROUPING.group_of_K, 2)
    assert scaler.scales(SELECTION, swapped, stats).tolist() == scaler.scales(SELECTION, GROUPING, stats).tolist()[::-1]


def test_how_the_calibration_set_is_split_does_not_matter(scaler: Scaler):
    a, b, c = (random_stats(seed, tokens) for seed, tokens in ((1, 50), (2, 300), (3, 7)))
    one, other = (scaler.scales(replace(SELECTION, scores_E=np.arange(10.0)), GROUPING, stats) for stats in ((a + b) + c, c + (b + a)))
    np.testing.assert_allclose(one, other, rtol=1e-12)


def test_reads_only_the_statistics_it_declares(scaler: Scaler):
    stats = random_stats(0)
    declared = LayerStats({name: stats.sums[name] for name in ("tokens", *scaler.needs())})
    assert scaler.scales(SELECTION, GROUPING, declared).tolist() == scaler.scales(SELECTION, GROUPING, stats).tolist()
    for name in scaler.needs():
        with pytest.raises(UserError, match=name):
            scaler.scales(SELECTION, GROUPING, LayerStats({n: v for n, v in declared.sums.items() if n != name}))


def test_scales_are_the_formulas_of_the_method():
    stats = stats_of_gates([4.0, 6.0], 10.0)
    assert scalers["uniform"]().scales(SELECTION, GROUPING, stats).tolist() == [0.5, 0.5]
    expected = [(0.5 + 0.2) / 1.5, (0.4 + 0.3 + 0.1) / 1.5]  # kept 4, 1, 7, 2, 0 score .5 .4 .3 .2 .1
    assert scalers["proportional"]().scales(SELECTION, GROUPING, stats).tolist() == pytest.approx(expected)
    nothing = replace(SELECTION, scores_E=np.zeros(8))
    assert scalers["proportional"]().scales(nothing, GROUPING, stats).tolist() == [0.5, 0.5]
