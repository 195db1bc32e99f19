"""Muon against torch.optim.Muon, and what it refuses. Layouts: test_parity_table.py; resumes: test_checkpoints.py; sizes: plan/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families.stock import Stock
from megatron_moe2dense.operations import dry_run
from megatron_moe2dense.operations.plan.config import PlanConfig
from megatron_moe2dense.trainer import distill
from megatron_moe2dense.trainer.config import DistillConfig, MuonConfig
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe, write_tokens


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32)])
def test_in_bfloat16_it_is_torchs_muon(shape: tuple[int, int], tmp_path: Path):
    from megatron_moe2dense.trainer.muon import Matrices, Muon

    generator = torch.Generator().manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape, generator=generator))
    theirs = torch.nn.Parameter(ours.detach().clone())
    alone: Any = None  # no process group
    config = json.loads((tiny_qwen3(tmp_path) / "config.json").read_text())
    whole = Matrices("plain", Stock.of(config, "here").dims, dim=None)
    found = Muon([{"params": [ours], "lr": 0.02, "weight_decay": 0.1}], [whole], MuonConfig(), (alone, torch.bfloat16))
    expected = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        found.step()
        expected.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # 0.02 of an update is 4e-3 a value


def settings(root: Path, **changes: Any) -> dict[str, Any]:
    files = {"student": str(root / "student"), "teacher": None, "output": str(root / "run")}
    text = {"data": {"path": str(root / "tokens"), "sequence_length": 16}, "batch": {"micro": 1, "global": 2}, "train": {"steps": 1}}
    return {**files, **text, "dtype": "float32", "optim": {"muon": {}}, "parallel": {"distributed_optimizer": False}, **changes}


def test_a_sharded_optimizer_is_refused_by_distill_and_plan(tmp_path: Path):
    with pytest.raises(UserError, match=r"optim.muon takes whole matrices.*parallel.distributed_optimizer=false"):
        build(DistillConfig, settings(tmp_path, parallel={}), "the test")
    with pytest.raises(UserError, match=r"parallel.distributed_optimizer=false"):
        build(PlanConfig, {"student": "s", "teacher": None, "parallel": {}, "optim": {"muon": {}}}, "the test")


def test_a_moe_student_is_refused(tmp_path: Path):
    tiny_qwen3_moe(tmp_path / "student", seed=0)
    write_tokens(tmp_path / "tokens", 200)
    with pytest.raises(UserError, match=r"optim.muon for a MoE"):
        distill.run(build(DistillConfig, settings(tmp_path), "the test"))


def test_its_learning_rate_is_its_own_through_the_schedule_and_memory_is_told(tmp_path: Path):
    from megatron_moe2dense.common import records

    tiny_qwen3(tmp_path / "student", seed=0)
    write_tokens(tmp_path / "tokens", 200)
    schedule = {"style": "linear", "warmup": 0.0, "final": 0.5}
    raw = settings(tmp_path, optim={"lr": 1e-3, "muon": {"lr": 4e-3}}, schedule=schedule, train={"steps": 4})
    config = build(DistillConfig, raw, "the test")
    distill.run(config)
    assert records.read(tmp_path / "run" / "metrics.jsonl")[-1]["lr"] == pytest.approx(4e-3 * 0.5)

    alone = build(DistillConfig, {**raw, "optim": {}}, "the test")
    told, more = (dry_run.facts(each) for each in (config, alone))
    one_stage = [facts["memory_per_process"]["stage 0"]["optimizer"] for facts in (told, more)]
    assert more["memory_bytes"]["student"] - told["memory_bytes"]["student"] == one_stage[1] - one_stage[0] > 0
