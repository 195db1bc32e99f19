"""What a student begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.trainer import distill, initialize, runtime, weights
from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer import model as models
from megatron_moe2dense.trainer.config import DistillConfig
from megatron_moe2dense.trainer.pipeline import PipelineLayout
from tests.helpers.tiny_models import tiny, without_routing


def begun(directory: Path, how: str, seed: int = 0, dtype: str = "float32") -> dict[str, torch.Tensor]:
    """The Hugging Face tensors of the student that a run starts with."""
    settings: dict[str, Any] = {"student": str(directory), "teacher": None, "output": str(directory / "run"), "initialize": how}
    config = DistillConfig(**settings, data={"path": "tokens"}, train={"steps": 1, "seed": seed}, dtype=dtype)  # type: ignore[arg-type]
    with runtime.session("cpu") as device, process_groups.initialized(config.parallel, seed) as groups:
        spec = distill.student_spec(config)
        chunks = models.build(spec, groups, device, PipelineLayout.of_student(config.parallel, spec.dims.layers))
        initialize.start(config, chunks, spec, groups)
        return {name: tensor.clone() for name, tensor in weights.unload(chunks[0], spec)}


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


def test_a_norm_fused_into_the_ffn_is_not_random():
    block = nn.Module()
    block.mlp = nn.Module()
    block.mlp.linear_fc1 = linear = nn.Linear(2, 2)
    linear.register_parameter("layer_norm_weight", nn.Parameter(torch.ones(2)))
    model: Any = nn.ModuleDict({"layers": nn.ModuleList([block])})  # named as Transformer Engine's layer spec names it
    found = initialize.ffn_weights([model])
    assert {id(weight) for weight in found} == {id(linear.weight), id(linear.bias)}
