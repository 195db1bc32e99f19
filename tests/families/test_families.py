"""What the trainer needs of a family, against stock transformers: sizes, tensor names, dense configs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families import FAMILIES, family_of
from megatron_moe2dense.families.stock import Stock
from megatron_moe2dense.trainer.mapping import WeightMapping
from megatron_moe2dense.trainer.model import ModelSpec
from megatron_moe2dense.trainer.outline import outline
from megatron_moe2dense.trainer.weights import files_of
from tests.families.published import QWEN3_30B_A3B, dense_config
from tests.helpers.tiny_models import tiny, tiny_qwen3_moe


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options", [{}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}]
)
def test_sizes_are_those_of_the_transformers_config(family: str, options: dict[str, Any], tmp_path: Path):
    path = tiny(family, tmp_path / "model", **options)
    content, config = CheckpointIndex.open(path).config, AutoConfig.from_pretrained(path)
    assert family_of(content, "here") is FAMILIES[family]
    experts = next((getattr(config, name) for name in ("num_experts", "num_local_experts") if hasattr(config, name)), 0)
    expert_width = getattr(config, "moe_intermediate_size", config.intermediate_size if experts else 0)
    expected = {
        "hidden_size": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None) or 16,
        "value_dim": getattr(config, "v_head_dim", None) or getattr(config, "head_dim", None) or 16,
        "vocab_size": config.vocab_size,
        "max_positions": config.max_position_embeddings,
        "tied_embeddings": config.tie_word_embeddings,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
        "dense_width": config.intermediate_size if not experts or getattr(config, "first_k_dense_replace", 0) else 0,
        "experts": experts,
        "active": getattr(config, "num_experts_per_tok", 0),
        "expert_width": expert_width,
        "shared_width": getattr(config, "shared_expert_intermediate_size", getattr(config, "n_shared_experts", 0) * expert_width),
    }
    assert dataclasses.asdict(Stock.of(content, "here").dims) == expected


# Beside the tiny default: configs of checkpoints that hold the tensors it has not.
OTHER_TENSORS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"mlp_only_layers": [1]},
    "deepseek_v2": {"q_lora_rank": 24},
    "deepseek_v3": {"q_lora_rank": None},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_name_table_names_every_tensor_of_a_checkpoint_once(family: str, tmp_path: Path):
    for number, options in enumerate(({}, OTHER_TENSORS.get(family, {}))):
        spec = ModelSpec.open(tiny(family, tmp_path / str(number), **options), torch.float32)
        whole = outline(spec)
        pieces = []
        for layer in range(spec.dims.layers):
            mapping = WeightMapping(spec, first_layer=layer)
            ends = [whole.embedding, *whole.last] if layer == 0 else []
            local = [weight.name for weight in (*ends, *whole.layers[layer in spec.moe_layers])]
            local += ["decoder.layers.0.mlp.router.expert_bias"] if family == "deepseek_v3" and layer in spec.moe_layers else []
            entries = [mapping.entry(re.sub(r"layers\.\d+", "layers.0", name)) for name in local if not mapping.is_copy(name)]
            pieces += [(name, entry.expert) for entry in entries for name in files_of(spec.opened, entry)]
        assert len(pieces) == len(set(pieces))
        assert {name for name, _ in pieces} == set(spec.opened.index.tensors)


@pytest.mark.parametrize(("step", "dense", "expected"), [(1, [], (0, 1, 2, 3)), (2, [], (1, 3)), (1, [0, 2], (1, 3))])
def test_moe_layers_are_where_the_stock_model_has_experts(step: int, dense: list[int], expected: tuple[int, ...], tmp_path: Path):
    path = tiny_qwen3_moe(tmp_path / "moe", decoder_sparse_step=step, mlp_only_layers=dense)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert tuple(i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")) == expected
    assert ModelSpec.open(path, torch.float32).moe_layers == expected


@pytest.mark.parametrize("old_name", [True, False])
def test_the_published_config_and_the_one_transformers_writes_mean_the_same(old_name: bool, tmp_path: Path):
    config = dict(CheckpointIndex.open(tiny_qwen3_moe(tmp_path / "moe")).config)
    experts = config.pop("num_local_experts")
    theta = config.pop("rope_parameters")["rope_theta"]
    config |= {"num_experts": experts, "rope_theta": theta} if old_name else {"num_local_experts": experts, "rope_theta": theta}
    dims = Stock.of(config, "here").dims
    assert (dims.experts, dims.rope_theta) == (8, 10_000.0)


def test_an_unsupported_or_incomplete_config_is_refused():
    with pytest.raises(UserError, match="did you mean 'qwen3_moe'"):
        family_of({"model_type": "qwen3_mow"}, "config.json")
    with pytest.raises(UserError, match=r"docs/adding\.md"):
        family_of({}, "config.json")
    with pytest.raises(UserError, match="hidden_size"):
        family_of({key: value for key, value in QWEN3_30B_A3B.items() if key != "hidden_size"}, "config.json")


def test_defaults_that_the_dense_class_does_not_share_are_written_out():
    config = {"model_type": "mixtral", "hidden_size": 64, "num_attention_heads": 4, "num_experts_per_tok": 2, "num_hidden_layers": 3}
    source, dense = transformers.MixtralConfig(**config), AutoConfig.for_model(**dense_config(config, 96))
    for name in ("sliding_window", "rms_norm_eps", "rope_parameters", "num_key_value_heads", "hidden_act"):
        assert getattr(dense, name) == getattr(source, name), name

    config = {"model_type": "qwen2_moe", "use_sliding_window": True, "max_window_layers": 5, "num_hidden_layers": 8}
    source, dense = transformers.Qwen2MoeConfig(**config), AutoConfig.for_model(**dense_config(config, 96))
    for name in ("sliding_window", "layer_types", "rms_norm_eps", "rope_parameters", "hidden_act"):
        assert getattr(dense, name) == getattr(source, name), name
