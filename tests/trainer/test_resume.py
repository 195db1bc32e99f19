"""Kill -9 in the middle, start the same command again: metrics and weights end as if nothing had happened."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from megatron_moe2dense.common import records
from megatron_moe2dense.common.config import build
from megatron_moe2dense.trainer import export
from megatron_moe2dense.trainer.config import ExportConfig
from megatron_moe2dense.trainer.writer import latest, step_of
from tests.helpers.distributed import ROOT, environment, torchrun
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe, write_tokens

STEPS, TIMED = 8, ("step_seconds", "data_seconds", "collective_seconds", "tokens_per_second", "flops_per_second", "peak_memory_bytes")

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    tiny_qwen3_moe(root / "teacher", seed=1)
    tiny_qwen3(root / "student", seed=2)
    write_tokens(root / "tokens", 32 * 4 * STEPS + 1)
    write_tokens(root / "held-out", 32 * 4 + 1, seed=5)
    return root


def command(root: Path, output: Path, processes: int) -> list[str]:
    start = [sys.executable] if processes == 1 else torchrun(processes)
    settings = {
        "student": root / "student",
        "teacher": root / "teacher",
        "output": output,
        "data.path": root / "tokens",
        "data.validation": root / "held-out",
        "data.validation_sequences": 4,
        "data.sequence_length": 32,
        "batch.micro": 2,
        "batch.global": 4,
        "optim.lr": 1e-3,
        "train.steps": STEPS,
        "train.save_every": 3,
        "train.eval_every": 2,
        "teacher_check.loss_bound": "null",
        "dtype": "float32",
    }
    return [*start, "-m", "megatron_moe2dense", "distill", *(f"{name}={value}" for name, value in settings.items())]


def finish(arguments: list[str]) -> None:
    done = subprocess.run(arguments, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def start_until(arguments: list[str], output: Path, step: int) -> subprocess.Popen[bytes]:
    """A job that has written the step to metrics.jsonl, and goes on."""
    metrics = output / "metrics.jsonl"
    job = subprocess.Popen(arguments, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (metrics.exists() and any(row["step"] >= step for row in records.read(metrics))):
        assert job.poll() is None, "the job ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return job


def kill_at(arguments: list[str], output: Path, step: int) -> None:
    """SIGKILL every process of the job as soon as metrics.jsonl has the step."""
    job = start_until(arguments, output, step)
    family = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    for process in family:  # torchrun gives its workers sessions of their own, so there is no one group to kill
        process.kill()
    psutil.wait_procs(family)


def outcome(output: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    rows = [{name: value for name, value in row.items() if name not in TIMED} for row in records.read(output / "metrics.jsonl")]
    target = output.parent / f"{output.name} exported"
    export.run(build(ExportConfig, {"checkpoint": str(output), "output": str(target), "dtype": "float32"}, "the test"))
    return rows, load_file(target / "model.safetensors")


def assert_ends_like_an_uninterrupted_run(interrupted: Path, inputs: Path, processes: int) -> None:
    """Finish it with the same command, and compare."""
    straight = inputs / f"straight {processes}"
    if not straight.exists():
        finish(command(inputs, straight, processes))
    finish(command(inputs, interrupted, processes))
    (rows, weights), (expected_rows, expected) = outcome(interrupted), outcome(straight)
    assert rows == expected_rows
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    shutil.rmtree(interrupted.parent / f"{interrupted.name} exported")
    shutil.rmtree(straight.parent / f"{straight.name} exported")


@pytest.mark.parametrize(("processes", "killed_at"), [(1, 1), (1, 5), (2, 4)])
def test_a_killed_run_ends_like_an_uninterrupted_one(processes: int, killed_at: int, inputs: Path):
    killed = inputs / f"killed {processes} {killed_at}"
    kill_at(command(inputs, killed, processes), killed, killed_at)
    assert_ends_like_an_uninterrupted_run(killed, inputs, processes)


@pytest.mark.parametrize("asked_by", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_asked_to_stop_saves_its_step_and_exits_cleanly(asked_by: signal.Signals, inputs: Path):
    stopped = inputs / f"stopped by {asked_by.name}"
    job = start_until(command(inputs, stopped, 1), stopped, 4)
    job.send_signal(asked_by)
    assert job.wait(timeout=100) == 0
    saved = latest(stopped / "checkpoints")
    assert saved is not None
    assert 4 <= step_of(saved) == max(row["step"] for row in records.read(stopped / "metrics.jsonl")) < STEPS
    assert_ends_like_an_uninterrupted_run(stopped, inputs, 1)


def test_a_half_written_checkpoint_is_never_picked(tmp_path: Path):
    (tmp_path / "step_00000003").mkdir()
    (tmp_path / "step_00000006.tmp").mkdir()
    found = latest(tmp_path)
    assert found is not None
    assert found.name == "step_00000003"
