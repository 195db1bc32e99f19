"""What every registered grouping must hold, and the rules of docs/method.md#groups-merging-scaling."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from scipy.cluster.vq import kmeans2

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.surgery.grouping import average_linkage, cosine, groupers, kernel_kmeans, weight_cosine
from megatron_moe2dense.surgery.plan import Methods, plan_layer
from megatron_moe2dense.surgery.scaling import scalers
from megatron_moe2dense.surgery.scoring import scorers
from megatron_moe2dense.surgery.stats import LayerStats
from megatron_moe2dense.surgery.types import Grouper, Selection
from tests.surgery.test_scoring import E, random_stats

SIZES = [(2, 1), (3, 2), (7, 3), (10, 1), (10, 9)]


def flat_weights(expert: int) -> np.ndarray:
    """Experts 0, 1, 2 and 3, 4, 5 point in similar directions, with other lengths."""
    center = np.random.default_rng(100 + min(expert // 3, 2)).normal(size=200)
    own = np.random.default_rng(expert).normal(size=200)
    return ((1 + expert) * (center + (0.3 if expert < 6 else 3.0) * own)).astype(np.float32)


def partition(groups_of: np.ndarray, experts: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(experts[groups_of == group].tolist()) for group in set(groups_of.tolist())}


@pytest.fixture(params=list(groupers))
def grouper(request: pytest.FixtureRequest) -> Grouper:
    return groupers[request.param]()


@pytest.mark.parametrize("score", ["sf", "do_acp"])
@pytest.mark.parametrize(("keep", "groups"), SIZES)
def test_every_kept_expert_is_in_exactly_one_group_and_no_group_is_empty(grouper: Grouper, keep: int, groups: int, score: str):
    stats = random_stats(0)
    selection = scorers[score]().select(stats, keep)
    first, second = (grouper.group(selection, flat_weights, stats, groups) for _ in range(2))
    assert first.groups == groups
    assert first.group_of_K.shape == (keep,)
    assert set(first.group_of_K.tolist()) == set(range(groups))
    assert first.group_of_K.tolist() == second.group_of_K.tolist()


@pytest.mark.parametrize(("keep", "groups"), SIZES)
def test_renumbering_the_experts_renumbers_the_groups(grouper: Grouper, keep: int, groups: int):
    renumber = np.random.default_rng(5).permutation(E)
    plain, other = random_stats(0), random_stats(0, renumber=renumber)
    ours, theirs = (scorers["sf"]().select(stats, keep) for stats in (plain, other))
    one = grouper.group(ours, flat_weights, plain, groups)
    two = grouper.group(theirs, lambda expert: flat_weights(renumber[expert]), other, groups)
    assert partition(one.group_of_K, ours.experts_K) == partition(two.group_of_K, renumber[theirs.experts_K])


@pytest.mark.parametrize("alike", ["equal", "zero"])
@pytest.mark.parametrize(("keep", "groups"), SIZES)
def test_experts_that_are_all_alike_still_fill_every_group(grouper: Grouper, keep: int, groups: int, alike: str):
    value = {"equal": 3.0, "zero": 0.0}[alike]
    sums = {name: np.full_like(total, value) if name != "tokens" else total for name, total in random_stats(0).sums.items()}
    grouping = grouper.group(Selection(np.arange(keep), np.ones(E)), lambda _: np.full(5, value, np.float32), LayerStats(sums), groups)
    assert set(grouping.group_of_K.tolist()) == set(range(groups))


def test_reads_only_the_statistics_it_declares(grouper: Grouper):
    stats = random_stats(0)
    selection = scorers["sf"]().select(stats, 7)
    declared = LayerStats({name: stats.sums[name] for name in ("tokens", *grouper.needs())})
    expected = grouper.group(selection, flat_weights, stats, 3).group_of_K.tolist()
    assert grouper.group(selection, flat_weights, declared, 3).group_of_K.tolist() == expected
    for name in grouper.needs():
        with pytest.raises(UserError, match=name):
            grouper.group(selection, flat_weights, LayerStats({n: v for n, v in declared.sums.items() if n != name}), 3)


def test_a_grouping_is_refused_where_every_expert_is_its_own_group(grouper: Grouper):
    with pytest.raises(UserError, match="no effect"):
        Methods(3, 3, scorers["sf"](), grouper, scalers["uniform"]())


def test_groups_of_a_plan_are_numbered_by_their_best_expert(grouper: Grouper):
    plan = plan_layer(0, random_stats(0), Methods(7, 3, scorers["sf"](), grouper, scalers["uniform"]()), flat_weights)
    first = [plan.group_of.index(group) for group in range(3)]
    assert first == sorted(first)
    assert first[0] == 0


def normalised(experts: np.ndarray) -> np.ndarray:
    rows = np.stack([flat_weights(expert) for expert in experts]).astype(float)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("groups", [2, 3, 4])  # where no cluster runs empty: scipy has no rule for it
def test_weight_cluster_is_k_means_on_the_normalised_weights_from_the_best_experts(seed: int, groups: int):
    experts = np.random.default_rng(seed).permutation(E)
    selection, points = Selection(experts, np.ones(E)), normalised(experts)
    _, expected = kmeans2(points, points[:groups].copy(), iter=100, minit="matrix", missing="raise")
    assert groupers["weight_cluster"]().group(selection, flat_weights, random_stats(0), groups).group_of_K.tolist() == expected.tolist()


def test_weight_cluster_finds_the_experts_that_were_made_alike():
    experts = np.array([0, 3, 1, 2, 5, 4])
    found = groupers["weight_cluster"]().group(Selection(experts, np.ones(E)), flat_weights, random_stats(0), 2)
    assert partition(found.group_of_K, experts) == {frozenset({0, 1, 2}), frozenset({3, 4, 5})}


@pytest.mark.parametrize("experts_in_a_tile", [1, 3, 4, 99])
def test_products_of_weights_do_not_depend_on_how_many_are_held_at_once(experts_in_a_tile: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("megatron_moe2dense.surgery.grouping._TILE_BYTES", experts_in_a_tile * 200 * 4)
    monkeypatch.setattr("megatron_moe2dense.surgery.grouping._COLUMNS", 64)
    experts = np.array([7, 2, 9, 0, 5, 1, 3])
    points = normalised(experts)
    np.testing.assert_allclose(weight_cosine(experts.tolist(), flat_weights), points @ points.T, atol=1e-6)


def test_at_most_two_tiles_of_weights_are_alive(monkeypatch: pytest.MonkeyPatch):
    size, experts = 1_000_000, 12
    monkeypatch.setattr("megatron_moe2dense.surgery.grouping._TILE_BYTES", 2 * size * 4)
    base = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    tracemalloc.start()
    weight_cosine(list(range(experts)), lambda expert: np.roll(base, expert))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (2 * 2 + 3) * size * 4  # two tiles of two, and the experts on their way in


def test_an_emptied_cluster_takes_the_point_farthest_from_its_centre():
    # Points 0 and 1 coincide, so cluster 1 is empty after the first round; 4 is the farthest from its centre.
    points = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [0.0, 2.0]])
    assert kernel_kmeans(points @ points.T, 3).tolist() == [0, 0, 2, 2, 1]


@pytest.mark.parametrize(("method", "statistic"), [("output_cluster", "gram"), ("router_cluster", "prob_gram")])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_clusters_are_joined_by_average_linkage(method: str, statistic: str, groups: int):
    stats = random_stats(0)
    selection = scorers["sf"]().select(stats, 8)
    gram = stats[statistic][np.ix_(selection.experts_K, selection.experts_K)]
    distance = 1 - gram / np.sqrt(np.outer(np.diag(gram), np.diag(gram)))
    clusters = [[i] for i in range(8)]
    while len(clusters) > groups:  # the definition, written out
        pairs = [(a, b) for a in range(len(clusters)) for b in range(a)]
        a, b = min(pairs, key=lambda pair: distance[np.ix_(clusters[pair[0]], clusters[pair[1]])].mean())
        clusters[b] += clusters.pop(a)
    found = groupers[method]().group(selection, flat_weights, stats, groups)
    assert partition(found.group_of_K, np.arange(8)) == {frozenset(cluster) for cluster in clusters}


def test_equal_distances_leave_exactly_as_many_clusters_as_asked():
    assert all(len(set(average_linkage(np.eye(6), groups).group_of_K.tolist())) == groups for groups in range(1, 6))


def test_others_join_the_anchor_with_the_most_similar_outputs():
    stats = random_stats(0)
    selection = scorers["sf"]().select(stats, E)
    found = groupers["anchor"]().group(selection, flat_weights, stats, 4).group_of_K.tolist()
    assert found[:4] == [0, 1, 2, 3]
    for place in range(4, E):
        similar = []
        for anchor in selection.experts_K[:4]:
            e = selection.experts_K[place]
            similar.append(stats["gram"][e, anchor] / (stats["gram"][e, e] * stats["gram"][anchor, anchor]) ** 0.5)
        assert found[place] == similar.index(max(similar))


def test_an_expert_without_output_has_cosine_zero():
    assert cosine(np.diag([4.0, 0.0, 1.0]), np.array([1, 0])).tolist() == [[0, 0], [0, 1]]


def test_round_robin_goes_back_and_forth():
    grouping = groupers["round_robin"]().group(Selection(np.arange(8), np.ones(8)), flat_weights, random_stats(0), 3)
    assert grouping.group_of_K.tolist() == [0, 1, 2, 2, 1, 0, 0, 1]
