"""A step whose loss or gradients are not finite changes nothing, on any rank; too many of them end the run; spikes are told."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_moe2dense.common import records
from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.trainer import distill, loop
from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.step import StepLoss
from tests.helpers.forks import launch
from tests.trainer.runs import alone, with_student

CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "DP2, NaN": ({}, "float32", "NaN"),
    "DP2, overflowing norm": ({}, "float32", "overflowing norm"),
    "DP2 plain optimizer": ({"distributed_optimizer": False}, "float32", "infinity"),
    "DP2 bfloat16": ({}, "bfloat16", "NaN"),
    "DP2 bfloat16 plain optimizer": ({"distributed_optimizer": False}, "bfloat16", "NaN"),
    "TP2 bfloat16": ({"tensor": 2}, "bfloat16", "infinity"),
    "PP2": ({"pipeline": 2}, "float32", "NaN"),
}

CONSTANT = {"style": "constant", "warmup": 0.0}

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_student(tmp_path_factory.mktemp("nonfinite"))


@pytest.fixture(scope="module")
def poisoned(root: Path) -> dict[str, dict[str, Any]]:
    cases = [
        (alone(root, name, schedule=CONSTANT, parallel=parallel, dtype=dtype), poison) for name, (parallel, dtype, poison) in CASES.items()
    ]
    return dict(zip(CASES, launch(2, "tests.trainer.run_cases:poisoned_steps", cases), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_gradient_that_is_not_finite_on_one_rank_leaves_weights_and_moments_of_all_untouched(case: str, poisoned: dict[str, Any]):
    found = poisoned[case]
    for kept, healthy, skipped in found["ranks"]:
        assert skipped == [False, True, False]
        assert kept == [False, True, False]
        assert healthy
    assert (found["step"], found["total"], found["in_a_row"]) == (3, 1, 0)


def run(root: Path, name: str, **train: Any) -> Path:
    distill.run(build(DistillConfig, alone(root, name, schedule=CONSTANT, train={"log_every": 1000, **train}), "the test"))
    return root / name


def test_a_run_stops_after_so_many_skipped_steps_in_a_row_and_says_which_samples_they_read(root: Path, monkeypatch: pytest.MonkeyPatch):
    measure = loop.student_pass

    def broken(*arguments: Any, **options: Any) -> StepLoss:
        return replace(measure(*arguments, **options), means=(float("nan"),))

    steps = iter([measure, broken, measure, broken, broken, broken, measure])
    monkeypatch.setattr(loop, "student_pass", lambda *arguments, **options: next(steps)(*arguments, **options))
    with pytest.raises(UserError, match=r"3 steps in a row .*, the last is 6") as stop:
        run(root, "stopped", steps=20, most_skipped=3, save_every=5)
    assert "samples 12 to 23" in stop.value.do
    rows = records.read(root / "stopped" / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [False, True, False, True, True, True]
    assert [row["skipped_total"] for row in rows] == [0, 1, 1, 2, 3, 4]
    steps = iter([broken] * 20)
    with pytest.raises(UserError, match=r"3 steps in a row .*, the last is 6"):  # resumed at step 5, where two had been skipped
        run(root, "stopped", steps=20, most_skipped=3, save_every=5)
    assert records.read(root / "stopped" / "metrics.jsonl")[-1]["skipped_total"] == 4


def test_a_loss_spike_is_told_with_its_samples_and_does_not_move_the_median(root: Path, monkeypatch: pytest.MonkeyPatch):
    measure, losses = loop.student_pass, [5.0, 4.9, 5.2, 4.8, 5.1, 5.0, 4.7, 5.3, 20.0, 7.4, 7.6, float("nan"), 5.0]
    steps = iter(losses)

    def said(*arguments: Any, **options: Any) -> StepLoss:
        return replace(measure(*arguments, **options), means=(next(steps),))

    monkeypatch.setattr(loop, "student_pass", said)
    rows = records.read(run(root, "spiky", steps=13) / "metrics.jsonl")
    spikes = [row for row in rows if "spike" in row]
    assert [(row["step"], row["first_sample"], row["last_sample"]) for row in spikes] == [(9, 32, 35), (11, 40, 43)]
    assert [row["median_loss"] for row in spikes] == [5.0, statistics.median(losses[:10])]
    assert [row["spike"] for row in spikes] == [4.0, 7.6 / statistics.median(losses[:10])]
