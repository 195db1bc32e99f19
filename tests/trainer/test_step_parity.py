"""Measures, evaluation and export after one optimizer step, against stock transformers models in one process.

Every layout's loss, gradients and weights are in the parity table (test_parity_table.py), the measures and exports of the other axes in
test_family_parity.py; here are data-parallel replicas, and a MoE without a teacher.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_moe2dense.common import records
from tests.helpers.forks import launch
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe, write_tokens
from tests.trainer.reference import LENGTH, SAMPLES, assert_measures, assert_same, one_step, step_config

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, tokens, and both runs on two processes."""
    root = tmp_path_factory.mktemp("parity")
    tiny_qwen3_moe(root / "teacher", seed=1)
    tiny_qwen3(root / "student", seed=2)
    write_tokens(root / "tokens", LENGTH * SAMPLES + 1)
    distilled = step_config(root, ("student", "teacher"), root / "distilled", {})
    language = step_config(root, ("teacher", None), root / "language", {"expert": 2})
    launch(2, "tests.trainer.cases:distill_all", [distilled, language])
    return root


def test_a_distillation_step_of_two_replicas_equals_plain_pytorch(root: Path):
    assert_same(root / "distilled", one_step(root / "student", root / "teacher", str(root / "tokens")))


def test_a_language_modelling_step_of_a_moe_equals_plain_pytorch(root: Path):
    """teacher: null, expert parallelism over the processes, no balancing loss."""
    expected = one_step(root / "teacher", None, str(root / "tokens"))
    row = records.read(root / "language" / "metrics.jsonl")[0]
    assert_measures(row, expected.measures_before)
    assert not {"top1_agreement", "teacher_entropy"} & set(row)
    assert row["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert row["grad_norm"] == pytest.approx(expected.grad_norm, rel=1e-5)
