"""Splits over pipeline stages and batches over layouts: what is refused; recomputation: what runs twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer import model as models
from megatron_moe2dense.trainer import runtime, startup
from megatron_moe2dense.trainer.config import DistillConfig, ParallelConfig
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.layout import Layout, answers, refuse
from megatron_moe2dense.trainer.pipeline import PipelineLayout
from megatron_moe2dense.trainer.runtime import Runtime
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe


@pytest.fixture(scope="module")
def place() -> Iterator[tuple[Groups, Runtime]]:
    with runtime.session("cpu") as device, process_groups.initialized(ParallelConfig(), seed=0) as groups:
        yield groups, device


def test_layers_are_even_unless_said_otherwise():
    parallel = ParallelConfig(pipeline=2, virtual_pipeline=2, layers_per_stage=[2, 1, 1, 2], teacher_layers_per_stage=[7, 1])
    assert PipelineLayout.of_student(parallel, 6) == PipelineLayout((2, 1, 1, 2), 2)
    assert PipelineLayout.of_teacher(parallel, 8) == PipelineLayout((7, 1), 1)
    assert PipelineLayout.of_student(ParallelConfig(pipeline=2, virtual_pipeline=2), 8) == PipelineLayout((2, 2, 2, 2), 2)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"pipeline": 2}, "2 pipeline stages with num_hidden_layers = 5"),
        ({"pipeline": 5, "virtual_pipeline": 2}, "10 pipeline stages with num_hidden_layers = 5"),
        ({"pipeline": 2, "layers_per_stage": [3, 1]}, "2 numbers that add up to 5 layers"),
        ({"pipeline": 2, "layers_per_stage": [3, 1, 1]}, "2 numbers that add up to 5 layers"),
        ({"pipeline": 2, "virtual_pipeline": 2, "layers_per_stage": [3, 2]}, "4 numbers that add up to 5 layers"),
    ],
)
def test_layers_that_do_not_fit_the_stages_are_refused(parallel: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        PipelineLayout.of_student(ParallelConfig(**parallel), 5)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"virtual_pipeline": 2}, "no effect with pipeline: 1"),
        ({"layers_per_stage": [4]}, "no effect with pipeline: 1"),
        ({"teacher_layers_per_stage": [4]}, "no effect with pipeline: 1"),
        ({"pipeline": 3, "layers_per_stage": [2, 0, 2]}, "only the first and the last stage"),
        ({"pipeline": 2, "teacher_layers_per_stage": [5, -1]}, "only the first and the last stage"),
    ],
)
def test_settings_of_stages_without_effect_or_meaning_are_refused(parallel: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        ParallelConfig(**parallel)


def of_run(parallel: dict[str, Any], **changed: Any) -> DistillConfig:
    data = {"path": "text", "sequence_length": 16, "validation": "held-out", "validation_sequences": 4}
    settings = {
        "student": "student",
        "teacher": None,
        "output": "run",
        "data": {**data, **changed.pop("data", {})},
        "parallel": parallel,
        "batch": {"micro": 1, "global": 4},
        "train": {"steps": 1},
    }
    return build(DistillConfig, {**settings, **changed}, "the test")


@pytest.mark.parametrize(
    ("parallel", "changed", "message"),
    [
        ({"pipeline": 2, "virtual_pipeline": 2}, {"batch": {"micro": 1, "global": 3}}, "batch.global=3 with parallel.virtual_pipeline=2"),
        ({"context": 2}, {"data": {"sequence_length": 6}}, "a multiple of 4"),
        ({"context": 2, "tensor": 4, "sequence": True}, {"data": {"sequence_length": 12}}, "a multiple of 8"),
        ({"tensor": 4, "sequence": True}, {"data": {"sequence_length": 6}}, "a multiple of 4"),
    ],
)
def test_batches_that_do_not_divide_over_the_layout_are_refused(parallel: dict[str, Any], changed: dict[str, Any], message: str):
    config = of_run(parallel, **changed)
    place = config.parallel, config.batch, config.data.sequence_length, startup.processes(config.parallel)
    with pytest.raises(UserError, match=message):
        refuse(answers(Layout(None, None, None, *place).questions()))


def test_gradients_are_reduced_during_the_backward_pass_only_where_the_loss_trains_the_head():
    hidden = {"method": "hidden_state"}
    mixed = {"method": "mixture", "terms": [{"weight": 1.0, "loss": hidden}, {"weight": 1.0, "loss": {"method": "forward_kl"}}]}
    of_run({"overlap_gradients": True}, teacher="teacher", loss=mixed)
    with pytest.raises(UserError, match="waits for a gradient of the LM head, loss hidden_state has none"):
        of_run({"overlap_gradients": True}, teacher="teacher", loss=hidden)


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_qwen3_moe])
@pytest.mark.parametrize(("recompute", "times"), [("none", (1, 1)), ("selective", (1, 2)), ("full", (2, 2))])
def test_recomputation_runs_what_it_says_a_second_time(
    make: Any, recompute: Any, times: tuple[int, int], tmp_path: Path, place: tuple[Groups, Runtime]
):
    """times: of attention and of the FFN, in a forward and a backward pass."""
    directory = make(tmp_path / "model", num_hidden_layers=2)
    spec = models.ModelSpec.of(CheckpointIndex.open(directory).config, str(directory), torch.float32)
    fields = models.recompute_fields(ParallelConfig(recompute=recompute), spec)
    (model,) = models.build(spec, *place, PipelineLayout((2,), 1), **fields)
    calls: Counter[str] = Counter()
    inside = "router" if make is tiny_qwen3_moe else "linear_fc1"
    for name, module in model.decoder.layers[1].named_modules():
        if name.endswith(("self_attention.linear_qkv", f"mlp.{inside}")):
            module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    tokens = torch.arange(16).view(1, 16)
    model(tokens, tokens, None).square().sum().backward()
    assert calls == {"self_attention.linear_qkv": times[0], f"mlp.{inside}": times[1]}
