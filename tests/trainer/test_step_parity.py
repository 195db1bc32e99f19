"""One optimizer step of the Megatron trainer, in every layout, against stock transformers models in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_moe2dense.common import records
from megatron_moe2dense.common.config import build
from megatron_moe2dense.trainer import export
from megatron_moe2dense.trainer.config import ExportConfig
from tests.helpers.distributed import launch
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe, write_tokens
from tests.trainer.reference import Reference, one_step

LENGTH, SAMPLES, LR = 32, 8, 1e-3
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "TP2": (2, {"tensor": 2}),
    "TP2 SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "DP2": (2, {}),
    "DP2 plain optimizer": (2, {"distributed_optimizer": False}),
    "EP2 teacher": (2, {"expert": 2}),
    "TP2 x PP2": (4, {"tensor": 2, "pipeline": 2}),
    "TP2 SP x EP2 teacher": (4, {"tensor": 2, "sequence": True, "expert": 2}),
    "PP2 x DP2": (4, {"pipeline": 2}),
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
    return {
        "student": str(root / ("student" if teacher else "teacher")),
        "teacher": str(root / teacher) if teacher else None,
        "output": str(root / "runs" / output),
        "data": {"path": str(root / "tokens"), "sequence_length": LENGTH},
        "parallel": parallel,
        "optim": {"lr": LR},
        "schedule": {"style": "constant", "warmup": 0.0},
        "batch": {"micro": 2, "global": SAMPLES},
        "train": {"steps": 1},
        "dtype": "float32",
    }


@pytest.fixture(scope="module")
def runs(inputs: Path) -> Path:
    """All layouts, trained for one step; one spawn for each number of processes."""
    for processes in (1, 2, 4):
        configs = [config(inputs, name, parallel) for name, (count, parallel) in LAYOUTS.items() if count == processes]
        language = [config(inputs, f"language {processes}", {"expert": processes}, teacher=None)]
        launch(processes, "tests.trainer.cases:distill_all", configs + language)
    return inputs / "runs"


@pytest.fixture(scope="module")
def reference(inputs: Path) -> Reference:
    return one_step(inputs / "student", inputs / "teacher", str(inputs / "tokens"), LENGTH, LR)


def assert_same(run: Path, expected: Reference) -> None:
    row = records.read(run / "metrics.jsonl")[0]
    assert row["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert row["grad_norm"] == pytest.approx(expected.grad_norm, rel=1e-5)
    target = run.parent / f"{run.name} exported"
    export.run(build(ExportConfig, {"checkpoint": str(run), "output": str(target), "dtype": "float32"}, "the test"))
    found = load_file(target / "model.safetensors")
    assert found.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        difference = torch.linalg.vector_norm(found[name].double() - weight.double()) / torch.linalg.vector_norm(weight.double())
        assert difference < 1e-5, f"{name}: {difference}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_distillation_step_equals_plain_pytorch(layout: str, runs: Path, reference: Reference):
    assert_same(runs / layout, reference)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_language_modelling_step_of_a_moe_equals_plain_pytorch(processes: int, runs: Path, inputs: Path):
    """teacher: null, expert parallelism over the processes, no balancing loss."""
    expected = one_step(inputs / "teacher", None, str(inputs / "tokens"), LENGTH, LR)
    row = records.read(runs / f"language {processes}" / "metrics.jsonl")[0]
    assert row["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert row["grad_norm"] == pytest.approx(expected.grad_norm, rel=1e-5)
