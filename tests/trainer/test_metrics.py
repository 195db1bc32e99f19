"""metrics.jsonl, TensorBoard and W&B get the same rows; a resumed run continues each of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from megatron_moe2dense.common import records
from megatron_moe2dense.common.config import build
from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.flops import forward_flops, training_flops
from megatron_moe2dense.trainer.losses import measures
from megatron_moe2dense.trainer.metrics import Metrics, Speed, StepFacts, Tracked, eval_row, step_row
from megatron_moe2dense.trainer.model import ModelSpec
from megatron_moe2dense.trainer.runtime import Runtime, peak_flops
from megatron_moe2dense.trainer.runtime.peaks import bf16_peak
from megatron_moe2dense.trainer.state import TrainState
from megatron_moe2dense.trainer.step import StepLoss
from tests.helpers.tiny_models import tiny


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
    metrics = Metrics(settings, writes, Tracked("run-id", {"world_size": 2}), resumed_step)
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


def test_wandb_is_told_who_where_and_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import wandb

    told: dict[str, Any] = {}
    monkeypatch.setattr(
        wandb, "init", lambda **given: told.update(given) or SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    )
    own = {"entity": "team", "group": "arm", "tags": ["a", "b"], "notes": "why"}
    write(config(tmp_path / "do_acp_k8" / "run", wandb={"project": "test", **own}), range(1, 2), resumed_step=0)
    assert {name: told[name] for name in own} == own
    assert told["name"] == "do_acp_k8/run"
    assert told["id"] == "run-id"
    assert told["config"]["world_size"] == 2
    assert told["config"]["train"]["steps"] == 4


CONTRACT = {"step", "tokens", "loss", "kl", "lr", "grad_norm", "step_seconds", "tokens_per_second", "peak_memory_bytes", "skipped"}
MEASURED: dict[str, float] = {name: 0.25 for name in measures.AGAINST_TEACHER}  # noqa: C420


def facts(is_kl: bool, measured: dict[str, float], collective_seconds: float | None = None) -> StepFacts:
    return StepFacts(StepLoss((1.5,), 80, measured), is_kl, 0.5, 1e-3, 2.0, 0.1, collective_seconds)


def test_a_row_has_the_measures_when_they_were_taken_and_the_kl_when_it_is_known():
    state, speed = TrainState(step=3, tokens=400), Speed(10.0, 100, 1000.0)
    plain = step_row(state, facts(is_kl=True, measured={}), speed, 7)
    assert set(plain) >= CONTRACT
    assert plain["kl"] == plain["loss"] == 1.5
    assert (plain["tokens_per_second"], plain["flops_per_second"], plain["mfu"]) == (40.0, 500.0, 0.5)
    assert step_row(state, facts(is_kl=False, measured={}), speed, 7)["kl"] is None
    logged = step_row(state, facts(is_kl=False, measured=MEASURED, collective_seconds=0.5), speed, 7)
    assert logged["kl"] == logged["top1_agreement"] == logged["teacher_entropy"] == 0.25
    assert set(logged) - set(plain) == {*measures.AGAINST_TEACHER, "collective_seconds"} - {"kl"}


def test_an_evaluation_without_a_teacher_has_no_kl():
    state = TrainState(step=3, tokens=400)
    assert eval_row(state, StepLoss((), 80, MEASURED))["eval_kl"] == 0.25
    student_alone: dict[str, float] = dict.fromkeys(measures.ALONE, 0.25)
    alone = eval_row(state, StepLoss((), 80, student_alone))
    assert alone == {"step": 3, "tokens": 400, "eval_loss": 0.25, "eval_kl": None, "eval_student_entropy": 0.25}


def test_the_share_of_an_unknown_peak_is_unknown():
    assert Speed(10.0, 100, None).row(2.0) == {"flops_per_second": 500.0, "mfu": None}
    assert peak_flops(Runtime(torch.device("cpu"), "gloo", transformer_engine=False), "bfloat16") is None


def test_a_gpu_is_known_by_its_name():
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12}
    names |= {"NVIDIA B200": 2250e12, "NVIDIA GB200": 2500e12}
    assert {name: bf16_peak(name) for name in names} == names
    assert bf16_peak("NVIDIA T4") is None


def test_flops_are_those_of_the_matrix_products_of_stock_transformers(tmp_path: Path):
    """Counted by torch in a stock forward pass of one sequence; attention there is not halved for being causal."""
    length = 32
    counted = {}
    for family in ("qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3"):
        directory = tiny(family, tmp_path / family)
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.zeros(1, length, dtype=torch.long))
        spec = ModelSpec.of(model.config.to_dict(), "the test", torch.float32)
        dims = spec.dims
        widths = dims.head_dim + getattr(model.config, "v_head_dim", dims.head_dim)
        not_attended = dims.layers * dims.heads * widths * (length - 1)  # per token: the half above the diagonal
        counted[family] = forward_flops(spec, length)
        assert counter.get_total_flops() / length == pytest.approx(counted[family] + not_attended, rel=1e-6), family
        if dims.experts:
            router_and_more = forward_flops(spec, length, active=4) - counted[family]
            assert router_and_more == 2 * (4 - 2) * 3 * dims.hidden_size * dims.expert_width * len(spec.moe_layers)
            assert training_flops(spec, spec, length, active=4) == 3 * counted[family] + counted[family] + router_and_more
