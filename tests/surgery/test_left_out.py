"""Tensors that the stock class does not hold: what it says it leaves out is left out by name, anything else is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moe2dense.cli import main
from megatron_moe2dense.common.errors import UserError
from megatron_moe2dense.families.account import Account
from megatron_moe2dense.surgery.source import MoeSource
from tests.families.every import tiny_checkpoint
from tests.helpers.tiny_models import tiny_qwen3_moe, write_tokens

# Of multi-token prediction, in a class whose dense result is another class (without such a rule), and in two that stay themselves.
HEADS = {"qwen3_5_moe_text": "mtp.", "exaone_moe": "mtp.", "mimo_v2_flash": "model.mtp."}


def with_tensors(path: Path, **more: torch.Tensor) -> Path:
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, **more}, path / "model.safetensors", {"format": "pt"})
    return path


def heads(start: str) -> dict[str, torch.Tensor]:
    layer = {f"{start}layers.0.mlp.experts.{expert}.up_proj.weight": torch.ones(24, 64) for expert in range(3)}
    return {f"{start}fc.weight": torch.ones(64, 128), f"{start}layers.0.self_attn.q_proj.weight": torch.ones(64, 64), **layer}


@pytest.mark.parametrize("model_type", HEADS)
def test_heads_of_multi_token_prediction_are_left_out_and_named(model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    start = HEADS[model_type]
    tiny_checkpoint(tmp_path / "without", model_type)
    with_tensors(tiny_checkpoint(tmp_path / "moe", model_type), **heads(start))
    facts: dict[str, Any] = {}
    for name in ("without", "moe"):
        main(["inspect", str(tmp_path / name), "--json"])
        facts[name] = json.loads(capsys.readouterr().out)
    names = {f"{start}fc.weight", f"{start}layers.0.self_attn.q_proj.weight", f"{start}layers.0.mlp.experts.*.up_proj.weight"}
    assert set(facts["moe"]["left_out"]["names"]) == names
    assert facts["moe"]["left_out"]["tensors"] == 5
    assert facts["without"]["left_out"] == {"tensors": 0, "names": []}
    assert facts["moe"]["dense"] == facts["without"]["dense"]
    assert facts["moe"]["active_parameters"] == facts["without"]["active_parameters"]
    assert facts["moe"]["parameters"].pop("left out") == 64 * 128 + 64 * 64 + 3 * 24 * 64
    assert facts["without"]["parameters"].pop("left out") == 0
    assert facts["moe"]["parameters"] == facts["without"]["parameters"], "of the class, as stock transformers counts"
    main(["inspect", str(tmp_path / "moe")])
    assert f"{start}fc.weight" in capsys.readouterr().out


def test_the_dense_checkpoint_is_the_one_without_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    prefix = write_tokens(tmp_path / "text", 64, vocab=128)
    dense = []
    for name, more in (("without", {}), ("moe", heads("mtp."))):
        path = with_tensors(tiny_checkpoint(tmp_path / name, "qwen3_next"), **more)
        statistics = ["calibrate", f"source={path}", f"output={path}_statistics", f"data.path={prefix}", "data.sequence_length=16"]
        main(statistics)
        capsys.readouterr()
        main(["convert", f"source={path}", f"statistics={path}_statistics", f"output={path}_dense"])
        assert ("mtp.fc.weight" in capsys.readouterr().out) == bool(more)
        dense.append(load_file(f"{path}_dense/model.safetensors"))
    assert dense[0].keys() == dense[1].keys()
    assert all(tensor.equal(dense[1][name]) for name, tensor in dense[0].items())


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "mtp.fc.weight",
        "model.layers.1.self_attn.k_scale",
        "model.layers.1.self_attn.k_proj.output_scale",
    ],
)
def test_what_no_class_needs_is_left_out(name: str, tmp_path: Path):
    assert MoeSource.open(with_tensors(tiny_qwen3_moe(tmp_path / "moe"), **{name: torch.ones(8)})).account.left_out == [name]


def test_a_tensor_that_the_class_does_not_know_is_refused_by_name(tmp_path: Path, user_error: Callable[..., str]):
    name = "model.layers.1.self_attn.sinks"
    said = user_error("inspect", str(with_tensors(tiny_qwen3_moe(tmp_path / "moe"), **{name: torch.ones(4)})))
    assert f"{name}, which Qwen3MoeForCausalLM does not know (1 such tensors)" in said


QUANTISED = {
    "self_attn.q_proj.weight": torch.zeros(64, 64).to(torch.float8_e4m3fn),  # attention in FP8 beside experts that are not
    "self_attn.q_proj.weight_scale_inv": torch.ones(1, 1),
    "self_attn.q_proj.qweight": torch.zeros(8, 64, dtype=torch.int32),
    "self_attn.q_proj.weight.quant_state.bitsandbytes__nf4": torch.zeros(8, dtype=torch.uint8),
    "input_layernorm.weight": torch.zeros(64, dtype=torch.int8),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_numbers_are_refused_wherever_they_stand(name: str, tmp_path: Path, user_error: Callable[..., str]):
    moe = with_tensors(tiny_qwen3_moe(tmp_path / "moe"), **{f"model.layers.1.{name}": QUANTISED[name]})
    for command in (("inspect", str(moe)), ("calibrate", f"source={moe}", f"output={tmp_path / 'out'}", "data.path=none")):
        assert f"model.layers.1.{name} is quantised (" in user_error(*command)


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("model.embed_tokens.weight", (264, 64), "model.embed_tokens.weight is [264, 64]"),  # rows beyond the vocabulary
        ("model.layers.1.self_attn.q_proj.weight", (64, 32), "model.layers.1.self_attn.q_proj.weight is [64, 32]"),
        ("lm_head.weight", None, "no tensor 'lm_head.weight' (1 missing)"),
        ("model.norm.weight", None, "no tensor 'model.norm.weight' (1 missing)"),
    ],
)
def test_absent_and_misshapen_tensors_outside_the_blocks_are_refused(
    name: str, shape: tuple[int, ...] | None, said: str, tmp_path: Path, user_error: Callable[..., str]
):
    moe = tiny_qwen3_moe(tmp_path / "moe")
    tensors = load_file(moe / "model.safetensors")
    del tensors[name]
    save_file({**tensors, **({} if shape is None else {name: torch.zeros(shape)})}, moe / "model.safetensors", {"format": "pt"})
    assert said in user_error("inspect", str(moe))


def test_a_tensor_under_two_names_is_refused_by_both(tmp_path: Path, user_error: Callable[..., str]):
    """Stock transformers takes names without the `model.` of the whole too, and of two it takes the first, whatever the other holds."""
    name = "layers.1.self_attn.q_proj.weight"
    said = user_error("inspect", str(with_tensors(tiny_qwen3_moe(tmp_path / "moe"), **{name: torch.ones(64, 64)})))
    assert f"{name} and model.{name}, each of which is model.{name} of Qwen3MoeForCausalLM" in said


@pytest.mark.parametrize("more", [("up_proj",), ("gate_proj", "up_proj", "down_proj")])
def test_an_expert_too_many_is_refused(more: tuple[str, ...], tmp_path: Path, user_error: Callable[..., str]):
    """Stock transformers refuses both too: a stack of 9 experts, and one that does not fit together."""
    moe = tiny_checkpoint(tmp_path / "moe", "qwen3_5_moe")
    start = "model.language_model.layers.1.mlp.experts"
    known = load_file(moe / "model.safetensors")
    with_tensors(moe, **{f"{start}.8.{part}.weight": known[f"{start}.7.{part}.weight"].clone() for part in more})
    said = user_error("inspect", str(moe))
    assert f"{start}.8." in said
    assert "such tensors)" in said


@pytest.mark.parametrize("absent", [r"experts\.3\.down_proj", r"experts\.\d+\.down_proj", r"experts\."])
def test_what_several_tensors_of_the_class_are_made_of_is_named_when_it_is_absent(absent: str, tmp_path: Path):
    """Its experts for text and for images are one list in the files."""
    moe = tiny_checkpoint(tmp_path / "moe", "ernie4_5_vl_moe")
    tensors = load_file(moe / "model.safetensors")
    left = {name: tensor for name, tensor in tensors.items() if not re.search(rf"layers\.2\.mlp\.{absent}", name)}
    save_file(left, moe / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"no tensor 'model\.layers\.2\.mlp\.experts\.") as refused:
        Account.open(moe)
    assert re.search(absent, refused.value.found)


@pytest.mark.parametrize("absent", [r"mlp\.fc0\.bias", r"mlp\.fc1\.bias", r"norm0\.weight", r"norm1\.weight", r"norm0\."])
def test_a_tensor_by_which_the_names_of_others_are_read_is_named_when_it_is_absent(absent: str, tmp_path: Path):
    """Kimi K2.5's fc0 and fc1, norm0 and norm1 have numbers one higher in memory; without any norm0, transformers takes norm1 for norm1."""
    moe = tiny_checkpoint(tmp_path / "moe", "kimi_k25")
    tensors = {name: tensor for name, tensor in load_file(moe / "model.safetensors").items() if not re.search(absent, name)}
    save_file(tensors, moe / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"no tensor 'vision_tower\.encoder\.blocks\.0\.{absent}"):
        Account.open(moe)


def test_an_unknown_tensor_that_looks_like_a_stack_of_experts_is_refused_by_name(tmp_path: Path):
    name = "model.language_model.layers.2.mlp.experts.gate_up_proj"
    moe = tiny_checkpoint(tmp_path / "moe", "qwen3_vl_moe")
    with pytest.raises(UserError, match=f"module.{name}, which"):
        Account.open(with_tensors(moe, **{f"module.{name}": load_file(moe / "model.safetensors")[name].clone()}))
