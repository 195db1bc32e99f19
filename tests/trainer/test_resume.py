"""Killed or asked to stop in the middle, started again by the same command: metrics and weights end as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_moe2dense.common import records
from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.outputs import MANIFEST
from megatron_moe2dense.serving import export
from megatron_moe2dense.serving.config import ExportConfig
from megatron_moe2dense.trainer.checkpoints.writer import latest, step_of
from tests.helpers.forks import Job, forks
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe, write_tokens
from tests.trainer import runs
from tests.trainer.runs import TIMED

STEPS = 12

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    tiny_qwen3_moe(root / "teacher", seed=1)
    tiny_qwen3(root / "student", seed=2)
    write_tokens(root / "tokens", 32 * 4 * STEPS + 1)
    write_tokens(root / "held-out", 32 * 4 + 1, seed=5)
    return root


def command(root: Path, output: Path) -> list[str]:
    return runs.command(root, output, 32, {"train.steps": STEPS, "train.save_every": 3, "train.eval_every": 2}, {})


def until(job: Job, reached: Callable[[], bool]) -> None:
    """Wait while the job goes on."""
    deadline = time.monotonic() + 200
    while not reached():
        assert None in job.codes(), "the job ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def last_step(output: Path) -> int:
    metrics = output / "metrics.jsonl"
    return max((row["step"] for row in records.read(metrics)), default=0) if metrics.exists() else 0


def outcome(output: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    rows = [{name: value for name, value in row.items() if name not in TIMED} for row in records.read(output / "metrics.jsonl")]
    target = output.parent / f"{output.name} exported"
    export.run(build(ExportConfig, {"checkpoint": str(output), "output": str(target), "dtype": "float32"}, "the test"))
    return rows, load_file(target / "model.safetensors")


def assert_ends_like_an_uninterrupted_run(interrupted: Path, processes: int) -> None:
    """Finish it with the same command, and compare."""
    inputs = interrupted.parent
    straight = inputs / f"straight {processes}"
    if not straight.exists():
        forks().run(command(inputs, straight), processes)
    assert json.loads((interrupted / MANIFEST).read_text())["status"] == "unfinished"
    forks().run(command(inputs, interrupted), processes)
    (rows, weights), (expected_rows, expected) = outcome(interrupted), outcome(straight)
    assert rows == expected_rows
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    shutil.rmtree(interrupted.parent / f"{interrupted.name} exported")
    shutil.rmtree(straight.parent / f"{straight.name} exported")


def test_a_killed_run_of_one_process_ends_like_an_uninterrupted_one(inputs: Path):
    """Of several, every phase: test_faults.py."""
    killed = inputs / "killed"
    job = forks().start(command(inputs, killed))
    until(job, lambda: last_step(killed) >= 5)
    assert job.end() == [-signal.SIGKILL]
    assert_ends_like_an_uninterrupted_run(killed, 1)


@pytest.mark.parametrize(("asked_by", "processes"), [(signal.SIGTERM, 2), (signal.SIGUSR1, 1)])
def test_a_run_that_is_asked_to_stop_saves_its_step_and_exits_cleanly(asked_by: signal.Signals, processes: int, inputs: Path):
    """As torchrun asks, every process of every rank, checkpoint writers among them."""
    stopped = inputs / f"stopped by {asked_by.name}"
    job = forks().start(command(inputs, stopped), processes)
    until(job, lambda: last_step(stopped) >= 4)
    for rank in job.ranks:
        os.killpg(rank, asked_by)
    assert job.wait() == [0] * processes
    saved = latest(stopped / "checkpoints")
    assert saved is not None
    assert 4 <= step_of(saved) == last_step(stopped) < STEPS
    assert_ends_like_an_uninterrupted_run(stopped, processes)


def test_a_half_written_checkpoint_is_never_picked(tmp_path: Path):
    (tmp_path / "step_00000003").mkdir()
    (tmp_path / "step_00000006.tmp").mkdir()
    found = latest(tmp_path)
    assert found is not None
    assert found.name == "step_00000003"
