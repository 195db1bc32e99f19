"""What config.json of a result says to every reader: through the stock class, and to those that fill in defaults for what is left out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_moe2dense.cli import main
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families.dense import Dense, DenseForm
from megatron_moe2dense.families.readers import contradictions, differences, for_all_readers, left_to_defaults
from megatron_moe2dense.families.stock import Stock
from megatron_moe2dense.families.table import EXCEPTIONS
from megatron_moe2dense.surgery.layout import dense_of, require_read_alike
from megatron_moe2dense.surgery.source import MoeSource
from tests.families.every import moe_types, tiny_checkpoint, tiny_config
from tests.families.published import DEEPSEEK_V2_LITE, dense_config
from tests.helpers.tiny_models import tiny, write_tokens

OLD = ("qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "olmoe", "mixtral", "qwen2_moe")
ROUTER = ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "topk_method", "routed_scaling_factor", "norm_topk_prob")
# What a dense result must say as its MoE does, in classes that have the key.
KEPT = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act"),
    *("rope_parameters", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "sliding_window", "attention_bias"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
)
UNREFUSED = [name for name in moe_types() if name != "mistral4" and not (name in EXCEPTIONS and EXCEPTIONS[name].refused)]


def read_back(config: dict[str, Any]) -> dict[str, Any]:
    """What the stock class believes of a config.json."""
    return CONFIG_MAPPING[config["model_type"]].from_dict(json.loads(json.dumps(config))).to_dict()


def test_a_key_of_the_published_file_that_the_class_has_no_more():
    """GLM-4.7-Flash's first_k_dense_replace, which its class has no more: says that all layers are dense, as mlp_layer_types does"""
    moe = tiny_config("glm4_moe_lite", first_k_dense_replace=1)
    config = for_all_readers(DenseForm(Stock(moe)).of(64).config(moe.to_dict()))
    assert config["first_k_dense_replace"] == moe.num_hidden_layers
    assert set(read_back(config)["mlp_layer_types"]) == {"dense"}


@pytest.mark.parametrize("family", [pytest.param(name, marks=() if name in OLD else pytest.mark.slow) for name in UNREFUSED])
def test_every_family_says_all_keys_as_they_were_meant(family: str):
    """the dense config.json of any family: no key of the class is left out, and heads, positions, tokens and experts are as meant"""
    moe = tiny_config(family)
    source = moe.to_dict()
    form = DenseForm(Stock(moe))
    dense = form.of(64)
    config = for_all_readers(dense.config(source))
    believed = read_back(config)
    assert not left_to_defaults(config, believed, PreTrainedConfig().to_dict())
    assert not contradictions(believed)
    assert not differences(dense.stock.model.config.to_dict(), believed)
    kept = {name: source[name] for name in KEPT if source.get(name) not in (None, 0) and name in believed}
    assert {name: believed[name] for name in kept} == kept
    if "mlp_layer_types" in config and set(config["mlp_layer_types"]) == {"dense"}:  # engines go by the published key
        assert config["first_k_dense_replace"] == believed["num_hidden_layers"]
    if form.kind == "itself, all layers dense":
        router = {name: source[name] for name in ROUTER if name in source}
        assert {name: believed[name] for name in router} == router


