"""Shares of variance against a plain two-way table, the Pareto front."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_moe2dense.sweep.summary import pareto, summarise, summary_table, variance_explained


def row(number: int, score: str, scale: str, kl: float, parameters: int = 100) -> dict[str, Any]:
    blocks = {"score": {"method": score}, "group": {"method": "anchor", "align": "none"}, "scale": {"method": scale}}
    metrics = {"kl": kl, "nll": kl + 3, "perplexity": 10 * kl, "top1_agreement": 0.5}
    named = {"model": f"{score} {scale}", "point": number, "plan_hash": str(number), "parameters": parameters}
    return {**named, "config": {"keep": 4, "groups": 4, **blocks}, "metrics": metrics, "teacher": {"nll": 3.0, "perplexity": 20.0}}


# Rows sf, cp; columns uniform, proportional: 1 2 / 5 8. Mean 4; squares: total 30, rows 25, columns 4, interaction 1.
ROWS = [row(0, "sf", "uniform", 1.0), row(1, "sf", "proportional", 2.0), row(2, "cp", "uniform", 5.0), row(3, "cp", "proportional", 8.0)]


def test_shares_of_the_variance_are_those_of_a_two_way_table():
    assert variance_explained(ROWS, "kl") == pytest.approx({"score": 25 / 30, "scale": 4 / 30, "interactions": 1 / 30})
    assert variance_explained(ROWS[:3], "kl").keys() == {"score", "scale"}  # not orthogonal: what is left over says nothing
    assert variance_explained(ROWS[:1], "kl") == {"interactions": 0.0}


def test_a_main_effect_is_mean_and_spread_over_the_other_axes():
    summary = summarise(ROWS, 6)
    cp = summary["axes"]["score"]["cp"]
    assert (cp["kl"]["mean"], cp["kl"]["spread"], cp["configurations"]) == (6.5, 1.5, 2)
    assert cp["best"]["model"] == "cp uniform"
    assert (summary["recorded"], summary["configurations"]) == (4, 6)
    text = summary_table(summary)
    assert "best: sf uniform, KL 1.0000 nats, perplexity 10.00 (teacher 20.00)" in text
    assert "0.8333" in text


def test_the_front_holds_what_nothing_beats_in_size_and_perplexity():
    rows = [row(0, "a", "u", 5.0, 100), row(1, "b", "u", 4.0, 100), row(2, "c", "u", 6.0, 200), row(3, "d", "u", 1.0, 300)]
    assert [found["model"] for found in pareto(rows)] == ["b u", "d u"]
