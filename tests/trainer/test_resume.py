"""Kill -9 in the middle, start the same command again: metrics and weights end as if nothing had happened.

Half of `MOE2DENSE_KILLS` (`make chaos`: 20) is how often one rank of a run is killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from megatron_moe2dense.common import records
from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.outputs import MANIFEST
from megatron_moe2dense.trainer import export
from megatron_moe2dense.trainer.checkpoints.writer import latest, step_of
from megatron_moe2dense.trainer.config import ExportConfig
from tests.helpers.distributed import ROOT, environment, torchrun
from tests.helpers.forks import Forks, Job
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe, write_tokens
from tests.trainer import runs
from tests.trainer.runs import TIMED

KILLS = int(os.environ.get("MOE2DENSE_KILLS", "2")) // 2
STEPS, LONG = 8, 8 + 8 * KILLS

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    tiny_qwen3_moe(root / "teacher", seed=1)
    tiny_qwen3(root / "student", seed=2)
    write_tokens(root / "tokens", 32 * 4 * LONG + 1)
    write_tokens(root / "held-out", 32 * 4 + 1, seed=5)
    return root


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """Ranks without the seconds of their imports; torchrun itself starts those that it has to take down."""
    with Forks() as forks:
        yield forks


def command(root: Path, output: Path, **overrides: Any) -> list[str]:
    return runs.command(root, output, 32, {"train.steps": STEPS, "train.save_every": 3, "train.eval_every": 2}, overrides)


def until(reached: Callable[[], bool], ended: Callable[[], bool]) -> None:
    """Wait while the job goes on."""
    deadline = time.monotonic() + 200
    while not reached():
        assert not ended(), "the job ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def under_torchrun(arguments: list[str], reached: Callable[[], bool]) -> subprocess.Popen[bytes]:
    """A job of two ranks that has come to some point, and goes on."""
    job = subprocess.Popen(
        [*torchrun(2), "-m", "megatron_moe2dense", *arguments],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until(reached, lambda: job.poll() is not None)
    return job


def last_step(output: Path) -> int:
    metrics = output / "metrics.jsonl"
    return max((row["step"] for row in records.read(metrics)), default=0) if metrics.exists() else 0


def kill_when(job: Job, reached: Callable[[], bool]) -> None:
    """SIGKILL every rank of the job."""
    until(reached, lambda: None not in job.codes())
    assert set(job.end()) == {-signal.SIGKILL}


def outcome(output: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    rows = [{name: value for name, value in row.items() if name not in TIMED} for row in records.read(output / "metrics.jsonl")]
    target = output.parent / f"{output.name} exported"
    export.run(build(ExportConfig, {"checkpoint": str(output), "output": str(target), "dtype": "float32"}, "the test"))
    return rows, load_file(target / "model.safetensors")


def assert_ends_like_an_uninterrupted_run(interrupted: Path, forks: Forks, processes: int, **overrides: Any) -> None:
    """Finish it with the same command, and compare."""
    inputs = interrupted.parent
    straight = inputs / f"straight {processes}{' long' * bool(overrides)}"
    if not straight.exists():
        forks.run(command(inputs, straight, **overrides), processes)
    if json.loads((interrupted / MANIFEST).read_text())["status"] != "finished":
        forks.run(command(inputs, interrupted, **overrides), processes)
    (rows, weights), (expected_rows, expected) = outcome(interrupted), outcome(straight)
    assert rows == expected_rows
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    shutil.rmtree(interrupted.parent / f"{interrupted.name} exported")
    shutil.rmtree(straight.parent / f"{straight.name} exported")


@pytest.mark.parametrize("killed_at", [1, 5])
def test_a_killed_run_ends_like_an_uninterrupted_one(killed_at: int, inputs: Path, forks: Forks):
    killed = inputs / f"killed {killed_at}"
    kill_when(forks.start(command(inputs, killed)), lambda: last_step(killed) >= killed_at)
    assert_ends_like_an_uninterrupted_run(killed, forks, 1)


def test_a_run_killed_while_it_writes_a_checkpoint_ends_like_an_uninterrupted_one(inputs: Path, forks: Forks):
    killed = inputs / "killed while writing"
    kill_when(forks.start(command(inputs, killed), 2), lambda: any((killed / "checkpoints").glob("step_*.tmp")))
    assert latest(killed / "checkpoints") is None
    assert_ends_like_an_uninterrupted_run(killed, forks, 2)


def kill_one_rank(job: subprocess.Popen[bytes], rank: int) -> None:
    """The workers are torchrun's children, in order of their ranks."""
    psutil.Process(job.pid).children()[rank].kill()


def test_one_rank_killed_again_and_again_changes_nothing(inputs: Path, forks: Forks):
    """Torchrun takes the other rank down; the same command is started again."""
    killed, draw, often = inputs / "one rank killed", random.Random(KILLS), {"train__steps": LONG, "train__save_every": 2}
    for kill in range(KILLS):
        goal = last_step(killed) + draw.randint(1, 4)
        job = under_torchrun(command(inputs, killed, **often), lambda goal=goal: last_step(killed) >= goal)
        time.sleep(draw.uniform(0, 0.2))
        kill_one_rank(job, kill % 2)
        assert job.wait(timeout=100) != 0
    assert last_step(killed) < LONG
    assert_ends_like_an_uninterrupted_run(killed, forks, 2, **often)


def test_sigterm_to_torchrun_saves_too(inputs: Path, forks: Forks):
    """It reaches every process of every rank, checkpoint writers among them."""
    stopped, often = inputs / "torchrun stopped", {"train__steps": LONG, "train__save_every": 2}
    job = under_torchrun(command(inputs, stopped, **often), lambda: last_step(stopped) >= 4)
    job.send_signal(signal.SIGTERM)
    job.wait(timeout=100)
    saved = latest(stopped / "checkpoints")
    assert saved is not None
    assert step_of(saved) == last_step(stopped) < LONG
    assert_ends_like_an_uninterrupted_run(stopped, forks, 2, **often)


@pytest.mark.parametrize("asked_by", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_asked_to_stop_saves_its_step_and_exits_cleanly(asked_by: signal.Signals, inputs: Path, forks: Forks):
    stopped = inputs / f"stopped by {asked_by.name}"
    job = forks.start(command(inputs, stopped))
    until(lambda: last_step(stopped) >= 4, lambda: None not in job.codes())
    os.kill(job.ranks[0], asked_by)
    assert job.wait() == [0]
    saved = latest(stopped / "checkpoints")
    assert saved is not None
    assert 4 <= step_of(saved) == max(row["step"] for row in records.read(stopped / "metrics.jsonl")) < STEPS
    assert_ends_like_an_uninterrupted_run(stopped, forks, 1)


def test_a_half_written_checkpoint_is_never_picked(tmp_path: Path):
    (tmp_path / "step_00000003").mkdir()
    (tmp_path / "step_00000006.tmp").mkdir()
    found = latest(tmp_path)
    assert found is not None
    assert found.name == "step_00000003"
