"""What every registered score must hold, and the formulas of docs/method.md#scores-and-selection."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.surgery.scoring import DOptimal, Random, greedy_log_det, scorers
from megatron_moe2dense.surgery.stats import CalibratedStats, LayerStats
from megatron_moe2dense.surgery.types import PointwiseScorer

E, D, T, A = 10, 6, 400, 3


def random_stats(seed: int, tokens: int = T, renumber: np.ndarray | None = None) -> LayerStats:
    """Sums over random tokens with experts of different use and size; `renumber[i]` is the old number of new expert i."""
    rng = np.random.default_rng(seed)
    order = np.arange(E) if renumber is None else renumber
    logits = rng.normal(size=(tokens, E)) + np.linspace(-1, 1, E)
    f = rng.normal(size=(E, tokens, D)) * np.linspace(0.5, 2, E)[:, None, None]
    f[3] = f[2] + 0.1 * rng.normal(size=(tokens, D))  # two experts that say nearly the same
    p = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[:, order]
    f = f[order]
    s = (p >= np.sort(p, axis=1)[:, [-A]]).astype(float)
    g = p * s / (p * s).sum(1, keepdims=True)
    norms = np.linalg.norm(f, axis=-1).T
    return LayerStats(
        {
            "tokens": np.array([float(tokens)]),
            "selected_count": s.sum(0),
            "prob_sum": p.sum(0),
            "selected_prob_sum": (p * s).sum(0),
            "gate_sum": g.sum(0),
            "gated_norm_sum": (g * norms).sum(0),
            "selected_norm_sum": (norms * s).sum(0),
            "gram": np.einsum("itd,jtd->ij", f, f),
            "output_sum": f.sum(1),
            "prob_gram": p.T @ p,
        }
    )


@pytest.fixture(params=list(scorers))
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("keep", [1, 4, E])
def test_keeps_distinct_experts_and_scores_all(method: str, keep: int):
    selection = scorers[method]().select(random_stats(0), keep)
    assert len(set(selection.experts_K.tolist())) == keep == len(selection.experts_K)
    assert set(selection.experts_K.tolist()) <= set(range(E))
    assert selection.scores_E.shape == (E,)
    assert (selection.scores_E >= 0).all()


def test_renumbering_the_experts_renumbers_the_selection(method: str):
    renumber = np.random.default_rng(5).permutation(E)
    plain, renumbered = (scorers[method]().select(stats, 4) for stats in (random_stats(0), random_stats(0, renumber=renumber)))
    assert renumber[renumbered.experts_K].tolist() == plain.experts_K.tolist()
    np.testing.assert_allclose(renumbered.scores_E, plain.scores_E[renumber], rtol=1e-9)


def test_the_same_statistics_give_the_same_selection(method: str):
    first, second = (scorers[method]().select(random_stats(0), 4) for _ in range(2))
    assert first.experts_K.tolist() == second.experts_K.tolist()
    assert first.scores_E.tolist() == second.scores_E.tolist()


def test_how_the_calibration_set_is_split_does_not_matter(method: str):
    a, b, c = (random_stats(seed, tokens) for seed, tokens in ((1, 50), (2, 300), (3, 7)))
    one, other = (scorers[method]().select(stats, 4) for stats in ((a + b) + c, c + (b + a)))
    assert one.experts_K.tolist() == other.experts_K.tolist()
    np.testing.assert_allclose(one.scores_E, other.scores_E, rtol=1e-12)


def test_reads_only_the_statistics_it_declares(method: str):
    scorer, stats = scorers[method](), random_stats(0)
    declared = LayerStats({name: stats.sums[name] for name in ("tokens", *scorer.needs())})
    assert scorer.select(declared, 4).experts_K.tolist() == scorer.select(stats, 4).experts_K.tolist()
    for name in scorer.needs():
        with pytest.raises(UserError, match=name):
            scorer.select(LayerStats({other: value for other, value in declared.sums.items() if other != name}), 4)


@pytest.mark.parametrize("keep", [0, E + 1])
def test_a_keep_beyond_the_experts_is_refused(method: str, keep: int):
    with pytest.raises(UserError, match=f"keep={keep}"):
        scorers[method]().select(random_stats(0), keep)


def test_a_pointwise_score_keeps_the_highest(method: str):
    scorer = scorers[method]()
    if isinstance(scorer, PointwiseScorer):
        selection = scorer.select(random_stats(0), 4)
        assert selection.experts_K.tolist() == sorted(range(E), key=lambda e: (-selection.scores_E[e], e))[:4]
    else:
        assert method in ("d_optimal", "do_acp")


def test_scores_are_the_formulas_of_the_method():
    s = random_stats(0)
    expected = {
        "sf": [s["selected_count"][e] / T for e in range(E)],
        "pp": [s["prob_sum"][e] / T for e in range(E)],
        "mp": [s["selected_prob_sum"][e] / T for e in range(E)],
        "cp": [s["selected_prob_sum"][e] / s["selected_count"][e] for e in range(E)],
        "reap": [s["gated_norm_sum"][e] / s["selected_count"][e] for e in range(E)],
        "acp": [s["selected_prob_sum"][e] / s["selected_count"][e] * (s["gram"][e, e] / T) ** 0.5 for e in range(E)],
    }
    expected["do_acp"] = expected["d_optimal"] = expected["acp"]
    for name, scores in expected.items():
        np.testing.assert_allclose(scorers[name]().select(s, 2).scores_E, scores, rtol=1e-12, err_msg=name)


def test_an_expert_that_is_never_selected_scores_zero_where_the_mean_is_over_selected_tokens():
    sums = {name: value.copy() for name, value in random_stats(0).sums.items()}
    for name in ("selected_count", "selected_prob_sum", "gate_sum", "gated_norm_sum"):
        sums[name][4] = 0
    for name in ("sf", "mp", "cp", "reap", "acp", "do_acp"):
        selection = scorers[name]().select(LayerStats(sums), E)
        assert selection.scores_E[4] == 0
        assert selection.experts_K[-1] == 4


def brute_force(m_EE: np.ndarray, keep: int) -> list[int]:
    """Greedy selection with a fresh slogdet per candidate."""
    ridge = np.trace(m_EE) / len(m_EE) / keep
    chosen: list[int] = []
    for _ in range(keep):
        gains = {}
        for e in set(range(len(m_EE))) - set(chosen):
            subset = [*chosen, e]
            gains[e] = np.linalg.slogdet(m_EE[np.ix_(subset, subset)] + ridge * np.eye(len(subset)))[1]
        chosen.append(max(gains, key=lambda e: (gains[e], -e)))
    return chosen


POINTWISE = [name for name in scorers if issubclass(scorers[name], PointwiseScorer)]


@pytest.mark.parametrize("importance", POINTWISE)
@pytest.mark.parametrize("seed", range(5))
def test_d_optimal_equals_greedy_by_log_determinants(importance: str, seed: int):
    stats = random_stats(seed)
    scores = scorers[importance]().select(stats, 1).scores_E
    m = np.sqrt(np.outer(scores, scores)) * stats["gram"] / T
    for keep in (1, 3, E):
        assert DOptimal(importance=importance).select(stats, keep).experts_K.tolist() == brute_force(m, keep)


@pytest.mark.parametrize("importance", POINTWISE)
def test_d_optimal_reads_what_its_importance_reads_and_the_gram(importance: str):
    block = scorers.build({"method": "d_optimal", "importance": importance})
    assert set(block.needs()) == {*scorers[importance]().needs(), "gram"}
    declared = LayerStats({name: random_stats(0).sums[name] for name in ("tokens", *block.needs())})
    expected = scorers[importance]().select(random_stats(0), 4).scores_E
    assert block.select(declared, 4).scores_E.tolist() == expected.tolist()


def test_256_experts_keep_128_in_well_under_a_second_and_as_by_log_determinants():
    rng = np.random.default_rng(0)
    f = rng.normal(size=(256, 300)) + 2 * rng.normal(size=300)
    weight = rng.random(256)
    m = np.sqrt(np.outer(weight, weight)) * (f @ f.T) / 300
    start = time.perf_counter()
    kept = greedy_log_det(m, 128).tolist()
    assert time.perf_counter() - start < 0.5
    ridge = np.trace(m) / 256 / 128 * np.eye(256)
    for step in (0, 1, 7, 40, 90, 127):  # every candidate at some steps; all steps take benchmarks/d_optimal.py seconds
        rest = [e for e in range(256) if e not in kept[:step]]
        sets = np.array([[*kept[:step], e] for e in rest])
        gains = np.linalg.slogdet((m + ridge)[sets[:, :, None], sets[:, None, :]])[1]
        assert rest[int(gains.argmax())] == kept[step]


def test_d_optimal_avoids_the_expert_that_repeats_another():
    kept = DOptimal(importance="sf").select(random_stats(0), 5).experts_K.tolist()
    assert not {2, 3} <= set(kept)


def test_do_acp_is_the_preset_of_d_optimal():
    block = scorers.build({"method": "d_optimal", "importance": "acp"})
    assert scorers["do_acp"]().select(random_stats(7), 6).experts_K.tolist() == block.select(random_stats(7), 6).experts_K.tolist()


def test_ties_go_to_the_lower_number():
    assert greedy_log_det(np.zeros((5, 5)), 3).tolist() == [0, 1, 2]
    assert greedy_log_det(np.eye(5), 3).tolist() == [0, 1, 2]
    even = {**random_stats(0).sums, "selected_count": np.full(E, 7.0)}
    assert scorers["sf"]().select(LayerStats(even), 3).experts_K.tolist() == [0, 1, 2]


@pytest.mark.parametrize("importance", ["do_acp", "nothing"])
def test_d_optimal_takes_only_pointwise_importances(importance: str):
    with pytest.raises(ValidationError):
        DOptimal(importance=importance)


def test_random_changes_with_the_seed_and_between_layers(statistics: Path):
    layers = CalibratedStats.open(statistics).layers
    picks = {tuple(Random(seed=seed).select(stats, 4).experts_K.tolist()) for seed in range(3) for stats in layers.values()}
    assert len(picks) > 6
