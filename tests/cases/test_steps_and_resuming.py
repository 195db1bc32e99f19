"""Steps with nothing to learn from, and runs that go on with other settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_moe2dense.common import records
from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.serving import export
from megatron_moe2dense.serving.config import ExportConfig
from megatron_moe2dense.trainer import distill, loop
from megatron_moe2dense.trainer.config import DistillConfig
from tests.helpers.forks import launch
from tests.helpers.tiny_models import write_tokens
from tests.trainer.runs import alone, with_student

PAD, LENGTH = 3, 16


def weights(root: Path, run: str) -> dict[str, torch.Tensor]:
    export.run(build(ExportConfig, {"checkpoint": str(root / run), "output": str(root / f"{run} exported")}, "the test"))
    return load_file(root / f"{run} exported" / "model.safetensors")


def padded(root: Path, **train: Any) -> DistillConfig:
    """A run of one sample a step, half of which are padding."""
    tokens = np.random.default_rng(0).integers(10, 256, 6 * LENGTH + 1)
    tokens[: 3 * LENGTH + 1] = PAD
    data = {"path": write_tokens(root / "padded", tokens), "sequence_length": LENGTH, "pad_token": PAD}
    return build(DistillConfig, alone(root, "run", data=data, batch={"micro": 1, "global": 1}, train={"steps": 6, **train}), "the test")


def test_a_step_is_all_padding(tmp_path: Path):
    """A step in which every token is masked: no update, its loss is NaN, and it is counted with the skipped ones."""
    distill.run(padded(with_student(tmp_path), log_every=1))
    rows = records.read(tmp_path / "run" / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [row["loss"] != row["loss"] for row in rows]
    assert sum(row["skipped"] for row in rows) == rows[-1]["skipped_total"] == 3
    assert [row["grad_norm"] is None for row in rows] == [row["skipped"] for row in rows]


def test_all_of_the_text_is_padding(tmp_path: Path):
    """More steps in a row than train.most_skipped in which every token is masked: the run stops and names their samples."""
    config = padded(with_student(tmp_path), most_skipped=2)
    data = config.data.model_copy(update={"path": write_tokens(tmp_path / "nothing", np.full(6 * LENGTH + 1, PAD))})
    with pytest.raises(UserError, match="2 steps in a row") as stop:
        distill.run(config.model_copy(update={"data": data}))
    assert "prediction that is not masked" in stop.value.expected
    assert "samples 0 to 1" in stop.value.do


def evaluated(root: Path, output: str, **batch: Any) -> dict[str, Any]:
    data = {"path": str(root / "tokens"), "sequence_length": LENGTH, "validation": str(root / "held-out"), "validation_sequences": 2}
    return alone(root, output, data=data, batch={"micro": 1, "global": 4, **batch}, train={"steps": 4, "eval_every": 1, "save_every": 2})


@pytest.mark.distributed
def test_four_ranks_evaluate_two_sequences(tmp_path: Path):
    """Fewer held-out sequences than data-parallel ranks: the evaluation is that of one process."""
    write_tokens(with_student(tmp_path) / "held-out", 4 * LENGTH + 1, seed=9)
    distill.run(build(DistillConfig, evaluated(tmp_path, "alone"), "the test"))
    launch(4, "tests.trainer.cases:distill_all", [evaluated(tmp_path, "on four")])
    paths = [tmp_path / name / "metrics.jsonl" for name in ("alone", "on four")]
    one, other = ([row["eval_loss"] for row in records.read(path) if "eval_loss" in row] for path in paths)
    assert len(one) == 4
    assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_with_another_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """batch.micro and data.validation_sequences changed before resuming: the run goes on, to the weights of an uninterrupted one."""
    write_tokens(with_student(tmp_path) / "held-out", 4 * LENGTH + 1, seed=9)
    distill.run(build(DistillConfig, evaluated(tmp_path, "straight"), "the test"))
    measure, steps = loop.student_pass, iter(range(100))

    def killed(*arguments: Any, **options: Any) -> Any:
        if next(steps) == 6:  # of the third step; evaluations count too
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    monkeypatch.setattr(loop, "student_pass", killed)
    with pytest.raises(KeyboardInterrupt):
        distill.run(build(DistillConfig, evaluated(tmp_path, "resumed"), "the test"))
    monkeypatch.undo()
    changed = evaluated(tmp_path, "resumed", micro=2)
    changed["data"]["validation_sequences"] = 3
    distill.run(build(DistillConfig, changed, "the test"))
    assert [row["step"] for row in records.read(tmp_path / "resumed" / "metrics.jsonl") if "loss" in row] == [1, 2, 3, 4]
    expected = weights(tmp_path, "straight")
    for name, tensor in weights(tmp_path, "resumed").items():
        assert torch.allclose(tensor, expected[name], rtol=1e-4, atol=1e-6), name
