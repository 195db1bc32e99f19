"""Families against stock transformers: sizes, tensor names, router, dense configs."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_moe2dense.checkpoint.index import CheckpointIndex
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families import FAMILIES, FamilySpec, family_of
from tests.families.published import QWEN3_30B_A3B, dense_config
from tests.helpers.tiny_models import tiny, tiny_qwen3_moe


@pytest.fixture(params=list(FAMILIES))
def spec(request: pytest.FixtureRequest) -> FamilySpec:
    return FAMILIES[request.param]


@pytest.fixture
def index(spec: FamilySpec, tmp_path: Path) -> CheckpointIndex:
    return CheckpointIndex.open(tiny(spec.name, tmp_path / "model"))


def test_the_architecture_is_a_stock_class(spec: FamilySpec, index: CheckpointIndex):
    assert index.config["architectures"] == [spec.architecture]
    assert issubclass(getattr(transformers, spec.architecture), transformers.PreTrainedModel)
    assert family_of(index.config, "here") is spec


@pytest.mark.parametrize(
    "options", [{}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}]
)
def test_sizes_are_those_of_the_transformers_config(spec: FamilySpec, options: dict[str, Any], tmp_path: Path):
    path = tiny(spec.name, tmp_path / "model", **options)
    dims, config = spec.dims(CheckpointIndex.open(path).config), AutoConfig.from_pretrained(path)
    experts = next((getattr(config, name) for name in ("num_experts", "num_local_experts") if hasattr(config, name)), 0)
    expert_width = getattr(config, "moe_intermediate_size", config.intermediate_size if experts else 0)
    every_layer = experts and not hasattr(config, "moe_intermediate_size")
    expected = {
        "hidden_size": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None) or 16,
        "vocab_size": config.vocab_size,
        "max_positions": config.max_position_embeddings,
        "tied_embeddings": config.tie_word_embeddings,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
        "dense_width": 0 if every_layer else config.intermediate_size,
        "experts": experts,
        "active": getattr(config, "num_experts_per_tok", 0),
        "expert_width": expert_width,
        "shared_width": getattr(config, "shared_expert_intermediate_size", getattr(config, "n_shared_experts", 0) * expert_width),
    }
    assert dataclasses.asdict(dims) == expected


WITH_TABLE = [name for name, spec in FAMILIES.items() if spec.megatron is not None]


# Beside the tiny default: configs of checkpoints that hold the tensors it has not.
OTHER_TENSORS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"mlp_only_layers": [1]},
    "deepseek_v2": {"q_lora_rank": 24},
    "deepseek_v3": {"q_lora_rank": None},
}


@pytest.mark.parametrize("spec", WITH_TABLE, indirect=True)
def test_the_name_table_names_every_tensor_of_a_checkpoint_once(spec: FamilySpec, tmp_path: Path):
    for number, options in enumerate(({}, OTHER_TENSORS.get(spec.name, {}))):
        index = CheckpointIndex.open(tiny(spec.name, tmp_path / str(number), **options))
        dims, moe_layers = spec.dims(index.config), spec.moe_layers(index.config)
        chosen: dict[str, list[tuple[str, int]]] = {}
        for rule in spec.megatron or ():
            # The table covers layers without experts too, which are layers with one expert in some families.
            skipped = moe_layers if rule.megatron.startswith("decoder.layers.{layer}.mlp.linear_") else ()
            layers = [layer for layer in range(dims.layers) if layer not in skipped] if "{layer}" in rule.megatron else [0]
            for layer, expert in itertools.product(layers, range(dims.experts) if "{expert}" in rule.megatron else [0]):
                stored = [name.format(layer=layer, expert=expert) for name in rule.hf]
                if all(name in index.tensors for name in stored):
                    chosen.setdefault(rule.megatron.format(layer=layer, expert=expert), [(name, expert) for name in stored])
        pieces = [piece for stored in chosen.values() for piece in stored]
        assert len(pieces) == len(set(pieces))
        assert {name for name, _ in pieces} == set(index.tensors)


@pytest.mark.parametrize("spec", WITH_TABLE, indirect=True)
def test_rows_of_one_parameter_differ_in_the_stored_tensors_alone(spec: FamilySpec):
    rows: dict[str, set[Any]] = {}
    for rule in spec.megatron or ():
        for name in (rule.megatron, *rule.aliases):
            assert set(re.findall(r"{(\w+)}", name)) <= {"layer", "expert"}
            rows.setdefault(name, set()).add((rule.megatron, rule.kind, rule.split, rule.aliases))
    assert all(len(each) == 1 for each in rows.values())
    assert len(set(spec.megatron or ())) == len(spec.megatron or ())


@pytest.mark.parametrize(("step", "dense", "expected"), [(1, [], (0, 1, 2, 3)), (2, [], (1, 3)), (1, [0, 2], (1, 3))])
def test_moe_layers_are_where_the_stock_model_has_experts(step: int, dense: list[int], expected: tuple[int, ...], tmp_path: Path):
    path = tiny_qwen3_moe(tmp_path / "moe", decoder_sparse_step=step, mlp_only_layers=dense)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert tuple(i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")) == expected
    config = CheckpointIndex.open(path).config
    assert family_of(config, "here").moe_layers(config) == expected


@pytest.mark.parametrize("old_name", [True, False])
def test_the_published_config_and_the_one_transformers_writes_mean_the_same(old_name: bool, tmp_path: Path):
    config = dict(CheckpointIndex.open(tiny_qwen3_moe(tmp_path / "moe")).config)
    experts = config.pop("num_local_experts")
    theta = config.pop("rope_parameters")["rope_theta"]
    config |= {"num_experts": experts, "rope_theta": theta} if old_name else {"num_local_experts": experts, "rope_theta": theta}
    dims = FAMILIES["qwen3_moe"].dims(config)
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
