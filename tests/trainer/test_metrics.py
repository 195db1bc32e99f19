"""metrics.jsonl, TensorBoard and W&B get the same rows; a resumed run continues each of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_moe2dense.common import records
from megatron_moe2dense.common.config import build
from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.metrics import Metrics


def config(output: Path, **logging: object) -> DistillConfig:
    settings = {
        "student": "-",
        "teacher": None,
        "output": str(output),
        "data": {"path": "-"},
        "train": {"steps": 4},
        "logging": logging,
    }
    return build(DistillConfig, settings, "the test")


def row(step: int) -> dict[str, float | None]:
    return {"step": step, "loss": step / 10, "kl": None}


def write(settings: DistillConfig, steps: range, resumed_step: int, writes: bool = True) -> None:
    metrics = Metrics(settings, writes, "run-id", resumed_step)
    for step in steps:
        metrics.write(row(step))
    metrics.close()


def test_rows_beyond_the_checkpoint_are_dropped_when_a_run_resumes(tmp_path: Path):
    write(config(tmp_path), range(1, 4), resumed_step=0)
    write(config(tmp_path), range(3, 5), resumed_step=2)
    assert records.read(tmp_path / "metrics.jsonl") == [row(step) for step in range(1, 5)]


def test_only_one_rank_writes(tmp_path: Path):
    write(config(tmp_path, tensorboard=True), range(1, 3), resumed_step=0, writes=False)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_every_number_once(tmp_path: Path):
    write(config(tmp_path, tensorboard=True), range(1, 4), resumed_step=0)
    write(config(tmp_path, tensorboard=True), range(3, 5), resumed_step=2)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, round(event.value, 6)) for event in events.Scalars("loss")] == [(step, step / 10) for step in range(1, 5)]


def test_wandb_works_offline_with_a_run_id_that_survives_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for _ in range(2):
        write(config(tmp_path, wandb={"project": "test"}), range(1, 3), resumed_step=0)
    runs = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert runs
    assert all(name.endswith("-run-id") for name in runs)
