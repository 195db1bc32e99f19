"""Jobs of the launch scripts on this machine: Slurm's commands are those of tests/launch/slurm, torchrun and the ranks are real."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from megatron_moe2dense.common import records
from megatron_moe2dense.common.config import build
from megatron_moe2dense.serving import export
from megatron_moe2dense.serving.config import ExportConfig
from tests.helpers.distributed import ROOT, environment
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe, write_tokens

SLURM = ROOT / "tests/launch/slurm"
STEPS = 60


def variables(folder: Path, **more: str) -> dict[str, str]:
    """Environment of a submission; `folder` takes what the stand-ins of Slurm note, and the logs."""
    (folder / "spool").mkdir(parents=True, exist_ok=True)
    return {
        **environment(),
        "PATH": f"{SLURM}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PROCESSES": "1",
        "LOCAL_ADDR": "127.0.0.1",
        "LOG_DIR": str(folder / "logs"),
        "FAKE_SLURM": str(folder / "spool"),
        **more,
    }


def write_inputs(root: Path, teacher: bool) -> Path:
    """A dense student, tokens, a tiny MoE teacher (its verification takes each start some seconds); returns the YAML of `STEPS` steps."""
    if teacher:
        tiny_qwen3_moe(root / "teacher", seed=1)
    tiny_qwen3(root / "student", seed=2)
    write_tokens(root / "tokens", 32 * 4 * STEPS + 1)
    config = root / "run.yaml"
    config.write_text(f"""
student: {root}/student
teacher: {f"{root}/teacher" if teacher else "null"}
data: {{path: {root}/tokens, sequence_length: 32}}
batch: {{micro: 2, global: 4}}
optim: {{lr: 1.0e-3}}
train: {{steps: {STEPS}, save_every: 5}}
dtype: float32
{"teacher_check: {loss_bound: null}" if teacher else ""}
""")
    return config


@contextlib.contextmanager
def started(command: list[Any], folder: Path, **more: str) -> Iterator[subprocess.Popen[str]]:
    """Start a script; its stdout and stderr go to `folder`/said. What still runs after the block is killed."""
    environment_of_job = variables(folder, **more)
    with (folder / "said").open("a") as said:
        job = subprocess.Popen([str(item) for item in command], cwd=ROOT, env=environment_of_job, stdout=said, stderr=said, text=True)
    try:
        yield job
    finally:
        if job.poll() is None:
            for process in [*psutil.Process(job.pid).children(recursive=True), job]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            job.wait()


def submit(nodes: int, *arguments: Any) -> list[Any]:
    """The command that submits distill.slurm."""
    return ["sbatch", "--nodes", nodes, ROOT / "launch/distill.slurm", *arguments]


def last_step(output: Path) -> int:
    """0 before the first."""
    metrics = output / "metrics.jsonl"
    return max((row["step"] for row in records.read(metrics)), default=0) if metrics.exists() else 0


def wait_until(job: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    """Fails when the job ends before."""
    deadline = time.monotonic() + 300
    while not reached():
        assert job.poll() is None, "the job ended before it came that far"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def agents(job: subprocess.Popen[str]) -> list[psutil.Process]:
    """The torchrun processes of a job, in the order they were started."""
    found = []
    for process in psutil.Process(job.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end while one looks; a zombie has no command line either
            if "torch.distributed.run" in process.cmdline():
                found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def ranks(job: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that train."""
    return [rank for agent in agents(job) for rank in agent.children()]


def said(folder: Path) -> str:
    """All that a job printed, on all nodes."""
    return "\n".join(file.read_text() for file in [folder / "said", *sorted((folder / "logs").glob("node_*.txt"))])


def weights(output: Path) -> dict[str, torch.Tensor]:
    """What export makes of a run."""
    target = output.with_name(f"{output.name} exported")
    export.run(build(ExportConfig, {"checkpoint": str(output), "output": str(target), "dtype": "float32"}, "the test"))
    return load_file(target / "model.safetensors")


def assert_same_run(output: Path, straight: Path) -> None:
    """Every step once and in order; losses and weights are those of the other run, up to float32 rounding of other sums."""
    rows, expected = ([row for row in records.read(run / "metrics.jsonl") if "loss" in row] for run in (output, straight))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in expected]
    losses, expected_losses = (torch.tensor([row["loss"] for row in run]) for run in (rows, expected))
    torch.testing.assert_close(losses, expected_losses, rtol=1e-4, atol=0)
    torch.testing.assert_close(weights(output), weights(straight), rtol=0, atol=1e-4)