@pytest.mark.slow
@pytest.mark.parametrize("family", ["nemotron_h", "granitemoehybrid"])
def test_a_number_that_is_infinite(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """a class with an infinite number in its config: config.json is JSON that parsers other than Python's read, and the number stays"""
    source = tiny_checkpoint(tmp_path / "moe", family)
    tokens = write_tokens(tmp_path / "text", 32 * 4, vocab=128)
    main(["calibrate", f"source={source}", f"output={tmp_path}/stats", f"data.path={tokens}", "data.sequence_length=32"])
    main(["convert", f"source={source}", f"statistics={tmp_path}/stats", f"output={tmp_path}/dense"])
    assert "config.json says" not in capsys.readouterr().err

    def no_json(name: str) -> None:
        raise AssertionError(name)

    written = json.loads((tmp_path / "dense/config.json").read_text(), parse_constant=no_json)
    for read in (AutoConfig.from_pretrained(tmp_path / "dense"), Stock.of(written, "config.json").config):
        assert read.time_step_limit[1] == math.inf


@pytest.fixture(scope="module")
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MoeSource:
    return MoeSource.open(tiny(request.param, tmp_path_factory.mktemp(request.param) / "moe"))


# The class of DeepSeek-V3 has no topk_method.
DROPPED = [
    (family, name)
    for family in ("deepseek_v2", "deepseek_v3")
    for name in (*ROUTER, "max_position_embeddings", "rms_norm_eps")
    if (family, name) != ("deepseek_v3", "topk_method")
]


@pytest.mark.parametrize(("source", "dropped"), DROPPED, indirect=["source"])
def test_a_key_that_is_left_out(source: MoeSource, dropped: str, monkeypatch: pytest.MonkeyPatch):
    """a dense DeepSeek whose config.json leaves out a key of its router, as llama.cpp stops at, or another: refused before it is written"""
    require_read_alike(source, 2)
    whole = Dense.config
    assert dropped in whole(dense_of(source, 2), source.account.config)
    without = lambda self, given: {name: value for name, value in whole(self, given).items() if name != dropped}  # noqa: E731
    monkeypatch.setattr(Dense, "config", without)
    with pytest.raises(UserError, match=f"of the dense config.json .*({dropped}|[0-9]+ experts)"):
        require_read_alike(source, 2)


def test_the_published_router_keys_stay():
    """DeepSeek-V2-Lite as published: its router's keys stand in the dense config.json, beside first_k_dense_replace of all layers"""
    dense = dense_config(DEEPSEEK_V2_LITE, 11264)
    assert {name: dense[name] for name in ROUTER} == {name: DEEPSEEK_V2_LITE[name] for name in ROUTER}
    assert dense["first_k_dense_replace"] == dense["num_hidden_layers"] == 27


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "64 experts, of which None are active"),
        ({"num_experts_per_tok": 6, "n_group": 6, "topk_group": 3}, "64 experts in 6 groups, of which 3 are chosen"),
        ({"num_experts_per_tok": 6, "num_key_value_heads": 3}, "4 query heads for 3 key and value heads"),
        ({"num_experts_per_tok": 6, "rope_parameters": {"rope_type": "default"}}, None),
    ],
)
def test_a_folder_of_an_earlier_version_is_exported(
    changed: dict[str, Any], said: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """export of a config.json that leaves out router keys, as an early dense DeepSeek-V2: it opens, what engines believe is said"""
    dense = tiny("deepseek_v2", tmp_path / "model", first_k_dense_replace=4, n_routed_experts=64, num_experts_per_tok=6)
    config = json.loads((dense / "config.json").read_text())
    left = {name: value for name, value in config.items() if name not in ROUTER}
    (dense / "config.json").write_text(json.dumps({**left, **changed}))
    main(["export", f"checkpoint={dense}", f"output={tmp_path}/out"])
    warned = capsys.readouterr().err
    assert "config.json says" not in warned if said is None else f"{tmp_path}/out: config.json says {said};" in warned


@pytest.mark.slow
def test_the_type_is_that_of_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """a MoE whose config.json names no type: the dense one names that of its tensors; a folder that names another: said by export"""
    source = tiny("qwen3_moe", tmp_path / "moe", dtype="bfloat16")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": None}))
    tokens = write_tokens(tmp_path / "text", 32 * 4)
    main(["calibrate", f"source={source}", f"output={tmp_path}/stats", f"data.path={tokens}", "data.sequence_length=32"])
    main(["convert", f"source={source}", f"statistics={tmp_path}/stats", f"output={tmp_path}/dense"])
    dense = json.loads((tmp_path / "dense/config.json").read_text())
    assert dense["dtype"] == dense["torch_dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(tmp_path / "dense/model.safetensors").values()} == {torch.bfloat16}
    (tmp_path / "dense/config.json").write_text(json.dumps({**dense, "dtype": "float16", "torch_dtype": "float16"}))
    main(["export", f"checkpoint={tmp_path}/dense", f"output={tmp_path}/out"])
    assert f"{tmp_path}/out: config.json says float16, and the files hold bfloat16" in capsys.readouterr().err
