"""What `convert`, `export` and `prune-dense` write opens in the stock class, and is all that the source said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_moe2dense.cli import main
from megatron_moe2dense.common.config import build
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families.dense import Dense, DenseForm
from megatron_moe2dense.families.stock import Stock
from megatron_moe2dense.serving import export
from megatron_moe2dense.serving.config import ExportConfig
from megatron_moe2dense.surgery import convert, rewrite
from megatron_moe2dense.surgery.prune_dense.source import DenseSource
from megatron_moe2dense.trainer import distill
from megatron_moe2dense.trainer.config import DistillConfig
from tests.families.every import tiny_config
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe, write_tokens
from tests.trainer.runs import alone, with_student

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-MoE as its stock config class makes it: without head_dim."""
    folder = tmp_path_factory.mktemp("moe")
    tiny_qwen3_moe(folder / "model")  # whose head_dim is the one that the class computes
    config = json.loads((folder / "model/config.json").read_text())
    config.pop("head_dim", None)
    (folder / "model/config.json").write_text(json.dumps(config))
    tokens = write_tokens(folder / "text", 32 * 20)
    main(["calibrate", f"source={folder}/model", f"output={folder}/stats", f"data.path={tokens}", "data.sequence_length=32"])
    return folder


def arguments(moe: Path, output: Path) -> tuple[str, ...]:
    return "convert", f"source={moe}/model", f"statistics={moe}/stats", f"output={output}"


