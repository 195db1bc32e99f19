"""The models of the paper, from their public configs: exact sizes of the dense results on meta tensors (docs/method.md#families)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_moe2dense.families.stock import Stock
from tests.families.published import DEEPSEEK_V2_LITE, GPT_OSS_20B, QWEN3_30B_A3B, dense_config

CASES = {
    "qwen3_30b_a3b": (QWEN3_30B_A3B, 6144, 3_340_449_792),
    "deepseek_v2_lite": (DEEPSEEK_V2_LITE, 11264, 2_659_708_416),
    "gpt_oss_20b": (GPT_OSS_20B, 11520, 4_185_089_880),
}


@pytest.mark.parametrize(("published", "width", "parameters"), CASES.values(), ids=list(CASES))
def test_the_dense_result_has_the_papers_parameter_count(published: dict[str, Any], width: int, parameters: int):
    dims = Stock.of(published, "config.json").dims
    assert dims.active * dims.expert_width + dims.shared_width == width
    config = AutoConfig.for_model(**dense_config(published, width))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == parameters
    assert config.rope_parameters["rope_theta"] == published["rope_theta"]
    if "rope_scaling" in published:
        assert config.rope_parameters["factor"] == published["rope_scaling"]["factor"]


@pytest.mark.parametrize("published", [DEEPSEEK_V2_LITE, GPT_OSS_20B], ids=["deepseek_v2_lite", "gpt_oss_20b"])
def test_what_describes_the_published_files_does_not_travel(published: dict[str, Any]):
    assert not {"quantization_config", "auto_map", "experts_per_token"} & set(dense_config(published, 96))
