"""A family that the surgery knows and the trainer does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families import FAMILIES
from megatron_moe2dense.trainer.config import ParallelConfig
from megatron_moe2dense.trainer.groups import Groups
from megatron_moe2dense.trainer.model import ModelSpec, transformer_fields
from megatron_moe2dense.trainer.outline import count_parameters
from megatron_moe2dense.trainer.runtime import Runtime
from tests.helpers.tiny_models import tiny, tiny_qwen3


def test_a_family_that_the_trainer_does_not_know_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = json.loads((tiny_qwen3(tmp_path / "model") / "config.json").read_text())
    ModelSpec.of(config, "config.json", torch.float32)
    monkeypatch.delitem(FAMILIES, "qwen3")
    with pytest.raises(UserError, match=r"config\.json: model_type 'qwen3'"):
        ModelSpec.of(config, "config.json", torch.float32)


ROPE = {"rope_theta": 1e4}
YARN = {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another slope": ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha 1.5"),
    "attention without biases": ("gpt_oss", {"attention_bias": False}, "attention_bias False"),
    "attention with biases": ("qwen3", {"attention_bias": True}, "attention_bias true"),
    "attention with biases in a MoE": ("qwen3_moe", {"attention_bias": True}, "attention_bias true"),
    "clipped queries": ("olmoe", {"clip_qkv": 8.0}, r"clip_qkv 8\.0"),
    "dynamic positions": ("mistral", {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    "a factor of its own": ("qwen2", {"rope_parameters": {**YARN, "attention_factor": 1.2}}, "attention_factor"),
    "positions of a part": (
        "qwen3",
        {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_megatron_would_compute_otherwise_is_refused(name: str, tmp_path: Path):
    family, options, message = REFUSED[name]
    path = tiny(family, tmp_path / "model") / "config.json"
    spec = ModelSpec.of({**json.loads(path.read_text()), **options}, str(path), torch.float32)
    with pytest.raises(UserError, match=message):
        count_parameters(spec)


def test_experts_with_biases_are_spread_over_ranks_not_split(tmp_path: Path):
    content = json.loads((tiny("gpt_oss", tmp_path / "model") / "config.json").read_text())
    spec, cpu = ModelSpec.of(content, "here", torch.float32), Runtime(torch.device("cpu"), "gloo", transformer_engine=False)
    collection: Any = None
    with pytest.raises(UserError, match=r"parallel\.tensor 2, parallel\.expert 1 with experts that have biases"):
        transformer_fields(spec, Groups(collection, ParallelConfig(tensor=2)), cpu)
    assert transformer_fields(spec, Groups(collection, ParallelConfig(tensor=2, expert=2)), cpu)["num_moe_experts"] == 8