def opens(directory: Path) -> Any:
    """The model as stock transformers loads it, and nothing amiss."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    model, report = loaded
    assert not any(report.values()), report
    return model


def test_a_moe_without_head_dim_becomes_a_class_that_has_a_default_for_it(moe: Path, tmp_path: Path):
    """config.json of the source has no head_dim: it is written out for the dense class, whose default is another, and stock loads it"""
    main([*arguments(moe, tmp_path / "dense")])
    written = json.loads((tmp_path / "dense/config.json").read_text())
    assert written["head_dim"] == 16
    assert opens(tmp_path / "dense").config.head_dim == 16


def test_a_moe_that_slides_in_every_layer_becomes_a_dense_model_that_does():
    """a Qwen3-MoE with use_sliding_window: every layer of the dense model slides, not only those from max_window_layers on"""
    dense = DenseForm(Stock(tiny_config("qwen3_moe", use_sliding_window=True, sliding_window=8))).of(64)
    assert {layer.self_attn.sliding_window for layer in dense.stock.layers} == {8}
    assert dense.config({})["layer_types"] == ["sliding_attention"] * 4


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rms_norm_eps": 1e-5}, "norm is a Cohere2LayerNorm, which differs from Cohere2MoeRMSNorm"),
        ({"rms_norm_eps": 1e-6}, "norm has variance_epsilon 1e-05 instead of 1e-06"),
        ({"layer_types": ["full_attention"] * 4}, "model.layers.0.self_attn has force_rope True, which the class does not know"),
    ],
)
def test_a_setting_that_the_dense_class_does_not_have(changed: dict[str, Any], said: str):
    """a MoE whose norms or positions its dense class does not have: refused, with the module and the setting"""
    with pytest.raises(UserError, match="exact dense form") as refused:
        DenseForm(Stock(tiny_config("cohere2_moe", **changed)))
    assert said in str(refused.value)


def forgetful(self: Dense, source: dict[str, Any], of_class: Any = Dense.config) -> dict[str, Any]:
    return {name: value for name, value in of_class(self, source).items() if name != "head_dim"}


def test_a_config_that_does_not_say_everything_is_found_before_writing(
    moe: Path, tmp_path: Path, user_error: Refused, monkeypatch: pytest.MonkeyPatch
):
    """the dense class would be another one when read from its config.json: refused before anything is written"""
    monkeypatch.setattr(Dense, "config", forgetful)
    said = user_error(*arguments(moe, tmp_path / "dense"))
    assert "as qwen3: model.layers.0.self_attn.q_proj.weight is [64, 64] instead of [512, 64]" in said
    assert list(tmp_path.iterdir()) == []


def test_convert_ends_with_proof(moe: Path, tmp_path: Path, user_error: Refused, monkeypatch: pytest.MonkeyPatch):
    """a converted folder that stock transformers could not open: an error that says so, and no folder"""
    monkeypatch.setattr(convert, "require_read_alike", lambda *_: None)
    monkeypatch.setattr(Dense, "config", forgetful)
    said = user_error(*arguments(moe, tmp_path / "dense"))
    assert "what was written does not open" in said
    assert "self_attn.q_proj.weight is [64, 64]" in said
    assert list(tmp_path.iterdir()) == []


def test_prune_dense_ends_with_proof(tmp_path: Path, user_error: Refused, monkeypatch: pytest.MonkeyPatch):
    """a pruned folder that stock transformers could not open: an error that says so, and no folder"""
    tiny_qwen3(tmp_path / "model")
    tokens = write_tokens(tmp_path / "text", 32 * 20)
    smaller = DenseSource.smaller_config
    monkeypatch.setattr(DenseSource, "smaller_config", lambda *given: {**smaller(*given), "hidden_size": 64})
    target = ("data.sequence_length=32", "target.hidden_size=48")
    said = user_error("prune-dense", f"source={tmp_path}/model", f"output={tmp_path}/out", f"data.path={tokens}", *target)
    assert "what was written does not open" in said
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_export_ends_with_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """an exported folder opens in stock transformers; one that could not: an error that says so, and no folder"""
    distill.run(build(DistillConfig, alone(with_student(tmp_path), "run"), "the test"))
    export.run(ExportConfig(checkpoint=f"{tmp_path}/run", output=f"{tmp_path}/good"))
    opens(tmp_path / "good")
    export.run(ExportConfig(checkpoint=f"{tmp_path}/run", output=f"{tmp_path}/fp8", format="fp8"))
    export.run(ExportConfig(checkpoint=f"{tmp_path}/good", output=f"{tmp_path}/fp8_of_export", format="fp8"))
    written, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("fp8", "fp8_of_export"))
    assert written == again
    monkeypatch.setattr(export, "_with_dtype", lambda content, _: {**content, "head_dim": 32})
    with pytest.raises(UserError, match="what was written does not open"):
        export.run(ExportConfig(checkpoint=f"{tmp_path}/run", output=f"{tmp_path}/bad"))
    assert not list(tmp_path.glob("bad*"))


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.2.self_attn.q_proj.weight", "lm_head.weight"]
)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_nan_in_what_is_merely_copied(name: str, value: float, moe: Path, tmp_path: Path, user_error: Refused):
    """a NaN or infinite weight outside the experts: convert refuses with the tensor's name instead of copying it"""
    config, tensors = json.loads((moe / "model/config.json").read_text()), load_file(moe / "model/model.safetensors")
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe/config.json").write_text(json.dumps(config))
    tensors[name].view(-1)[-1] = value
    save_file(tensors, tmp_path / "moe/model.safetensors", {"format": "pt"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "require_same_source", lambda *_: None)  # the statistics are of the whole one
        patch.setattr(rewrite, "prove", lambda *_: None)
        said = user_error("convert", f"source={tmp_path}/moe", f"statistics={moe}/stats", f"output={tmp_path}/dense")
    assert f"{name} has 1 NaN or infinite of {tensors[name].numel()} values" in said
    assert not (tmp_path / "dense").exists()


def test_eval_of_a_nan_weight(tmp_path: Path, user_error: Refused):
    """a NaN weight in a model that eval measures: refused with the tensor's name instead of a row of NaN"""
    tiny_qwen3(tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    tokens = write_tokens(tmp_path / "text", 64)
    said = user_error(
        "eval",
        f"models={{m: {tmp_path}/model}}",
        f"output={tmp_path}/r.jsonl",
        f"perplexity.data.path={tokens}",
        "perplexity.data.sequence_length=16",
    )
    assert "model.norm.weight has 1 NaN or infinite of 64 values" in said


@pytest.mark.parametrize(
    ("rope", "scaling"),
    [
        ({"rope_type": "default", "rope_theta": 1e6}, None),
        ({"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 64}, 4.0),
    ],
)
def test_an_engine_reads_config_json_by_its_older_names(tmp_path: Path, rope: dict[str, Any], scaling: float | None):
    """an engine with transformers 4: base and scaling of the rotary embeddings and the type stand under the names that it knows too"""
    tiny_qwen3_moe(tmp_path / "model", rope_parameters=rope)
    tokens = write_tokens(tmp_path / "text", 32 * 20)
    main(["calibrate", f"source={tmp_path}/model", f"output={tmp_path}/stats", f"data.path={tokens}", "data.sequence_length=32"])
    main([*arguments(tmp_path, tmp_path / "dense")])
    main(["export", f"checkpoint={tmp_path}/dense", f"output={tmp_path}/export", "dtype=bfloat16"])
    for folder, dtype in (("dense", "float32"), ("export", "bfloat16")):
        written = json.loads((tmp_path / folder / "config.json").read_text())
        assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == rope["rope_theta"]
        assert (written["rope_scaling"] or {}).get("factor") == scaling
        assert written["torch_dtype"] == written["dtype"] == dtype
        assert opens(tmp_path / folder).config.rope_parameters == opens(tmp_path / "model").config.rope_parameters


def test_a_key_that_another_reader_takes_for_something_else(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user_error: Refused
):
    """a dense config.json that would be read otherwise than it was meant: refused before anything is written, with the key"""
    whole = Dense.config

    def without_positions(self: Dense, source: Any) -> dict[str, Any]:
        return {name: value for name, value in whole(self, source).items() if name != "max_position_embeddings"}

    monkeypatch.setattr(Dense, "config", without_positions)
    assert "max_position_embeddings" in user_error(*arguments(moe, tmp_path / "dense"))
    assert not (tmp_path / "dense").exists()
