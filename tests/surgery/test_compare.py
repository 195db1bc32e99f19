"""The comparison of scoring methods that `moe2dense score` prints, and its options."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_moe2dense.cli import main
from megatron_moe2dense.surgery.compare import compare_methods, compared_scorers, label
from megatron_moe2dense.surgery.scoring import METHODS, scorers
from megatron_moe2dense.surgery.stats import CalibratedStats, LayerStats
from tests.surgery.test_scoring import random_stats

Capture = pytest.CaptureFixture[str]


def calibrated(*layers: LayerStats) -> CalibratedStats:
    return CalibratedStats(Path("stats"), {"experts": 10, "active": 3, "family": "any"}, dict(enumerate(layers)))


def counts(*selected: int) -> LayerStats:
    return LayerStats(
        {"tokens": np.array([10.0]), "selected_count": np.array(selected, float), "prob_sum": np.array(selected[::-1], float)}
    )


def test_overlap_is_the_mean_share_of_experts_in_common():
    # layer 0: sf keeps {0, 1}, pp {3, 2}; layer 1: sf keeps {1, 2}, pp {2, 1}.
    statistics = calibrated(counts(9, 8, 1, 0), counts(0, 5, 4, 1))
    found = compare_methods({"sf": scorers["sf"](), "pp": scorers["pp"]()}, statistics, keep=2)
    assert found["methods"] == ["sf", "pp"]
    assert found["overlap"] == [[1.0, 0.5], [0.5, 1.0]]
    assert found["routing_kept"] == pytest.approx([(17 / 18 + 9 / 10) / 2, (1 / 18 + 9 / 10) / 2])
    assert found["effective_rank"] == [None, None]


def test_every_method_is_compared_with_every_other():
    statistics = calibrated(random_stats(0), random_stats(1))
    methods, left_out = compared_scorers(scorers["sf"](), True, statistics)
    assert tuple(methods) == METHODS
    assert left_out == []
    found = compare_methods(methods, statistics, keep=3)
    matrix = np.array(found["overlap"])
    assert matrix.shape == (7, 7)
    assert (matrix == matrix.T).all()
    assert (np.diag(matrix) == 1).all()
    assert all(1 <= rank <= 3 for rank in found["effective_rank"])


def test_keeping_everything_overlaps_everywhere():
    statistics = calibrated(random_stats(0))
    methods, _ = compared_scorers(scorers["sf"](), True, statistics)
    assert np.unique(compare_methods(methods, statistics, keep=10)["overlap"]).tolist() == [1.0]


def test_the_own_score_is_compared_under_its_options():
    own = scorers.build({"method": "d_optimal", "importance": "mp"})
    methods, _ = compared_scorers(own, ["sf"], calibrated(random_stats(0)))
    assert list(methods) == ["sf", "d_optimal(importance=mp)"]
    assert label(scorers.build({"method": "d_optimal", "importance": "acp"})) == "d_optimal"


def test_methods_without_their_statistics_are_left_out_and_named(
    moe: Path, tokens: str, tmp_path: Path, capsys: Capture, user_error: Callable[..., str]
):
    data = [f"data.path={tokens}", "data.sequence_length=32", "statistics=[prob_sum, selected_count]"]
    main(["calibrate", f"source={moe}", f"output={tmp_path / 'stats'}", *data])
    main(["score", f"statistics={tmp_path / 'stats'}", "score.method=pp"])
    assert "not compared, their statistics were not collected: mp, cp, reap, acp, do_acp" in capsys.readouterr().out
    comparison = json.loads((tmp_path / "stats/ranking.json").read_text())["comparison"]
    assert comparison["methods"] == ["sf", "pp"]
    other = [f"statistics={tmp_path / 'stats'}", "score.method=pp", f"output={tmp_path / 'other.json'}"]
    assert "selected_prob_sum" in user_error("score", *other, "compare=[sf, mp]")
    assert "did you mean 'reap'" in user_error("score", *other, "compare=[raep]")


def test_the_printed_tables_hold_the_ranking(statistics: Path, tmp_path: Path, capsys: Capture):
    main(["score", f"statistics={statistics}", f"output={tmp_path / 'a.json'}", "keep=7"])
    text, ranking = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text())
    head, *rows = text.split("\n\n")[1].splitlines()
    assert head.split()[4:11] == list(METHODS)
    for row, line in zip(ranking["comparison"]["overlap"], rows[1:], strict=True):
        assert line.split()[1:8] == [f"{value:.2f}" for value in row]
    assert text.count("and 1 more") == len(ranking["layers"])
    for layer in ranking["layers"]:
        assert f"{layer['effective_rank']:.2f}" in text
    main(["score", f"statistics={statistics}", f"output={tmp_path / 'b.json'}", "compare=false"])
    assert "overlap" not in capsys.readouterr().out
    assert json.loads((tmp_path / "b.json").read_text())["comparison"] is None
