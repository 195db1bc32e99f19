"""What a student begins with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.trainer import model as models
from megatron_moe2dense.trainer.mapping import WeightMapping
from tests.helpers.tiny_models import tiny, without_routing
from tests.trainer.starts import begun

DENSE: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "deepseek_v2": {"first_k_dense_replace": 4},
    "gpt_oss": {"num_local_experts": 1, "num_experts_per_tok": 1, "intermediate_size": 64},
}


@pytest.mark.parametrize("family", DENSE)
def test_random_ffns_stand_among_the_weights_of_the_checkpoint(family: str, tmp_path: Path):
    directory = tiny(family, tmp_path / "model", **DENSE[family])
    stored = load_file((without_routing(directory) if family == "gpt_oss" else directory) / "model.safetensors")
    random, mixed, other = begun(directory, "random"), begun(directory, "random_ffn"), begun(directory, "random_ffn", seed=1)
    assert set(mixed) == set(stored)
    for name, tensor in mixed.items():
        is_ffn = ".mlp." in name and "router" not in name
        assert torch.equal(tensor, random[name] if is_ffn else stored[name]), name
        if is_ffn and tensor.any():  # biases are drawn as zeros
            assert not torch.equal(tensor, stored[name]), name
            assert not torch.equal(tensor, other[name]), f"{name} does not depend on the seed"
    assert sum(".mlp." in name and bool(tensor.any()) for name, tensor in mixed.items()) >= 4 * 2


def test_the_checkpoint_around_random_ffns_is_still_required(tmp_path: Path):
    directory = tiny("qwen3", tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    save_file({**tensors, "model.layers.0.surplus.weight": torch.ones(2, 2)}, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="surplus"):
        begun(directory, "random_ffn")


def test_a_norm_fused_into_the_ffn_is_not_random(tmp_path: Path):
    """Transformer Engine's layer spec names it as a part of the FFN; the draw goes by the name that the family's table has first."""
    spec = models.ModelSpec.of(json.loads((tiny("qwen3", tmp_path / "model") / "config.json").read_text()), "the test", torch.float32)
    rule, _ = WeightMapping(spec).rule("decoder.layers.0.mlp.linear_fc1.layer_norm_weight")
    assert ".mlp." not in rule.megatron
