"""The outline of a model: what Megatron-Core builds, without building it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_moe2dense.families import FAMILIES
from megatron_moe2dense.trainer import groups as process_groups
from megatron_moe2dense.trainer import model as models
from megatron_moe2dense.trainer import runtime
from megatron_moe2dense.trainer.config import ParallelConfig
from megatron_moe2dense.trainer.model import ModelSpec
from megatron_moe2dense.trainer.outline import count_parameters, outline
from megatron_moe2dense.trainer.pipeline import PipelineLayout
from tests.families.published import DEEPSEEK_V2_LITE, QWEN3_30B_A3B
from tests.helpers.tiny_models import tiny

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_the_weights_of_its_kind_by_name_and_shape(family: str, tmp_path: Path):
    content = json.loads((tiny(family, tmp_path) / "config.json").read_text())
    spec = ModelSpec.of(content, str(tmp_path), torch.float32)
    with runtime.session("cpu") as device, process_groups.initialized(ParallelConfig(), 0) as groups:
        (model,) = models.build(spec, groups, device, PipelineLayout.of_student(groups.parallel, spec.dims.layers))
        built = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    whole, moe = outline(spec), spec.moe_layers
    told = [(whole.embedding.name, whole.embedding.shape)]
    for number in range(spec.dims.layers):
        told += [(re.sub(r"\.layers\.\d+", f".layers.{number}", each.name), each.shape) for each in whole.layers[number in moe]]
    assert told + [(each.name, each.shape) for each in whole.last] == built


@pytest.mark.parametrize("config", [QWEN3_30B_A3B, DEEPSEEK_V2_LITE], ids=["qwen3_30b_a3b", "deepseek_v2_lite"])
def test_it_takes_no_process_group_no_memory_and_no_time(config: dict[str, object]):
    spec = ModelSpec.of(config, "published", torch.bfloat16)
    drawn, device_of_megatron = torch.get_rng_state(), torch.cuda.current_device
    started = time.process_time()
    total, active = count_parameters(spec)
    assert time.process_time() - started < 2
    assert total > 15e9 > 4e9 > active
    assert not dist.is_initialized()
    assert torch.get_rng_state().equal(drawn)
    assert torch.cuda.current_device is device_of_megatron
