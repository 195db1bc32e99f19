"""What a checkpoint holds is asked once, and every command is told the same."""

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
from tests.helpers.tiny_models import tiny_qwen3, tiny_qwen3_moe, write_tokens

Refused = Callable[..., str]


def changed(path: Path, more: dict[str, torch.Tensor], without: str = "") -> Path:
    tensors = {name: tensor for name, tensor in load_file(path / "model.safetensors").items() if name != without}
    save_file({**tensors, **more}, path / "model.safetensors", {"format": "pt"})
    return path


def with_config(path: Path, **more: Any) -> Path:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **more}))
    return path


def prune(path: Path, output: Path) -> tuple[str, ...]:
    text = write_tokens(output.with_name("text"), 32 * 20)
    where = (f"source={path}", f"output={output}", f"data.path={text}")
    return "prune-dense", *where, "data.sequence_length=32", "target.num_hidden_layers=2"


def test_a_dense_model_with_tensors_that_no_class_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """KV scales or MTP heads in a dense model: inspect and prune-dense leave them out and name them"""
    names = ("model.layers.1.self_attn.k_scale", "mtp.fc.weight")
    dense = changed(tiny_qwen3(tmp_path / "dense"), {name: torch.ones(8) for name in names})
    main(["inspect", str(dense), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert sorted(facts["left_out"]["names"]) == sorted(names)
    assert facts["parameters"]["left out"] == 16
    main([*prune(dense, tmp_path / "pruned")])
    assert "left out, as stock qwen3 does not run them: 2 tensors" in capsys.readouterr().out
    assert not set(names) & set(load_file(tmp_path / "pruned/model.safetensors"))


def test_a_dense_model_with_a_tensor_that_nobody_knows(tmp_path: Path, user_error: Refused):
    """a dense model with a tensor that its class does not know: inspect and prune-dense refuse with the same words"""
    dense = changed(tiny_qwen3(tmp_path / "dense"), {"model.layers.1.self_attn.sinks": torch.ones(4)})
    for command in (("inspect", str(dense)), prune(dense, tmp_path / "pruned")):
        assert "model.layers.1.self_attn.sinks, which Qwen3ForCausalLM does not know" in user_error(*command)


def test_a_quantised_model_is_named_by_its_packed_weight(tmp_path: Path, user_error: Refused):
    """GPTQ weights in Marlin's order, bitsandbytes: the message names a packed weight, how many there are, the method and what to do"""
    name = "model.layers.1.self_attn.q_proj"
    packed = {
        f"{name}.g_idx": torch.zeros(64, dtype=torch.int32),
        f"{name}.qweight": torch.zeros(8, 64, dtype=torch.int32),
        f"{name}.qzeros": torch.zeros(1, 8, dtype=torch.int32),
        f"{name}.scales": torch.zeros(1, 64, dtype=torch.float16),
    }
    moe = changed(tiny_qwen3_moe(tmp_path / "moe"), packed, f"{name}.weight")
    with_config(moe, quantization_config={"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"})
    assert f"{name}.qweight is quantised (I32, gptq; 4 such tensors)" in user_error("inspect", str(moe))
    four_bits = {
        f"{name}.weight": torch.zeros(2048, 1, dtype=torch.uint8),
        f"{name}.weight.absmax": torch.ones(64),
        f"{name}.weight.quant_map": torch.ones(16),
        f"{name}.weight.quant_state.bitsandbytes__nf4": torch.zeros(8, dtype=torch.uint8),
    }
    other = changed(tiny_qwen3_moe(tmp_path / "bitsandbytes"), four_bits, f"{name}.weight")
    with_config(other, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    said = user_error("inspect", str(other))
    assert f"{name}.weight is quantised (U8, bitsandbytes; 4 such tensors)" in said
    assert "call model.dequantize() and save_pretrained" in said


def test_a_left_over_quantization_config(tmp_path: Path, user_error: Refused):
    """dequantised weights beside a quantization_config: inspect and eval say which key to remove"""
    dense = with_config(tiny_qwen3(tmp_path / "dense"), quantization_config={"quant_method": "awq", "bits": 4})
    text = write_tokens(tmp_path / "text", 64)
    evaluation = ("eval", f"models={{m: {dense}}}", f"output={tmp_path}/r.jsonl", f"perplexity.data.path={text}")
    for command in (("inspect", str(dense)), evaluation):
        said = user_error(*command)
        assert "quantization_config of awq, and weights that are not quantised" in said
        assert "remove quantization_config from config.json" in said


def test_a_tied_model_with_a_head_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """tie_word_embeddings is true and lm_head differs from the embedding: inspect says two tables, as stock transformers keeps"""
    moe = with_config(tiny_qwen3_moe(tmp_path / "moe"), tie_word_embeddings=True)
    main(["inspect", str(moe), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["dims"]["tied_embeddings"] is False
    assert facts["untied"] == ["lm_head.weight"]
    main(["inspect", str(moe)])
    assert "config.json ties lm_head.weight to the embedding, the files hold another one" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(moe)
    assert not model.lm_head.weight.equal(model.model.embed_tokens.weight)
    embedding = load_file(moe / "model.safetensors")["model.embed_tokens.weight"]
    main(["inspect", str(changed(moe, {"lm_head.weight": embedding.clone()})), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert (facts["dims"]["tied_embeddings"], facts["untied"]) == (True, [])
