"""Parallel layouts that a model allows, and those that it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.common.outputs import read_json
from megatron_moe2dense.operations.doctor.readiness import Resources, judge
from megatron_moe2dense.trainer.config import DistillConfig, ParallelConfig
from megatron_moe2dense.trainer.model import ModelSpec, require_division
from tests.helpers.tiny_models import tiny, tiny_qwen3_moe, write_tokens


def test_a_moe_is_trained_with_tensor_parallelism_alone(tmp_path: Path):
    """A MoE student with parallel.tensor above 1 and no parallel.sequence: refused at the start, and by `doctor`."""
    tiny_qwen3_moe(tmp_path / "student")
    write_tokens(tmp_path / "tokens", 1000)
    settings: dict[str, Any] = {
        "student": str(tmp_path / "student"),
        "teacher": None,
        "output": str(tmp_path / "run"),
        "data": {"path": str(tmp_path / "tokens"), "sequence_length": 16},
        "parallel": {"tensor": 2},
        "batch": {"micro": 1, "global": 4},
        "train": {"steps": 1},
    }
    config = build(DistillConfig, settings, "the test")
    [found] = [item for item in judge(config, Resources([], 2)) if item.level == "error"]
    assert (found.name, found.found) == ("student's experts", "a MoE student with parallel.tensor 2")
    assert found.do is not None
    assert found.do.startswith("set parallel.sequence=true")
    allowed = build(DistillConfig, {**settings, "parallel": {"tensor": 2, "sequence": True}}, "the test")
    assert not [item for item in judge(allowed, Resources([], 2)) if item.level == "error"]


@pytest.mark.parametrize(
    ("family", "sizes", "parallel", "problem"),
    [
        ("qwen3", {"num_attention_heads": 12, "num_key_value_heads": 4}, {"tensor": 6}, "num_key_value_heads = 4"),
        ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 3}, {"tensor": 4}, "num_key_value_heads = 3"),
        ("qwen3", {"intermediate_size": 130}, {"tensor": 4}, "the FFN width = 130"),
        (
            "qwen3",
            {"num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 96},
            {"tensor": 3},
            "the padded vocabulary = 256",
        ),
        ("qwen3_moe", {"moe_intermediate_size": 18}, {"tensor": 4, "sequence": True}, "the experts' width = 18"),
        ("qwen3_moe", {}, {"expert": 3}, "num_experts = 8"),
        ("olmoe", {"num_key_value_heads": 2}, {"tensor": 4, "sequence": True}, "and a norm over all heads"),
    ],
)
def test_a_layout_does_not_divide_the_model(family: str, sizes: dict[str, Any], parallel: dict[str, Any], problem: str, tmp_path: Path):
    """Heads, widths, vocabulary or experts that do not divide over their ranks: refused by name, before Megatron-Core's assertion."""
    spec = ModelSpec.of(read_json(tiny(family, tmp_path / "model", **sizes) / "config.json", "a model"), "the test", torch.float32)
    with pytest.raises(UserError) as refused:
        require_division(spec, ParallelConfig(**parallel))
    assert problem in refused.value.found


def test_kv_heads_are_fewer_than_ranks(tmp_path: Path):
    """parallel.tensor a multiple of the KV heads: allowed, ranks share them, with the numbers of one process (the parity table)."""
    spec = ModelSpec.of(read_json(tiny("qwen3", tmp_path / "model") / "config.json", "a model"), "the test", torch.float32)
    assert spec.dims.kv_heads == 2
    for tensor in (1, 2, 4):
        require_division(spec, ParallelConfig(tensor=tensor))
