"""The GPU smoke run, as far as it goes without a GPU: its comparison, its table, one short run, and what it says where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe2dense.operations.smoke import run
from megatron_moe2dense.operations.smoke.parity import Side, compare, kernels
from megatron_moe2dense.operations.smoke.report import Row, exit_code, report
from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer import runtime, weights
from megatron_moe2dense.trainer.config import ParallelConfig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _from_the_top_of_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_comparison_passes_bfloat16_noise_and_fails_other_weights(monkeypatch: pytest.MonkeyPatch):
    with runtime.session("auto") as chosen, process_groups.initialized(ParallelConfig(), seed=0) as groups:
        tokens_BS, model = run.sample(chosen.device)[:1, :65], run.EXAMPLE / "model"
        wide, half = Side("float32", chosen, torch.float32), Side("bfloat16", chosen, torch.bfloat16)
        rows = compare(model, tokens_BS, (half, wide), groups)
        assert [row.check.split(",")[0] for row in rows] == ["logits", "loss", "gradients"]
        assert all(row.passed for row in rows)
        assert all(float(row.found) > 0 for row in rows), "two types never agree to the last bit"
        assert "aten::mm" in kernels(model, tokens_BS, wide, groups)

        load = weights.load

        @torch.no_grad()
        def load_worse(chunks: Any, *place: Any) -> None:
            load(chunks, *place)
            for parameter in chunks[0].parameters():
                if parameter.dtype == torch.bfloat16 and parameter.dim() > 1:
                    parameter += 0.3 * parameter.std() * torch.randn_like(parameter)

        monkeypatch.setattr(weights, "load", load_worse)
        assert not any(row.passed for row in compare(model, tokens_BS, (half, wide), groups) if not row.check.startswith("loss"))


def test_the_table_counts_and_the_exit_code_follows():
    good, bad, figure = Row("parity", "1e-3", True, "<= 1e-2"), Row("loss", "rises", False, "falls"), Row("throughput", "9 tokens/s")
    assert "PASS: 1 passed, 0 failed" in report([good, figure])
    assert "FAIL: 1 passed, 1 failed" in report([good, bad, figure])
    assert (exit_code([good, figure]), exit_code([good, bad]), exit_code([figure])) == (0, 1, 1)


def test_kernels_are_told_by_their_names(capsys: pytest.CaptureFixture[str]):
    names = ["nvjet_hsh_128x256", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "rmsnorm_fwd"]
    assert [row.passed for row in run.kernel_rows(names)] == [True, True]
    assert [row.passed for row in run.kernel_rows(names[2:])] == [False, False]
    assert "rmsnorm_fwd" in capsys.readouterr().out


def test_the_runs_are_those_that_the_gpus_allow():
    assert [trial.name for trial in run.trials(1, (8, 0))] == ["1 GPU"]
    assert [trial.name for trial in run.trials(1, (9, 0))] == ["1 GPU", "1 GPU, FP8"]
    assert {trial.processes for trial in run.trials(8, (9, 0))} == {1, 2}
    assert len(run.trials(8, (9, 0))) == 5


@pytest.mark.distributed
def test_a_short_distillation_ends_in_rows_that_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    trial = run.Trial("1 process", 1, 4, ("batch.micro=4", "batch.global=4", "schedule.warmup=0.0"))
    rows = run.distilled(trial, tmp_path, device="cpu")
    assert [row.passed for row in rows] == [True, True, None], rows
    assert rows[2].found.endswith("tokens/s")
    assert run.command_row("broken", [sys.executable, "-c", "raise SystemExit(3)"]) == Row("broken", "exit code 3", False, "exit code 0")


def test_without_a_gpu_it_says_so_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "out"
    assert run.main(output) == 2
    assert "no GPU" in capsys.readouterr().err
    tool = tmp_path / "nvidia-smi"
    for script in (None, "#!/bin/sh\nexit 9\n"):  # no driver, and a driver without a device
        if script is not None:
            tool.write_text(script)
            tool.chmod(0o755)
        environment = {**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin", "OUT": str(output), "PYTHON": "false"}
        done = subprocess.run(["launch/gpu_smoke.sh"], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 2, "PYTHON was not started"
        assert "lists no GPU" in done.stderr
    assert not output.exists()
