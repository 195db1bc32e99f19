"""Measures, evaluation and export after one optimizer step, against stock transformers models in one process.

Every layout's loss, gradients and weights are in the parity table (test_parity_table.py); here are one or two of each kind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_moe2dense.common import records
from tests.helpers.forks import launch
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe, write_tokens
from tests.trainer.reference import LENGTH, SAMPLES, Reference, assert_measures, assert_same, one_step, step_config

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "TP2 SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "DP2": (2, {}),
    "CP2": (2, {"context": 2}),
    "TP2 x PP2": (4, {"tensor": 2, "pipeline": 2}),
    "TP2 SP x EP2 teacher": (4, {"tensor": 2, "sequence": True, "expert": 2}),
}

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parity")
    tiny_qwen3_moe(root / "teacher", seed=1)
    tiny_qwen3(root / "student", seed=2)
    write_tokens(root / "tokens", LENGTH * SAMPLES + 1)
    return root


def config(root: Path, output: str, parallel: dict[str, Any], teacher: str | None = "teacher") -> dict[str, Any]:
    return step_config(root, (("student" if teacher else "teacher"), teacher), root / "runs" / output, parallel)


@pytest.fixture(scope="module")
def runs(inputs: Path) -> Path:
    """The layouts, trained for one step; one spawn for each number of processes."""
    for processes in (1, 2, 4):
        configs = [config(inputs, name, parallel) for name, (count, parallel) in LAYOUTS.items() if count == processes]
        language = [config(inputs, f"language {processes}", {"expert": processes}, teacher=None)]
        launch(processes, "tests.trainer.cases:distill_all", configs + language)
    return inputs / "runs"


@pytest.fixture(scope="module")
def reference(inputs: Path) -> Reference:
    return one_step(inputs / "student", inputs / "teacher", str(inputs / "tokens"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_distillation_step_equals_plain_pytorch(layout: str, runs: Path, reference: Reference):
    assert_same(runs / layout, reference)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_language_modelling_step_of_a_moe_equals_plain_pytorch(processes: int, runs: Path, inputs: Path):
    """teacher: null, expert parallelism over the processes, no balancing loss."""
    expected = one_step(inputs / "teacher", None, str(inputs / "tokens"))
    row = records.read(runs / f"language {processes}" / "metrics.jsonl")[0]
    assert_measures(row, expected.measures_before)
    assert not {"top1_agreement", "teacher_entropy"} & set(row)
    assert row["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert row["grad_norm"] == pytest.approx(expected.grad_norm, rel=1e-5)
